"""Diagnosis: which numbers of a run are beyond what its configuration calls healthy, and what to
change.

A finding is told once, when the mean of the newest steps crosses its limit, and again only after it
was over.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from treerpo_ray.config import Config
from treerpo_ray.config.health import HealthConfig
from treerpo_ray.metrics.events import HEALTHY_AGAIN, UNHEALTHY
from treerpo_ray.metrics.rows import Row

SETTLED_REWARD = 0.9
"""Mean reward from which a policy may be certain of what it says."""
NEVER_IDLE = 0.1
"""Share of its time that a learner may wait for trees and still is what the others wait for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A limit that was crossed, or is kept again."""

    kind: str
    step: int
    metric: str
    value: float
    key: str
    """Of the limit in the configuration; empty: what is told needs none."""
    limit: float
    what: str
    """What is wrong, in a few words."""
    remedy: str
    """What to change, with the keys of the configuration."""

    def fields(self) -> dict[str, str | int | float]:
        """Those of its event."""
        found = {name: getattr(self, name) for name in self.__slots__ if name != "kind"}
        if self.kind == HEALTHY_AGAIN:
            return {name: found[name] for name in ("step", "metric", "value", "key", "limit")}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is healthy in a run, and what some of it is measured by."""

    health: HealthConfig
    clip_grad_norm: float
    max_staleness: int
    has_common_steps: bool
    """Whether answers of a tree share more than their prompt in every step."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """Of a run."""
        return cls(
            health=config.health,
            clip_grad_norm=config.learner.clip_grad_norm,
            max_staleness=config.gate.max_staleness,
            has_common_steps=len(config.tree.num_children) > 1 and not config.tree.adaptive,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A limit of the section `health`, and what is told beyond it."""

    key: str
    metric: str
    what: str
    remedy: str
    is_low: bool = False
    """Whether what is below the limit is beyond it."""
    measure: Callable[["Steps", "Rule"], float | None] = lambda steps, rule: steps.mean(rule.metric)
    """What is compared; None: it cannot be said."""


KEPT_STEPS = 50
"""Learner steps among which those that have a metric are looked for."""


