"""Analysis: a run folder as tables and trees, with neither Ray nor torch nor vLLM."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypedDict, TypeVar, cast

import numpy as np
import pandas as pd
from jaxtyping import Float32, Float64, Int32
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import Tokenizer
from yaml import YAMLError

from treerpo_ray.algo.advantages.baselines import NO_PAST, ROOT_VALUE, Baseline
from treerpo_ray.algo.advantages.errors import advantage_errors
from treerpo_ray.algo.advantages.forms import AdvantageForm, Form, has_baseline, step_advantages
from treerpo_ray.algo.advantages.length import token_price
from treerpo_ray.algo.backup import Values, mean_backup
from treerpo_ray.algo.groups import PruneRule, Pruning, step_groups
from treerpo_ray.algo.tree import ROOT, Tree
from treerpo_ray.config.data import PROJECT
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.errors import one_line
from treerpo_ray.metrics.events import EVENTS_FILE
from treerpo_ray.metrics.rows import METRICS_FILE, latest_rows
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import CONFIG_FILE, MODEL_FOLDER, RunFolder, no_run
from treerpo_ray.user_code import is_file, is_here, split_function

TOKENIZER_FILE = "tokenizer.json"
ShownT = TypeVar("ShownT")
SECTIONS = ("run", "model", "gate", "learner")
"""Of the configuration, which are read here or by the viewer."""


class NotThere(ValueError):
    """A part of a run that it does not have (yet)."""


class _Scheme(TypedDict):
    """What makes advantages of values."""

    form: Form
    pruning: Pruning
    baseline: Baseline
    token_price: float


class Run:
    """A run folder, read only; the run may still be going on.

    Args:
        folder: Path or URI.
        trusts_code: Whether a form of advantages or a rule of pruning is run that the folder
            brings along and that is not here as the file that it was; somebody may have sent it.

    Raises:
        ValueError: the folder is missing or holds no run; methods raise `NotThere` for a part of
            the run that is not there (yet), or that needs code which is not trusted.
    """

    def __init__(self, folder: str, *, trusts_code: bool = False) -> None:
        self.folder, self.trusts_code = folder, trusts_code
        self._files = RunFolder(folder)
        self._trees_of = lru_cache(1)(self._read_trees)
        self._baselines: dict[int, Baseline] = {}
        self._tokenizer: Tokenizer | None = None
        if not self._files.exists(CONFIG_FILE):
            raise ValueError(no_run(folder))

    @cached_property
    def config(self) -> dict[str, dict[str, object]]:
        """The resolved configuration: section, key, value.

        Raises:
            ValueError: the file is none of a run.
        """
        place = f"{self.folder}/{CONFIG_FILE}"
        try:
            sections = OmegaConf.to_container(OmegaConf.create(self._files.read_text(CONFIG_FILE)))
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ValueError(f"{place} is no configuration: {one_line(error)}") from error
        own = sections if isinstance(sections, dict) else {}
        if missing := [name for name in SECTIONS if not isinstance(own.get(name), dict)]:
            raise ValueError(f"{place} is none of a run: it has no section {missing[0]}")
        return cast(dict[str, dict[str, object]], sections)

    def metrics(self) -> pd.DataFrame:
        """Metrics by learner step; a step that a resume repeated counts as it was done last."""
        rows = latest_rows(self._files)
        if not rows:
            raise NotThere(f"{self.folder} has no step in its {METRICS_FILE} yet")
        return pd.DataFrame(rows).astype({"step": int}).set_index("step")

    def events(self) -> pd.DataFrame:
        """Events in order, with a time (UTC), a kind and a column for each field."""
        events = pd.DataFrame(self._files.read_lines(EVENTS_FILE))
        if events.empty:
            raise NotThere(f"{self.folder} has no event in its {EVENTS_FILE} yet")
        return events.assign(time=pd.to_datetime(events["time"], unit="s", utc=True))

    def evaluations(self) -> pd.DataFrame:
        """What the files in `eval/` hold, one row a file, by the file's name."""
        paths = self._files.glob("eval/*.json")
        if not paths:
            raise NotThere(f"{self.folder} has no evaluation in eval/ yet")
        rows = [json.loads(self._files.read_bytes(path)) for path in paths]
        return pd.DataFrame(rows, index=pd.Index([Path(path).stem for path in paths], name="name"))

    def tree_steps(self) -> list[int]:
        """Learner steps whose trees are saved, in order."""
        return saved_trees.saved_steps(self._files)

    def trees(self, step: int | None = None) -> list[TreeRecord]:
        """Trees that one learner step was trained on, by ticket; without `step` the newest ones.

        A ticket that was trained on again after a resume has its last tree.
        """
        saved = self.tree_steps()
        if not saved or (step is not None and step not in saved):
            wanted = "any step" if step is None else f"step {step}"
            raise NotThere(
                f"{self.folder} has no trees of {wanted}; saved are those of {saved}, "
                f"see metrics.save_trees_every"
            )
        step = saved[-1] if step is None else step
        if not (files := saved_trees.saved_files(self._files, step)):
            raise NotThere(f"{self.folder} has no file of trees of step {step} yet")
        return self._trees_of(step, tuple(map(self._files.state, files)))

    def _read_trees(self, step: int, states: tuple[str, ...]) -> list[TreeRecord]:
        """`states` of the files, by which trees that were read once are those of the run still."""
        records = saved_trees.saved(self._files, step)
        newest = {r.ticket: r for r in sorted(records, key=lambda record: record.finished_at_s)}
        return [newest[ticket] for ticket in sorted(newest)]

    def tree(self, step: int, ticket: int) -> TreeRecord:
        """The tree of one ticket that a learner step was trained on; the others are not read."""
        if (record := saved_trees.saved_tree(self._files, step, ticket)) is None:
            raise NotThere(f"{self.folder} has no tree of ticket {ticket} at step {step}")
        return record

    def values(self, record: TreeRecord) -> Values:
        """Backed-up value of each step and of the prompt."""
        return mean_backup(record.tree, record.rewards)

    def version_before(self, step: int) -> int:
        """Version of the learner that a learner step was made with."""
        versions = self.metrics().get("version", pd.Series(dtype=float)).dropna()
        return int(versions[versions.index < step].iloc[-1:].sum())

    def advantages(self, record: TreeRecord) -> Float64[np.ndarray, " steps"]:
        """Advantage of each step that the learner gave it or, if that was not saved, as this run
        computes it; NaN where it is not trained on."""
        if record.training is not None:
            return record.training.advantages
        return step_advantages(record.tree, self.values(record), **self._scheme(record))

    def _baseline(self, record: TreeRecord) -> Baseline:
        """What earlier steps told the learner of the values of this tree."""
        step = record.ticket // int(str(self.config["gate"]["trees_per_step"])) + 1
        if step not in self._baselines:
            share = self._learner.baseline_share
            rows = {int(row["step"]): row for row in latest_rows(self._files)}
            self._baselines = {
                number: Baseline.of_metrics(row, share)
                for number, row in rows.items()
                if ROOT_VALUE in row
            }
        if step not in self._baselines:
            raise NotThere(f"{self.folder} has no {ROOT_VALUE} of step {step} yet")
        return self._baselines[step]

    def _scheme(self, record: TreeRecord) -> "_Scheme":
        self._check_code(self._learner.advantage)
        form = self._learner.form
        baseline = self._baseline(record) if has_baseline(form) else NO_PAST
        return {
            "form": form,
            "pruning": self.pruning,
            "baseline": baseline,
            "token_price": self._token_price,
        }

    @property
    def _token_price(self) -> float:
        weight = self._learner.length_weight
        if not weight:
            return 0.0  # of earlier versions, too
        return token_price(weight, cast(Sequence[int], self.config["tree"]["step_tokens"]))

    def advantage_errors(self, record: TreeRecord) -> Float64[np.ndarray, " steps"]:
        """Standard error of each advantage; NaN where there is none."""
        return advantage_errors(record.tree, self.values(record), **self._scheme(record))

    @property
    def own_code(self) -> tuple[str, ...]:
        """Functions of the run's user that make its advantages or prune them. They are Python that
        the run folder may bring along: `pruning`, `advantage_errors` and, where the learner's own
        are not saved, `advantages` run it."""
        names = (self._learner.advantage, self._learner.prune)
        return tuple(name for name in names if not isinstance(name, AdvantageForm | PruneRule))

    @property
    def pruning(self) -> Pruning:
        """Which step groups are kept."""
        self._check_code(self._learner.prune)
        return self._learner.pruning

    def check_code(self) -> None:
        """Raise NotThere for any of `own_code` that may not be run."""
        for name in self.own_code:
            self._check_code(name)

    def _check_code(self, name: str) -> None:
        """Raise NotThere for a function that the folder brings along, unless that may be run."""
        if self.trusts_code or name not in self.own_code:
            return
        file, _ = split_function(name)
        source = self._learner.sources.get(file)
        if is_file(file) and source is not None and not is_here(file, source):
            raise NotThere(
                f"{self.folder} brings {name} along, which is not here as it was and is not run; "
                "if you trust it: Run(folder, trusts_code=True), of a command --trust-run"
            )

    @cached_property
    def _learner(self) -> LearnerConfig:
        """What tells the advantages; what else an earlier version had is left out."""
        learner = self.config["learner"]
        own = ("advantage", "prune", "prune_threshold")
        names = (*own, "sources", "baseline_share", "length_weight")
        if missing := [name for name in own if name not in learner]:
            raise ValueError(
                f"{self.folder}/{CONFIG_FILE} has no '{missing[0]}': it is of another version"
            )
        return LearnerConfig(**{name: learner[name] for name in names if name in learner})  # type: ignore[arg-type]  # as written

    def step_texts(self, record: TreeRecord) -> list[str]:
        """Each step's own text; the number of its tokens if the run's tokenizer is not at hand."""
        return [self._decoded(step.token_ids) for step in record.tree.steps]

    def tree_table(self, step: int | None = None) -> pd.DataFrame:
        """The steps of the trees of a learner step (the newest one if not given), a row a step.

        `value_se`, `change_se` and `advantage_se` are the standard errors of `value`, `change`
        and `advantage`. `before` is the value of the parent or the prompt, `change` what the step
        makes of it, and `weight` the share of the prompt's answers, drawn as the value counts
        them, that go through the step. `end` counts the tokens from the prompt to the step's last
        one, `surprisal` is the mean of -log p (nats) over the step's own tokens as they were
        sampled, which estimates the entropy there without bias.
        """
        return pd.concat([self._steps(record) for record in self.trees(step)], ignore_index=True)

    def _steps(self, record: TreeRecord) -> pd.DataFrame:
        tree, values, advantages = record.tree, self.values(record), self.advantages(record)
        before = np.append(values.steps, values.root)[tree.parents]  # ROOT = -1 is the last
        weight, change_errors = np.ones(len(tree) + 1), np.full(len(tree), np.nan)
        for group in step_groups(tree, values):  # shallow ones first
            shares = weight[group.parents, None] / group.children.shape[-1]
            weight[group.children] = shares
            change_errors[group.children] = group.difference_errors
        leaves = dict(zip(tree.leaves, record.verdicts, strict=True))
        return pd.DataFrame(
            {
                "ticket": record.ticket,
                "prompt_id": record.prompt_id,
                "step": range(len(tree.steps)),
                "parent": [step.parent for step in tree.steps],
                "depth": tree.depths,
                "length": [len(step.token_ids) for step in tree.steps],
                "stop": [step.stop.value for step in tree.steps],
                "is_leaf": [index in leaves for index in range(len(tree.steps))],
                "verdict": [
                    leaves[index].value if index in leaves else None
                    for index in range(len(tree.steps))
                ],
                "end": tree.path_lengths,
                "surprisal": -step_means(tree, tree.logprobs),
                "before": before,
                "value": values.steps,
                "value_se": values.step_errors,
                "change": values.steps - before,
                "change_se": change_errors,
                "weight": weight[:ROOT],
                "advantage": advantages,
                "advantage_se": self.advantage_errors(record),
                "is_kept": ~np.isnan(advantages),
            }
        )

    def _decoded(self, token_ids: Int32[np.ndarray, " tokens"]) -> str:
        if self.tokenizer is None:
            return f"({len(token_ids)} tokens)"
        return self.tokenizer.decode(token_ids.tolist())

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the exported model or of the newest checkpoint, or of the model that the run
        started from if that is a folder; a run that goes on may have none yet."""
        if self._tokenizer is None:
            self._tokenizer = self._find_tokenizer()
        return self._tokenizer

    def _find_tokenizer(self) -> Tokenizer | None:
        # Paths in a config are relative to the project, a notebook's working folder is not.
        start = PROJECT / str(self.config["model"]["path"]) / TOKENIZER_FILE
        if start.exists():
            return Tokenizer.from_file(str(start))
        checkpoints = self._files.glob(f"checkpoints/*/*/{TOKENIZER_FILE}")  # model or adapters
        for file in (f"{MODEL_FOLDER}/{TOKENIZER_FILE}", *reversed(checkpoints)):
            if self._files.exists(file):
                return Tokenizer.from_str(self._files.read_text(file))
        return None


@dataclass(frozen=True, slots=True, repr=False)
class Missing:
    """Stands for what cannot be shown of a run."""

    reason: str

    def __repr__(self) -> str:
        return self.reason


def if_there(show: Callable[[Run], ShownT], run: Run) -> ShownT | Missing:
    """What `show` makes of the run or, if that needs a part that the run does not have, why not."""
    try:
        return show(run)
    except NotThere as missing:
        return Missing(str(missing))


def newest_run(root: str) -> str:
    """Folder of the run below the local folder `root` that was written last.

    Raises:
        ValueError: there is none.
    """
    configs = list(Path(root).expanduser().glob("*/config.yaml"))
    if not configs:
        raise ValueError(f"there is no run below {root}")
    return str(max((path.parent for path in configs), key=_written_at))


def most_mixed_tree(run: Run, records: Sequence[TreeRecord]) -> TreeRecord:
    """The tree whose steps differ most in value: the one that has most to show."""
    return records[int(np.argmax([_spread(run, record) for record in records]))]


def is_mixed(run: Run, record: TreeRecord) -> bool:
    """Whether steps of a tree differ in value; else its answers are all right or all wrong."""
    return _spread(run, record) > 0


def _spread(run: Run, record: TreeRecord) -> float:
    return float(np.nan_to_num(run.values(record).steps).std())


def worst_leaf(run: Run, record: TreeRecord) -> int:
    """The leaf on whose path a single step loses most value."""
    return max(record.tree.leaves, key=lambda leaf: -min(path_changes(run, record, leaf)))


def path_changes(run: Run, record: TreeRecord, leaf: int) -> list[float]:
    """Change in value that each step on the path to `leaf` makes; 0 where a value is missing."""
    values, path = run.values(record), record.tree.path(leaf)
    along = np.array([values.root, *values.steps[list(path)]])
    return np.nan_to_num(np.diff(along)).tolist()


def step_means(
    tree: Tree, of_tokens: Float32[np.ndarray, " tokens"]
) -> Float64[np.ndarray, " steps"]:
    """Mean over the tokens of each step; NaN for one without."""
    means, has_tokens = np.full(len(tree), np.nan), tree.lengths > 0
    if has_tokens.any():
        sums = np.add.reduceat(of_tokens.astype(np.float64), tree.starts[has_tokens])
        means[has_tokens] = sums / tree.lengths[has_tokens]
    return means


def _written_at(folder: Path) -> float:
    metrics = folder / METRICS_FILE
    return (metrics if metrics.exists() else folder / "config.yaml").stat().st_mtime
