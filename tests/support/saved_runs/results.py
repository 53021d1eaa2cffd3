"""Results of a comparison, as runs leave them."""

from dataclasses import replace

from treerpo_ray.evaluate.evaluation import Evaluation
from treerpo_ray.study.comparisons.comparison import CURVE, Result, Trial


def make_result(trial: Trial, pass_at_1: float, num_steps: int = 20) -> Result:
    """A run of 96,000 tokens whose training reward is 0.04 times the step of 2 CPU seconds."""
    evaluation = Evaluation(
        **dict.fromkeys(Evaluation.__dataclass_fields__, 0.0)
        | {"pass_at_1": pass_at_1, "length": 40.0, "scores": {}}
    )
    steps = [float(step) for step in range(1, num_steps + 1)]
    curve = {name: [2.0] * num_steps for name in CURVE}
    curve |= {"step": steps, "reward/mean": [0.04 * step for step in steps]}
    curve["tokens/sampled"] = [96000 / num_steps] * num_steps
    return Result(
        trial=trial,
        version="v",
        start="",
        config="",
        before=evaluation,
        after=evaluation,
        curve=curve,
    )


def curve_result(
    arm: str,
    rewards: list[float],
    *,
    seed: int = 0,
    shape: str = "[1]",
    more: str = "",
    lengths: list[float] | None = None,
) -> Result:
    """A run of 1,000 tokens a learner step with these training rewards, of trees of a shape; its
    answers have 40 tokens unless `lengths` says it step by step."""
    made = make_result(Trial(setting="short", arm=arm, seed=seed), rewards[-1], len(rewards))
    own = {
        "tokens/sampled": [1000.0] * len(rewards),
        "reward/mean": rewards,
        "length/mean": lengths or [40.0] * len(rewards),
    }
    config = f"tree:\n  num_children: {shape}\n{more}"
    return replace(made, curve=made.curve | own, config=config)