class Steps:
    """The newest learner steps of a run, and its first ones.

    Args:
        limits: Those of the run.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rows: list[Row] = []
        self.first: list[float] = []
        """The mismatch of the first steps that have one."""

    def add(self, row: Row) -> None:
        """The next step; one that a resume repeats takes the place of all from it on."""
        self.rows = [past for past in self.rows if past["step"] < row["step"]]
        self.rows = [*self.rows, row][-max(KEPT_STEPS, self.limits.health.window) :]
        if "mismatch/mean" in row and len(self.first) < self.limits.health.window:
            self.first.append(row["mismatch/mean"])

    def mean(self, metric: str) -> float | None:
        """Over the newest steps that have it, as many as the window; None if they are fewer, or the
        newest of all has not."""
        size = self.limits.health.window
        values = [row[metric] for row in self.rows if metric in row][-size:]
        has_it = metric in self.rows[-1] and len(values) == size
        return sum(values) / size if has_it else None


def _mismatch_growth(steps: Steps, rule: Rule) -> float | None:
    limit, mean = steps.limits.health.max_mismatch, steps.mean(rule.metric)
    if mean is None:
        return None
    least = (limit or 1.0) / 10  # below, rounding alone makes multiples
    return mean / max(sum(steps.first) / len(steps.first), least)


def _ratio_drift(steps: Steps, rule: Rule) -> float | None:
    mean = steps.mean(rule.metric)
    return None if mean is None else abs(mean - 1)


def _entropy(steps: Steps, rule: Rule) -> float | None:
    """Of a policy that is wrong now and then: one that is certain and right is what is wanted."""
    reward, mean = steps.mean("reward/mean"), steps.mean(rule.metric)
    return None if mean is None or reward is None or reward > SETTLED_REWARD else mean


def _clipped_norms(steps: Steps, rule: Rule) -> float | None:
    mean = steps.mean(rule.metric)
    return None if mean is None else mean / steps.limits.clip_grad_norm


def _bound_share(steps: Steps, rule: Rule) -> float | None:
    """Of a learner that never waits: where it waits, trees are old for being long in coming."""
    mean, idle = steps.mean(rule.metric), steps.mean("idle/learner_share")
    bound = steps.limits.max_staleness
    if mean is None or idle is None or bound < 2:  # with 1, the next trees grow beside the update
        return None
    return mean / bound if idle <= NEVER_IDLE else 0.0


def _kept_share(steps: Steps, rule: Rule) -> float | None:
    """While nothing at all is kept, that is told."""
    return steps.mean(rule.metric) if steps.rows[-1].get("groups/kept") else None


def _trained_share(steps: Steps, rule: Rule) -> float | None:
    """Of groups that are kept: else that is told."""
    kept, limit = steps.mean("groups/kept_share"), steps.limits.health.min_kept_share
    return steps.mean(rule.metric) if kept is not None and kept >= (limit or 0.0) else None


def _tree_hits(steps: Steps, rule: Rule) -> float | None:
    """Of trees alone: answers without a common step share no more than a prompt."""
    return steps.mean(rule.metric) if steps.limits.has_common_steps else None


RULES = (
    Rule(
        key="max_mismatch",
        metric="mismatch/mean",
        what="engines and learner disagree on the log-probabilities of the same tokens",
        remedy="set model.dtype=float32, or lower gate.max_staleness",
    ),
    Rule(
        key="max_mismatch_growth",
        metric="mismatch/mean",
        what="engines and learner drift apart since the first steps (so many times the mismatch)",
        remedy="lower learner.learning_rate or gate.max_staleness, or set model.dtype=float32",
        measure=_mismatch_growth,
    ),
    Rule(
        key="max_truncated_share",
        metric="importance/truncated_share",
        what="many importance weights are cut down",
        remedy="lower gate.max_staleness, or raise loss.importance_cap",
    ),
    Rule(
        key="max_clip_share",
        metric="loss/clip_share",
        what="the clip range keeps many tokens from being learned from",
        remedy="lower learner.learning_rate or learner.minibatches, or raise loss.clip_high",
    ),
    Rule(
        key="max_ratio_drift",
        metric="loss/ratio",
        what="the policy moves far within a learner step (distance of the mean ratio to 1)",
        remedy="lower learner.learning_rate or learner.minibatches",
        measure=_ratio_drift,
    ),
    Rule(
        key="max_kl",
        metric="loss/kl",
        what="the policy is far from the model that it started from",
        remedy="raise loss.kl_coef, or lower learner.learning_rate",
    ),
    Rule(
        key="min_entropy",
        metric="loss/entropy",
        what="the policy is nearly certain of every token, so that siblings come to the same",
        remedy="raise loss.entropy_coef, loss.clip_high or tree.temperature",
        is_low=True,
        measure=_entropy,
    ),
    Rule(
        key="max_grad_norm",
        metric="learner/grad_norm",
        what="gradients are cut down to a small part of themselves (so many times the clip)",
        remedy="lower learner.learning_rate, or raise learner.warmup_steps",
        measure=_clipped_norms,
    ),
    Rule(
        key="min_kept_share",
        metric="groups/kept_share",
        what="hardly any step group is kept, so that hardly anything is learned",
        remedy="take prompts of other difficulty (prompts.path), raise gate.max_redraws "
        "or tree.num_children, or lower learner.prune_threshold",
        is_low=True,
        measure=_kept_share,
    ),
    Rule(
        key="min_trained_share",
        metric="tokens/trained_share",
        what="hardly any of the sampled tokens are trained",
        remedy="raise tree.num_children, or lower learner.prune_threshold",
        is_low=True,
        measure=_trained_share,
    ),
    Rule(
        key="max_duplicate_share",
        metric="groups/duplicate_share",
        what="most siblings were sampled alike: they cost tokens and tell nothing apart",
        remedy="raise tree.temperature or tree.step_tokens, or lower tree.num_children",
    ),
    Rule(
        key="max_cut_off_share",
        metric="length/cut_off_share",
        what="many answers are cut off before they have a result",
        remedy="raise tree.step_tokens",
    ),
    Rule(
        key="max_calibration_error",
        metric="values/calibration_error",
        what="values say little of what the next answer comes to",
        remedy="raise tree.num_children, or set learner.prune=shrinkage",
    ),
    Rule(
        key="max_error_share",
        metric="verdict/error_share",
        what="the verifier has no verdict on many answers",
        remedy="raise verifier.timeout_s, verifier.memory_mib or verifier.num_workers; "
        "events.jsonl has what failed (check_failed)",
    ),
    Rule(
        key="max_staleness_share",
        metric="staleness/mean",
        what="trees are as old as they may be and the learner never waits (share of the bound)",
        remedy="lower gate.max_staleness or engine.num_engines, or raise learner.num_workers or "
        "learner.token_budget",
        measure=_bound_share,
    ),
    Rule(
        key="min_prefix_hit_rate",
        metric="engine/prefix_hit_rate",
        what="engines compute again what siblings share",
        remedy="raise engine.kv_cache_gib or engine.gpu_memory_utilization, or lower "
        "engine.max_trees",
        is_low=True,
        measure=_tree_hits,
    ),
    Rule(
        key="max_idle_engines",
        metric="idle/engines_share",
        what="engines wait most of the time",
        remedy="raise gate.max_staleness, gate.trees_per_step or learner.num_workers, or lower "
        "engine.num_engines",
    ),
)
NOTHING_KEPT = Rule(
    key="",
    metric="groups/kept",
    what="no step group was kept, so there was no update",
    remedy="take prompts of other difficulty (prompts.path), raise gate.max_redraws or "
    "tree.num_children, or lower learner.prune_threshold",
    is_low=True,
    measure=lambda steps, rule: steps.rows[-1].get(rule.metric),
)
"""Told at once: the only one that needs no limit."""


class Diagnosis:
    """Looks at the rows of a run as they come.

    Args:
        limits: Those of the run.
        past: Rows of the sessions before; what is beyond a limit since then is told anew.
    """

    def __init__(self, limits: Limits, *, past: Sequence[Row] = ()) -> None:
        self._steps = Steps(limits)
        self._told: set[str] = set()
        for row in past:
            if "reward/mean" in row:
                self._steps.add(row)

    def look(self, row: Row) -> Iterator[Finding]:
        """The limits that a row crosses; nothing for the row of an evaluation."""
        if "reward/mean" not in row:
            return
        self._steps.add(row)
        for rule in (NOTHING_KEPT, *RULES):
            limit = getattr(self._steps.limits.health, rule.key) if rule.key else 1.0
            value = rule.measure(self._steps, rule)
            if limit is None or value is None or math.isnan(value):
                continue
            is_beyond = value < limit if rule.is_low else value > limit
            if is_beyond != (rule.key in self._told):
                self._told ^= {rule.key}
                yield Finding(
                    kind=UNHEALTHY if is_beyond else HEALTHY_AGAIN,
                    step=int(row["step"]),
                    metric=rule.metric,
                    value=value,
                    key=f"health.{rule.key}" if rule.key else "",
                    limit=limit,
                    what=rule.what,
                    remedy=rule.remedy,
                )
