"""Batch statistics: what the trees of a learner step say, as sums that add over workers."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.calibration import NUM_BINS, calibration_bins, calibration_error
from treerpo_ray.algo.groups import GroupState, Pruning, StepGroups, count_duplicates
from treerpo_ray.metrics.rows import BY_SET
from treerpo_ray.prompts.mixture import set_of
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Verdict


class Sums(dict[str, float]):
    """Sums by name; `+` joins them."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums({name: self[name] + other[name] for name in [*self, *other]})

    def __missing__(self, name: str) -> float:
        return 0.0


BINNED = ("count", "predicted", "came")
"""Columns of `calibration_bins`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """Counts and sums over trees; `+` joins the workers' parts of one batch."""

    num_trees: int = 0
    num_valued: int = 0
    """Trees whose root has a value: none of their leaves errored."""
    value_sum: float = 0.0
    """Sum of the root values."""
    value_sums: Sums = field(default_factory=Sums)
    """The same by data set, where several are mixed."""
    valued: Counter[str] = field(default_factory=Counter)
    """Trees that those are of."""
    num_with_correct: int = 0
    """Trees with at least one leaf that has the whole reward."""
    groups: Counter[str] = field(default_factory=Counter)
    """Step groups by `state` and by `state_depth_d`, d the depth of their steps."""
    group_sums: Sums = field(default_factory=Sums)
    """Over step groups that are not errored: `value_se` of their means; and, squared and for the
    depth d of their steps, of the differences of values to the mean, `signal_depth_d`, and of
    the standard errors of those, `noise_depth_d`. Over the advantages that have a standard error:
    `advantage_se`, and how many there are, `num_advantage_se`."""
    variances: Sums = field(default_factory=Sums)
    """`variance_sums` of the trees, where the form of advantages asks for them."""
    calibration: Sums = field(default_factory=Sums)
    """`calibration_bins`, by column and bin."""
    num_duplicates: int = 0
    """Steps with the very tokens of an earlier sibling."""
    num_later_siblings: int = 0
    """Steps that have an earlier sibling."""
    verdicts: Counter[str] = field(default_factory=Counter)
    num_sampled_tokens: int = 0
    answer_tokens: int = 0
    """Tokens of all answers (paths to leaves), shared ones counted for each."""
    num_leaves: int = 0
    right_tokens: int = 0
    """Those of the right ones."""
    num_versioned: int = 0
    """Trees with any token: of the others every request was turned down."""
    min_version: int = 2**62
    max_version: int = -1
    version_sum: int = 0
    """Sum over trees of their oldest version."""
    last_finished_s: float = 0.0
    """Unix time at which the last tree was finished."""
    last_scored_s: float = 0.0
    """Unix time at which the last tree was scored."""
    num_moved: int = 0
    """Times a tree had to go to another engine."""
    num_redraws: int = 0
    """Trees that were put aside for having no kept group; their tokens count as sampled."""

    def __add__(self, other: "BatchStats") -> "BatchStats":
        least, most = {"min_version"}, {"max_version", "last_finished_s", "last_scored_s"}
        joined = {}
        for name in self.__dataclass_fields__:
            ours, theirs = getattr(self, name), getattr(other, name)
            join = min if name in least else max if name in most else None
            joined[name] = join(ours, theirs) if join else ours + theirs
        return BatchStats(**joined)

    def metrics(self, version: int) -> dict[str, float]:
        """Rows for `metrics.jsonl`; `version` is the learner's own at the time of consumption."""
        kept, pruned = self.groups[GroupState.KEPT], self.groups[GroupState.PRUNED]
        total = sum(self.groups[state] for state in GroupState)
        return {
            "reward/mean": self.value_sum / max(self.num_valued, 1),
            "reward/any": self.num_with_correct / max(self.num_trees, 1),
            **{f"{BY_SET}{name}": self.value_sums[name] / n for name, n in self.valued.items()},
            "groups/kept": kept,
            "groups/pruned": pruned,
            "groups/kept_share": kept / max(total, 1),
            "groups/errored": self.groups[GroupState.ERRORED],
            **self._groups_by_depth(),
            "groups/value_se": self.group_sums["value_se"] / max(kept + pruned, 1),
            **self._advantage_error(),
            **self._signal_to_noise(),
            "groups/duplicate_share": self.num_duplicates / max(self.num_later_siblings, 1),
            **self._calibration(),
            **{f"verdict/{verdict}": self.verdicts[verdict] for verdict in Verdict},
            "verdict/error_share": sum(
                count for verdict, count in self.verdicts.items() if not Verdict(verdict).is_reward
            )
            / max(self.num_leaves, 1),
            "tree/answers": self.num_leaves / max(self.num_trees, 1),
            "tokens/sampled": self.num_sampled_tokens,
            "length/mean": self.answer_tokens / max(self.num_leaves, 1),
            **self._right_length(),
            "length/cut_off_share": self.verdicts[Verdict.CUT_OFF] / max(self.num_leaves, 1),
            "staleness/max": version - self.min_version if self.num_versioned else 0,
            "staleness/mean": (self.num_versioned * version - self.version_sum)
            / max(self.num_versioned, 1),
            "engine/moved_trees": self.num_moved,
            "gate/redraws": self.num_redraws,
        }

    def _right_length(self) -> dict[str, float]:
        """Mean tokens of the answers that have the whole reward; nothing without any."""
        count = self.verdicts[Verdict.CORRECT]
        return {"length/right_mean": self.right_tokens / count} if count else {}

    def _groups_by_depth(self) -> dict[str, float]:
        """Of each depth that has groups those of every state, none too: a curve has no gaps."""
        depths = {name.rpartition("_depth_")[2] for name in self.groups if "_depth_" in name}
        names = [f"{state}_depth_{depth}" for depth in sorted(depths) for state in GroupState]
        return {f"groups/{name}": self.groups[name] for name in names}

    def _advantage_error(self) -> dict[str, float]:
        """Mean standard error of the advantages that have one."""
        count = self.group_sums["num_advantage_se"]
        return {"groups/advantage_se": self.group_sums["advantage_se"] / count} if count else {}

    def _calibration(self) -> dict[str, float]:
        """Error of the values as predictions, and of how many of them; nothing without any."""
        columns = [[self.calibration[f"{name}_{i}"] for i in range(NUM_BINS)] for name in BINNED]
        bins = np.array(columns).T
        if not bins.any():
            return {}
        return {
            "values/calibration_error": calibration_error(bins),
            "values/num_predictions": float(bins[:, 0].sum()),
        }

    def _signal_to_noise(self) -> dict[str, float]:
        """Root mean square difference over that of its standard error; chance alone gives 1 above
        the leaves, and N leaves that are not all equal give about sqrt(N)."""
        ratios = {}
        for name, noise in sorted(self.group_sums.items()):
            if name.startswith("noise") and noise:  # an only child has neither
                depth = name.removeprefix("noise_")
                signal = self.group_sums[f"signal_{depth}"]
                ratios[f"groups/signal_to_noise_{depth}"] = (signal / noise) ** 0.5
        return ratios


