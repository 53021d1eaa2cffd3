"""vLLM's build for GPUs: downloaded, and read by mypy, which imports nothing of it."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.project import PROJECT

SETTINGS = """
[mypy]
explicit_package_bases = True
check_untyped_defs = True
follow_imports = silent
ignore_missing_imports = True
[mypy-vllm.*]
ignore_missing_imports = False
# What vLLM imports, and the code has nothing to do with: to read all of it takes a minute.
[mypy-{foreign}]
follow_imports = skip
[mypy-{unused}]
follow_imports = skip
"""
FOREIGN = ("datasets", "pandas", "ray", "scipy", "torch._dynamo", "torch._inductor", "torch.fx")
FOREIGN += ("transformers", "triton")
UNUSED = ("compilation", "distributed.kv_transfer", "entrypoints", "multimodal")
UNUSED += ("model_executor.layers", "model_executor.models", "third_party", "v1.attention")
UNUSED += ("v1.worker",)
DOWNLOAD = (
    "-m",
    "pip",
    "download",
    "--quiet",
    "--no-deps",
    "--only-binary",
    ":all:",
    "--retries=0",
)


def requirement() -> str:
    """vLLM as pyproject.toml wants it on a GPU."""
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    [found] = extras["optional-dependencies"]["gpu"]
    return str(found)


def downloaded(requirement: str, folder: Path) -> Path:
    """The wheel of a package for Linux; skips the test where there is no connection."""
    machine = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")

    def download(what: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *DOWNLOAD, *options, "--dest", str(folder), what]
        return subprocess.run(command, capture_output=True, text=True)

    done = download(requirement, *machine)
    if done.returncode and download("packaging").returncode:
        pytest.skip("no connection to the registry that pip downloads from")
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob(f"{requirement.partition('=')[0]}-*.whl")
    return wheel


def users_of(package: str) -> list[Path]:
    """The modules of the project that import a package."""
    found = []
    for folder in ("treerpo_ray", "jobs"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
            if any(name.partition(".")[0] == package for name in names):
                found.append(path)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBuild:
    """A wheel of vLLM for GPUs, unpacked as far as its sources go."""

    wheel: Path
    sources: Path
    """Folder of the package."""

    @classmethod
    def unpacked(cls, folder: Path) -> "GpuBuild":
        """The one that a GPU machine would install, in a folder."""
        wheel, sources = downloaded(requirement(), folder), folder / "sources"
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith((".py", ".pyi", "py.typed"))]
            archive.extractall(sources, names)
        foreign = ",".join(f"{name}.*" for name in FOREIGN)
        unused = ",".join(f"vllm.{name}.*" for name in UNUSED)
        (folder / "mypy.ini").write_text(SETTINGS.format(foreign=foreign, unused=unused))
        return cls(wheel=wheel, sources=sources / "vllm")

    @property
    def requires(self) -> list[str]:
        """What pip installs with it."""
        name, version, *_ = self.wheel.name.split("-")
        info = zipfile.Path(self.wheel, f"{name}-{version}.dist-info/")
        return importlib.metadata.PathDistribution(info).requires or []

    def faults(self, *files: Path) -> list[str]:
        """What of some files does not fit this build, a line each, as mypy tells it."""
        folder = self.wheel.parent
        command = [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini")]
        command += ["--cache-dir", str(folder / "cache"), "--hide-error-context", *map(str, files)]
        environment = os.environ | {"MYPYPATH": str(self.sources.parent)}
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if ": error: " in line]
