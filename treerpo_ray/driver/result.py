"""Run result: what a run came to, in words and as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

from treerpo_ray.config import Config
from treerpo_ray.evaluate.evaluation import Evaluation, read_evaluation
from treerpo_ray.metrics.rows import last_step, latest_rows
from treerpo_ray.run_folder.checkpoints import Checkpoints
from treerpo_ray.run_folder.files import WHOLE_MODEL, RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run came to."""

    before: Evaluation | None
    after: Evaluation | None
    sampled_tokens: int
    seconds: float
    """Wall time of the training itself, of all sessions."""
    num_updates: int
    """Learner steps that changed the weights."""
    is_complete: bool
    """Whether the run did all its steps, and was not stopped before."""


def finished_result(config: Config) -> RunResult | None:
    """What a run came to that the run folder holds complete; None if there is work left."""
    folder = RunFolder(config.folder)
    if not folder.exists(WHOLE_MODEL):
        return None
    last = last_step(config.run, latest_rows(folder))
    if last not in Checkpoints(folder, config.checkpoint.keep).steps():
        return None
    before, after = (read_evaluation(folder, step) for step in (0, last))
    if config.evaluate.data.path and not all(
        each is not None and each.is_of(config.evaluate) for each in (before, after)
    ):
        return None
    return collect_result(config, before, after, is_complete=True)


def collect_result(
    config: Config, before: Evaluation | None, after: Evaluation | None, *, is_complete: bool
) -> RunResult:
    """Result of a run whose metrics are in the run folder."""
    rows = [row for row in latest_rows(RunFolder(config.folder)) if "tokens/sampled" in row]
    return RunResult(
        before=before,
        after=after,
        sampled_tokens=int(sum(row["tokens/sampled"] for row in rows)),
        seconds=sum(row["time/step_s"] for row in rows),
        num_updates=int(rows[-1]["version"]) if rows else 0,
        is_complete=is_complete,
    )


def summary_json(config: Config, result: RunResult) -> str:
    """The result as one line of JSON."""
    before, after = result.before, result.after

    def reward(one: Evaluation | None) -> float | None:
        return None if one is None else round(one.mean_reward, 4)

    has_partial = any(each is not None and each.reward is not None for each in (before, after))

    def interval(one: Evaluation | None) -> list[float] | None:
        return None if one is None else [round(one.ci95_low, 4), round(one.ci95_high, 4)]

    return json.dumps(
        {
            "run": str(Path(config.folder)) if "://" not in config.folder else config.folder,
            "pass_at_1_before": None if before is None else round(before.pass_at_1, 4),
            "pass_at_1_after": None if after is None else round(after.pass_at_1, 4),
            **(
                {"reward_before": reward(before), "reward_after": reward(after)}
                if has_partial
                else {}
            ),
            "ci95_before": interval(before),
            "ci95_after": interval(after),
            **(
                {"num_problems": after.num_problems, **after.sampling_fields}
                if after is not None
                else {}
            ),
            "length_before": None if before is None else round(before.length, 1),
            "length_after": None if after is None else round(after.length, 1),
            "sampled_tokens": result.sampled_tokens,
            "seconds": round(result.seconds, 1),
        }
    )


def describe_result(config: Config, result: RunResult) -> str:
    """The result in plain words."""
    spent = f"{result.sampled_tokens:,} sampled tokens and {result.seconds:.0f} s of training"
    if not result.is_complete:
        return f"stopped with a checkpoint after {spent}; the same command goes on: {config.folder}"
    before, after = result.before, result.after
    if not result.num_updates:
        return (
            f"nothing was learned, with {spent}: in no step group was one answer worth more than "
            "another. Look at some, and at what the prompt, the length of an answer and the check "
            f"make of them; the run folder is {config.folder}"
        )
    if before is None or after is None:
        return f"done after {spent}; the run folder is {config.folder}"
    rewards = ""
    if before.reward is not None or after.reward is not None:
        rewards = f"the mean reward went from {before.mean_reward:.3f} to {after.mean_reward:.3f}, "
    return (
        f"{rewards}Pass@1 went from {before.pass_at_1:.1%} to {after.pass_at_1:.1%} "
        f"({100 * (after.pass_at_1 - before.pass_at_1):+.1f} points) on {after.num_problems} "
        f"problems of {after.data} ({after.sampling}), answers from {before.length:.1f} to "
        f"{after.length:.1f} tokens, with {spent}; the run folder is {config.folder}"
    )
