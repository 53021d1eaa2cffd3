"""Nodes that a run may use have the same versions, or it is refused."""

import importlib.metadata

import pytest

from treerpo_ray.driver.versions import compare, versions_here

HERE = {"Python": "3.11.9", "torch": "2.9.1", "treerpo_ray": "abc"}


def test_this_machine_tells_what_it_has() -> None:
    found = versions_here()
    assert found["torch"] == importlib.metadata.version("torch").partition("+")[0]
    assert {"Python", "ray", "transformers", "treerpo_ray"} <= found.keys()
    assert found == versions_here()


def test_nodes_that_have_the_same_are_accepted_also_where_the_driver_lacks_some() -> None:
    node = HERE | {"vllm": "0.32.0", "CUDA": "13.0"}
    compare({"10.0.0.1": node, "10.0.0.2": node, "10.0.0.3": HERE}, here=HERE)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (HERE | {"torch": "2.8.0"}, "10.0.0.2 has torch 2.8.0, and the driver 2.9.1: install the"),
        (HERE | {"vllm": "0.31.0"}, "10.0.0.2 has vllm 0.31.0, and 10.0.0.1 0.32.0: install the"),
        (HERE | {"treerpo_ray": "abd"}, "10.0.0.2 has treerpo_ray abd, and the driver abc: inst"),
    ],
)
def test_a_node_that_differs_is_one_line_with_what_differs(other, told) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        compare({"10.0.0.1": HERE | {"vllm": "0.32.0"}, "10.0.0.2": other}, here=HERE)
    assert "\n" not in str(caught.value)
