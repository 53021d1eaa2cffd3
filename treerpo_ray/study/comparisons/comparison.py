"""Comparison: methods trained from the same start for the same number of sampled tokens.

A comparison is a YAML file of settings (tasks) and arms (methods). Each arm is run once for each
of its seeds in each setting, and leaves one small result file, so that a comparison that was
stopped goes on with the runs that are missing.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config import Config
from treerpo_ray.config.data import PROJECT
from treerpo_ray.config.files import flat_settings, load, placeless, to_yaml
from treerpo_ray.config.identity import Flat, check_file_name
from treerpo_ray.config.sections import RunConfig
from treerpo_ray.driver.sources import version_of
from treerpo_ray.evaluate.evaluation import Evaluation, read_evaluation
from treerpo_ray.metrics.fork_lines import AREA, NEXT, fork_lines
from treerpo_ray.metrics.rows import Row, last_step, latest_rows
from treerpo_ray.run_folder.files import RunFolder

log = logging.getLogger(__name__)

CURVE = (
    *("step", "tokens/sampled", "time/step_s", "time/cpu_s", "reward/mean", "length/mean"),
    "groups/kept_share",
)
"""Metrics of a learner step that a result keeps."""
FORKS = (AREA, NEXT)
"""How metrics begin that a result keeps of the learner steps in which they were measured."""
LENGTH = ("run.num_steps", "run.max_sampled_tokens")
"""Settings that say how long a run is."""
NO_CURVE = ("evaluate.every=0", "evaluate.interim_samples=null")
"""The curve of a comparison is that of the training reward: evaluations on the way cost time."""
CHECKPOINTS = "checkpoint.every=20"
"""Of all runs, unless their file says otherwise: what checkpoints cost is part of a result's time,
and the same for all."""
SPARE_STEPS = 5
"""Learner steps that a run may take at most, for each that its tokens are expected to come to:
where answers become half as long, trees whose last steps shrink have a third of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task, the same for every arm."""

    overrides: list[str] = field(default_factory=list)
    """Files and `section.key=value` that make it of the base."""
    answer_tokens: float
    """Mean length of an answer, from which the learner steps of a run are estimated."""
    sampled_tokens: int
    """Tokens that each run samples, to within one learner step."""

    def __post_init__(self) -> None:
        if not (self.answer_tokens > 0 and self.sampled_tokens > 0):
            raise ValueError("answer_tokens and sampled_tokens of a setting must be more than 0")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method."""

    overrides: list[str] = field(default_factory=list)
    num_seeds: int = 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms against each other in several settings."""

    base: list[str]
    """Configuration that all runs share."""
    references: list[str]
    """Arms that the others are compared with."""
    settings: dict[str, Setting]
    arms: dict[str, Arm]
    first_seed: int = 0
    """Seed of each arm's first run; seeds that no search has used make a fair comparison."""

    def __post_init__(self) -> None:
        if unknown := set(self.references) - set(self.arms):
            raise ValueError(f"references: {unknown} are none of the arms {list(self.arms)}")
        for key, names in (("settings", self.settings), ("arms", self.arms)):
            for name in names:
                check_file_name(key, name)  # of results
        for name, arm in self.arms.items():
            if arm.num_seeds < 1:
                raise ValueError(f"arms.{name}.num_seeds={arm.num_seeds} must be more than 0")

    def trials(self) -> Iterator["Trial"]:
        """All runs: what has the most seeds first, and then seed by seed."""
        for count in sorted({arm.num_seeds for arm in self.arms.values()}, reverse=True):
            names = [name for name, arm in self.arms.items() if arm.num_seeds == count]
            for seed in range(self.first_seed, self.first_seed + count):
                for setting, name in product(self.settings, names):
                    yield Trial(setting=setting, arm=name, seed=seed)

    def configs(self, common: list[str]) -> dict["Trial", Config]:
        """Configuration of each run; `common` are overrides for all of them."""
        return {trial: self._config(trial, common) for trial in self.trials()}

    def _config(self, trial: "Trial", common: list[str]) -> Config:
        setting, arm = self.settings[trial.setting], self.arms[trial.arm]
        name = f"run.name={trial.setting}-{trial.arm}-{trial.seed}"
        own = [f"run.seed={trial.seed}", name, *NO_CURVE, *common]
        config = load([CHECKPOINTS, *self.base, *setting.overrides, *arm.overrides, *own])
        fewest = min(expected_tokens(shape, setting.answer_tokens) for shape in config.shapes)
        step = config.gate.trees_per_step * fewest
        # Answers that come out shorter than expected take more steps; tokens end the run.
        num_steps = math.ceil(SPARE_STEPS * setting.sampled_tokens / step)
        length = replace(config.run, num_steps=num_steps, max_sampled_tokens=setting.sampled_tokens)
        return replace(config, run=length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of a comparison."""

    setting: str
    arm: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to; one file."""

    trial: Trial
    version: str
    """Commit of the project; `-dirty` if its code or settings were changed since. Outside a clone
    a checksum of these, `sources-...`."""
    start: str
    """Checksum of the weights that it started from; empty if they are in no local folder."""
    config: str
    """Resolved configuration, YAML, but for where it was run."""
    before: Evaluation
    after: Evaluation
    curve: dict[str, list[float]]
    """Values of the metrics in CURVE, by learner step."""
    forks: list[Row] = field(default_factory=list)
    """What was measured of places to fork, by learner step: metrics in FORKS and the step."""

    @cached_property
    def settings(self) -> Flat:
        """What the configuration says, by whole keys."""
        return flat_settings(self.config)

    @property
    def num_children(self) -> list[int]:
        """Shape of its trees; of adaptive ones that of those that measure."""
        return cast(list[int], self.settings["tree.num_children"])

    @property
    def is_adaptive(self) -> bool:
        """Whether its trees change their shape."""
        return bool(self.settings.get("tree.adaptive"))

    @property
    def is_flat(self) -> bool:
        """Whether its trees are whole answers, which share nothing but the prompt."""
        return not self.is_adaptive and all(number == 1 for number in self.num_children[1:])


def read_comparison(path: str) -> Comparison:
    """Read a comparison's file.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such comparison")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Comparison), OmegaConf.load(path))
        return cast(Comparison, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error


def expected_tokens(shape: TreeShape, answer_tokens: float) -> float:
    """Tokens of a tree whose answers all have `answer_tokens`: steps are shared above leaves."""
    total, done, num_steps = 0.0, 0.0, 1
    for num_children, step_tokens in zip(shape.num_children, shape.step_tokens, strict=True):
        num_steps *= num_children
        length = min(step_tokens, max(answer_tokens - done, 0.0))
        total, done = total + num_steps * length, done + length
    return total


def result_of(trial: Trial, config: Config) -> Result:
    """The result of a run that is complete, from its run folder."""
    folder = RunFolder(config.folder)
    rows = latest_rows(folder)
    before, after = (read_evaluation(folder, step) for step in (0, last_step(config.run, rows)))
    if before is None or after is None:
        raise ValueError(
            f"{config.folder}: a comparison needs held-out problems: evaluate.data.path"
        )
    rows = [row for row in rows if "tokens/sampled" in row]
    return Result(
        trial=trial,
        version=version_of(PROJECT),
        start=start_of(config),
        config=_without_home(replace(config, run=replace(config.run, root=RunConfig.root))),
        before=before,
        after=after,
        curve={name: [round(row[name], 4) for row in rows] for name in CURVE},
        forks=[forks_of(row) for row in rows if fork_lines(row)],
    )


def forks_of(row: Row) -> Row:
    """What a result keeps of a row that tells of forks."""
    return {name: value for name, value in row.items() if name == "step" or name.startswith(FORKS)}


def _without_home(config: Config) -> str:
    """The configuration as it is on any machine; a loaded one names whole paths."""
    return to_yaml(config).replace(f"{Path.home()}/", "~/")


def start_of(config: Config) -> str:
    """Checksum of the weights that a run starts from; empty if they are in no local folder."""
    weights = Path(config.model.path).expanduser() / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16] if weights.is_file() else ""


def write_result(result: Result, folder: Path) -> None:
    """Write a result where `read_results` finds it."""
    path = result_path(result.trial, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result)) + "\n")


def result_path(trial: Trial, folder: Path) -> Path:
    """File of a run's result."""
    return folder / trial.setting / f"{trial.arm}-{trial.seed}.json"


def read_results(configs: Mapping[Trial, Config], folder: Path) -> list[Result]:
    """The results that there are, in the order of the trials.

    One of an arm that has been given other settings since, of another start, or that sampled
    other than the tokens of its setting, is passed over with a warning.
    """
    results = []
    default = flat_settings(to_yaml(Config()))
    for trial, config in configs.items():
        path = result_path(trial, folder)
        if path.is_file():
            result = _read_result(path)
            if unlike := _unlike(result, config, default):
                log.warning("%s is passed over, for it has other %s", path, ", ".join(unlike))
            else:
                results.append(result)
    return results


def _read_result(path: Path) -> Result:
    found = json.loads(path.read_text())
    return Result(
        trial=Trial(**found["trial"]),
        version=found["version"],
        start=found.get("start", ""),  # a result may be older than a field or a metric
        config=found["config"],
        before=Evaluation.from_fields(found["before"]),
        after=Evaluation.from_fields(found["after"]),
        curve={name: found["curve"].get(name, []) for name in CURVE},
        forks=found.get("forks", []),
    )


def _unlike(result: Result, config: Config, default: Flat) -> list[str]:
    """What a result has otherwise than a run of `config` would: settings, start, tokens.

    A result may be older than a setting, which then has its `default`.
    """
    ours = placeless(flat_settings(to_yaml(config)))
    theirs = placeless(default | result.settings)
    # How many steps its tokens come to is found out by the run; folders may have been moved.
    # What `health` says is only told of.
    known = {key for key in ours if not key.startswith("health.")}
    known -= {"run.root", "run.name", *LENGTH}
    unlike = sorted(name for name in known if ours[name] != theirs.get(name))
    if result.start and start_of(config) not in ("", result.start):
        unlike.append("weights at the start")
    tokens, limit = result.curve["tokens/sampled"], config.run.max_sampled_tokens
    if limit is not None and abs(sum(tokens) - limit) > max(tokens):
        is_short = sum(tokens) < limit
        why = ": answers are much shorter than the setting's answer_tokens" if is_short else ""
        unlike.append(f"tokens: {sum(tokens):,.0f} instead of {limit:,}{why}")
    return unlike