def count(
    record: TreeRecord,
    values: Values,
    step_groups: Sequence[StepGroups],
    *,
    errors: Float64[np.ndarray, " steps"],
    pruning: Pruning,
    sets: Collection[str] = (),
) -> BatchStats:
    """Statistics of one tree with these values and step groups.

    Args:
        record, values, step_groups: The tree.
        errors: Of its advantages.
        pruning: Which groups are kept.
        sets: Names of the data sets, where several are mixed.
    """
    tree, is_valued = record.tree, not np.isnan(values.root)
    groups, sums = _count_groups(step_groups, pruning)
    known = errors[~np.isnan(errors)]
    sums += Sums(advantage_se=float(known.sum()), num_advantage_se=len(known))
    has_tokens = len(tree.token_ids) > 0
    verdicts = Counter[str](record.verdicts)
    lengths = tree.path_lengths[list(tree.leaves)]
    is_right = np.array([verdict is Verdict.CORRECT for verdict in record.verdicts], bool)
    num_duplicates, num_later_siblings = count_duplicates(tree)
    oldest = tree.min_version
    name = set_of(record.prompt_id, sets) if is_valued else None
    return BatchStats(
        num_trees=1,
        num_valued=int(is_valued),
        value_sum=values.root if is_valued else 0.0,
        value_sums=Sums() if name is None else Sums({name: float(values.root)}),
        valued=Counter() if name is None else Counter([name]),
        num_with_correct=int(Verdict.CORRECT in verdicts),
        groups=groups,
        group_sums=sums,
        calibration=_calibration_sums(step_groups),
        num_duplicates=num_duplicates,
        num_later_siblings=num_later_siblings,
        verdicts=verdicts,
        num_sampled_tokens=tree.num_sampled_tokens + record.redrawn_tokens,
        answer_tokens=int(lengths.sum()),
        num_leaves=len(tree.leaves),
        right_tokens=int(lengths[is_right].sum()),
        num_versioned=int(has_tokens),
        min_version=oldest if has_tokens else BatchStats().min_version,
        max_version=tree.max_version if has_tokens else BatchStats().max_version,
        version_sum=oldest if has_tokens else 0,
        last_finished_s=record.finished_at_s,
        last_scored_s=record.scored_at_s,
        num_moved=record.attempt,
        num_redraws=record.num_redraws,
    )


def _count_groups(step_groups: Sequence[StepGroups], pruning: Pruning) -> tuple[Counter[str], Sums]:
    """`BatchStats.groups`, and of `BatchStats.group_sums` what the groups themselves tell."""
    groups, sums = Counter[str](), Sums()
    for group in step_groups:
        has_values, num_kept = ~group.is_errored, int(group.is_kept(pruning).sum())
        num_valued = int(has_values.sum())
        counts = {
            GroupState.KEPT: num_kept,
            GroupState.PRUNED: num_valued - num_kept,
            GroupState.ERRORED: len(has_values) - num_valued,
        }
        for state, number in counts.items():
            if number:
                groups[state] += number
                groups[f"{state}_depth_{group.depth}"] += number
        if num_valued:
            own = group.values[has_values]
            deviations = own - own.mean(-1, keepdims=True)
            noise = group.difference_errors[has_values]
            sums["value_se"] += float(group.mean_errors[has_values].sum())
            sums[f"signal_depth_{group.depth}"] += float((deviations**2).sum())
            sums[f"noise_depth_{group.depth}"] += float((noise**2).sum())
    return groups, sums


def _calibration_sums(step_groups: Sequence[StepGroups]) -> Sums:
    """`BatchStats.calibration`."""
    bins = calibration_bins(step_groups)
    return Sums(
        {
            f"{name}_{place}": float(bins[place, column])
            for column, name in enumerate(BINNED)
            for place in np.flatnonzero(bins[:, 0]).tolist()
        }
    )
