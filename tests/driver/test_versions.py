"""Nodes that a run may use have the same versions, or it is refused."""

import importlib.metadata
import subprocess
import sys

import pytest
from ray import cloudpickle

from tests.support.project import PROJECT
from treerpo_ray.driver.versions import AgreedVersions, versions_here
from treerpo_ray.errors import NodeDiffers

NODES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
HERE = {"Python": "3.11.9", "torch": "2.9.1", "treerpo_ray": "abc"}


def test_this_machine_tells_what_it_has() -> None:
    found = versions_here()
    assert found["torch"] == importlib.metadata.version("torch").partition("+")[0]
    assert {"Python", "ray", "transformers", "treerpo_ray"} <= found.keys()
    assert found == versions_here()


def agree(*nodes: dict[str, str]) -> AgreedVersions:
    """What is agreed once so many nodes are compared with the driver."""
    agreed = AgreedVersions.of_driver(HERE)
    for address, versions in zip(NODES, nodes, strict=False):
        agreed = agreed.joined(f"id of {address}", address, versions)
    return agreed


def test_nodes_that_have_the_same_are_accepted_also_where_the_driver_lacks_some() -> None:
    node = HERE | {"vllm": "0.32.0", "CUDA": "13.0"}
    assert agree(node, node, HERE).nodes == {f"id of {address}" for address in NODES}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (HERE | {"torch": "2.8.0"}, "10.0.0.2 has torch 2.8.0, and the driver 2.9.1: install the"),
        (HERE | {"vllm": "0.31.0"}, "10.0.0.2 has vllm 0.31.0, and 10.0.0.1 0.32.0: install the"),
        (HERE | {"treerpo_ray": "abd"}, "10.0.0.2 has treerpo_ray abd, and the driver abc: inst"),
    ],
)
def test_a_node_that_differs_is_one_line_with_what_differs(other, told) -> None:
    with pytest.raises(NodeDiffers, match=told) as caught:
        agree(HERE | {"vllm": "0.32.0"}, other)
    assert "\n" not in str(caught.value)


def test_what_is_agreed_reaches_a_node_that_comes_later_whole() -> None:
    """As pickled, with the check of the node; it holds there for what nodes alone have, too."""
    agreed = agree(HERE | {"NVIDIA driver": "580.65.06"})
    there: AgreedVersions = cloudpickle.loads(cloudpickle.dumps(agreed.check_node)).__self__
    assert there == agreed
    with pytest.raises(NodeDiffers, match=r"^10\.0\.0\.3 has NVIDIA driver 595\.1, and 10.*580"):
        there.joined("late", NODES[2], HERE | {"NVIDIA driver": "595.1"})


def test_a_process_that_hands_the_check_on_loads_no_torch() -> None:
    check = cloudpickle.dumps(AgreedVersions.of_driver(HERE).check_node)
    load = f"import pickle, sys; pickle.loads({check!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", load], cwd=PROJECT).returncode == 0
