"""Next steps: what can be done with a finished run, as commands to copy into a shell."""

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
FEW_ANSWERS = 24
"""Answers a learner step that another method has at least, if the run itself had as many: where
trees become single answers, as many questions are too few to learn from."""
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
    for other in _other_methods(config):
        made = _with_method(config, arguments, sampled_tokens, other)
        if made is None:
            continue
        words, folder = made
        train = f"{_python()} {_file('jobs/train.py')} {shlex.join(words)}"
        if is_evaluated:
            train += f" && {evaluate} --compare {_shown(folder)} {run}"
        purpose = f"train it with {other.title} on as many tokens"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Method:
    """Another method to train the same with."""

    title: str
    suffix: str
    """Of the run's name."""
    overrides: tuple[str, ...]
    """Its file and what goes over it; none: it is what a run is without a method's file."""


def _other_methods(config: Config) -> Iterator[_Method]:
    """A baseline to be held against, and trees that fork where the run's own measurements say that
    it pays: most shapes that are set by hand need more tokens than single answers somewhere."""
    if config.learner.advantage is AdvantageForm.STANDARD:
        yield _Method(title="TreeRPO", suffix="treerpo", overrides=())
    else:
        file = _file("conf/methods/grpo.yaml")
        yield _Method(title="GRPO", suffix="grpo", overrides=(file,))
    num_levels = len(config.tree.num_children)
    if num_levels > 1 and not config.tree.adaptive:
        overrides = [_file("conf/methods/adaptive.yaml")]
        if num_levels > 2:
            overrides.append("tree.num_children=[1" + ",4" * (num_levels - 1) + "]")
        trees = config.gate.trees_per_step
        answers = min(trees * config.shape.max_leaves, FEW_ANSWERS)
        if answers > trees:
            overrides.append(f"gate.trees_per_step={answers}")
        title = "forks only where they pay"
        yield _Method(title=title, suffix="adaptive", overrides=tuple(overrides))


def _with_method(
    config: Config, arguments: Sequence[str], sampled_tokens: int, method: _Method
) -> tuple[list[str], str] | None:
    """Arguments that train the same with another method, and the folder of that run; None where
    these settings do not go with it, or it is the same."""
    methods = PROJECT / "conf/methods"
    own = [word for word in arguments if Path(word).resolve().parent != methods]
    words = [word for word in own if not word.startswith(("run.name=", *LENGTH))]
    name = []
    if any(word.startswith("run.name=") for word in arguments):
        name = [f"run.name={config.run.name}-{method.suffix}"]
    try:
        fixed = ["tree.adaptive=false"] if load(words).tree.adaptive else []
        words += [*method.overrides, *fixed, *name]
        words += _as_long(config, load(words), sampled_tokens)
        other = load(words)
    except ValueError:
        return None
    is_same = (other.learner.advantage, other.tree) == (config.learner.advantage, config.tree)
    if is_same or other.folder == config.folder:
        return None
    return words, other.folder


def _as_long(config: Config, other: Config, sampled_tokens: int) -> list[str]:
    """Overrides that end another run at as many tokens, whatever a learner step of it takes."""
    most = config.gate.trees_per_step * config.largest_shape.max_sampled_tokens
    least = other.gate.trees_per_step * min(each.max_sampled_tokens for each in other.shapes)
    num_steps = math.ceil(SPARE_STEPS * config.run.num_steps * most / least)
    length = [f"run.max_sampled_tokens={sampled_tokens}"]
    return [f"run.num_steps={num_steps}", *length] if num_steps > other.run.num_steps else length
