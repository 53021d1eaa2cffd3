"""Next steps: what can be done with a finished run, as commands to copy into a shell."""

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.config import Config
from treerpo_ray.config.data import INHERITED, PROJECT, DataConfig
from treerpo_ray.config.files import load
from treerpo_ray.config.sections import RAY_JOB

STARTED_IN = "TREERPO_STARTED_IN"
"""Variable with the folder of the shell that called a script which has gone to PROJECT since."""
LENGTH = ("run.num_steps=", "run.max_sampled_tokens=")
"""Beginnings of the overrides that say how long a run is."""
SPARE_STEPS = 1.2
"""Learner steps of another method for each that would do if its answers were as long as may be:
shorter ones take more, and the tokens end the run."""
HELD_OUT = "held_out"
"""Name of the benchmark that is the run's own held-out data."""


def next_steps(
    config: Config, arguments: Sequence[str], sampled_tokens: int
) -> list[tuple[str, str]]:
    """What for, and a command that does it, from the folder in which this one was called.

    Args:
        config: Of a finished run.
        arguments: Files and overrides that it was made of.
        sampled_tokens: That it took; another method is proposed to train on as many.
    """
    if RAY_JOB in os.environ or "://" in config.folder:
        return []  # a job's folder is gone after it, and the notebook's page needs one that is here
    run = _shown(config.folder)
    notebook = f"{_environment()}TREERPO_RUN={run} bash {_file('jobs/notebook.sh')}"
    is_evaluated = bool(config.evaluate.data.path)
    seen = "see the mistakes that it fixed" if is_evaluated else "see its trees"
    found = [(seen, _viewer(run)), ("draw its figures", notebook)]
    evaluate = f"{_python()} {_file('jobs/evaluate.py')}"
    if is_evaluated:
        found.append(("evaluate it", f"{evaluate} {run} {shlex.join(_benchmark(config))}"))
    other = _other_method(config, arguments, sampled_tokens)
    if other is not None:
        method, words, folder = other
        train = f"{_python()} {_file('jobs/train.py')} {shlex.join(words)}"
        if is_evaluated:
            train += f" && {evaluate} --compare {_shown(folder)} {run}"
        purpose = f"train it with {method} on as many tokens"
        found.append((f"{purpose}, and compare" if is_evaluated else purpose, train))
    if not _has_moved():
        return found
    return [(purpose, f"(cd {shlex.quote(str(PROJECT))} && {line})") for purpose, line in found]


def _has_moved() -> bool:
    """Whether a script went to PROJECT before it called us, and the user is in another folder."""
    return Path(os.environ.get(STARTED_IN, os.getcwd())).resolve() != Path.cwd()


def _file(name: str) -> str:
    """A file of the project, from this folder."""
    return name if Path.cwd() == PROJECT else shlex.quote(str(PROJECT / name))


def _viewer(run: str) -> str:
    """What serves the trees of a run; the package is found from PROJECT, be it installed or not."""
    line = f"{_python()} -m treerpo_ray.viewer {run}"
    return line if Path.cwd() == PROJECT else f"(cd {shlex.quote(str(PROJECT))} && {line})"


def _python() -> str:
    """This interpreter, as the shell finds it that called us."""
    is_on_path = STARTED_IN not in os.environ and shutil.which("python") == sys.executable
    if is_on_path:
        return "python"
    executable = Path(sys.executable)  # not resolved: a virtual environment is a link
    near = executable.is_relative_to(PROJECT) and Path.cwd() == PROJECT
    return shlex.quote(str(executable.relative_to(PROJECT) if near else executable))


def _environment() -> str:
    """Words before a script that have it use the environment of this process, if it must be told.

    A script takes the active environment, or `.venv`.
    """
    if sys.prefix in (str(PROJECT / ".venv"), os.environ.get("VIRTUAL_ENV")):
        return ""
    return f"TREERPO_VENV={shlex.quote(sys.prefix)} "


def _shown(folder: str) -> str:
    """A folder as a shell takes it, with ~ for the home."""
    home = f"{Path.home()}/"
    if folder.startswith(home) and shlex.quote(folder) == folder:
        return f"~/{folder.removeprefix(home)}"
    return shlex.quote(folder)


def _benchmark(config: Config) -> list[str]:
    """Arguments of `jobs/evaluate.py` that have it sample answers as the run's own evaluation."""
    own, settings = config.evaluate.data, config.evaluate
    prompts, default, name = asdict(config.prompts), asdict(DataConfig()), HELD_OUT
    default |= {key: prompts[key] for key in INHERITED}  # what it has if it is not told
    differing = {key: value for key, value in asdict(own).items() if value != default[key]}
    if own.path == "quickstart:test" and differing.keys() <= {"path", "num_problems"}:
        differing, name = {}, "quickstart"  # it is among the benchmarks
    keys = {f"evaluate.benchmarks.{name}.{key}": value for key, value in differing.items()}
    keys["evaluate.max_tokens"] = config.max_evaluated_tokens
    keys["evaluate.num_samples"] = settings.num_samples
    keys["evaluate.temperature"] = settings.temperature
    keys["evaluate.top_p"] = settings.top_p
    return ["--benchmarks", name, *(f"{key}={_yaml(value)}" for key, value in keys.items())]


def _yaml(value: object) -> str:
    """A value as an override takes it."""
    if value is None:
        return "null"
    is_plain = not isinstance(value, str) or re.fullmatch(r"[\w./~-]+", value)
    return f"{value}" if is_plain else json.dumps(value)  # which is YAML, too


def _other_method(
    config: Config, arguments: Sequence[str], sampled_tokens: int
) -> tuple[str, list[str], str] | None:
    """Another method, the arguments that train the same with it, and the folder of that run."""
    if config.learner.advantage is AdvantageForm.STANDARD:
        title, suffix = "TreeRPO", "treerpo"
        words = [word for word in arguments if Path(word).parent.name != "methods"]
    else:
        title, suffix, words = "GRPO", "grpo", [*arguments, _file("conf/methods/grpo.yaml")]
    words = [word for word in words if not word.startswith(("run.name=", *LENGTH))]
    if config.tree.adaptive:
        words.append("tree.adaptive=false")
    if any(word.startswith("run.name=") for word in arguments):
        words.append(f"run.name={config.run.name}-{suffix}")
    try:
        other = load(words)
        words += _as_long(config, other, sampled_tokens)
        other = load(words)
    except ValueError:
        return None  # a method that these settings do not go with
    if other.learner.advantage is config.learner.advantage or other.folder == config.folder:
        return None
    return title, words, other.folder


def _as_long(config: Config, other: Config, sampled_tokens: int) -> list[str]:
    """Overrides that end another run at as many tokens, whatever a learner step of it takes."""
    ratio = config.largest_shape.max_sampled_tokens / other.shape.max_sampled_tokens
    num_steps = math.ceil(SPARE_STEPS * config.run.num_steps * ratio)
    length = [f"run.max_sampled_tokens={sampled_tokens}"]
    return [f"run.num_steps={num_steps}", *length] if num_steps > other.run.num_steps else length
