"""Evaluation: k answers to each held-out problem, graded by the same verifier as training."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import fsspec
import numpy as np
import ray
from jaxtyping import Float

from treerpo_ray.actor import Actor
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config import Config
from treerpo_ray.engine import Sampling
from treerpo_ray.metrics import Row
from treerpo_ray.prompts import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.tree_stream import Scorer
from treerpo_ray.verifier import Verdict

NUM_RESAMPLES = 10_000
"""Bootstrap resamples behind an interval."""
GRADE_TREES = 32
"""Problems that are graded at a time, while the engines go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Result of one evaluation; a flat object in `eval/*.json`."""

    step: int
    version: int
    data: str
    num_problems: int
    num_samples: int
    temperature: float
    pass_at_1: float
    """Mean over problems of the share of correct answers; problems without a verdict are left out,
    here and below."""
    ci95_low: float
    """Bootstrap 95 % interval of `pass_at_1` over problems."""
    ci95_high: float
    pass_at_k: float
    """Share of problems with a correct answer among the k samples."""
    length: float
    """Mean tokens of an answer."""
    cut_off_share: float
    errored_share: float
    """Answers without a verdict (errored or timed out); they count as neither right nor wrong."""
    num_sampled_tokens: int
    seconds: float

    def row(self) -> Row:
        """Its row in `metrics.jsonl`."""
        return {
            "step": self.step,
            "eval/pass_at_1": self.pass_at_1,
            "eval/ci95_low": self.ci95_low,
            "eval/ci95_high": self.ci95_high,
            "eval/length": self.length,
        }


def evaluate(
    config: Config,
    prompts: PromptSet,
    pool: Actor,
    run_log: Actor,
    scorer: Scorer,
    *,
    step: int,
    version: int,
    advance: Callable[[int], None],
) -> Evaluation:
    """Sample, grade and summarise, into the run folder; engines must serve `version` already.

    Args:
        config: The run's configuration.
        prompts: The held-out problems.
        pool: Actor of `EnginePool`.
        run_log: Actor of `RunLog`.
        scorer: Grades the answers.
        step: Learner steps done.
        version: Version of the weights that is evaluated.
        advance: Told how many more problems are done.
    """
    start = time.monotonic()
    settings = config.evaluate
    shape = TreeShape(
        num_children=(settings.num_samples,), step_tokens=(config.shape.max_answer_tokens,)
    )
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p)
    trees = pool.evaluate.options(num_returns="streaming").remote(
        prompts, shape, sampling, config.run.seed
    )
    records: list[TreeRecord] = []
    waiting: list[TreeRecord] = []
    for tree in trees:
        waiting.append(ray.get(tree))
        advance(1)
        if len(waiting) == GRADE_TREES:
            records += scorer.score(waiting)
            waiting = []
    records += scorer.score(waiting)
    result = summarise(config, records, step, version, time.monotonic() - start)
    save(result, config.folder)
    ray.get(run_log.step.remote(result.row()))
    return result


def summarise(
    config: Config, records: list[TreeRecord], step: int, version: int, seconds: float
) -> Evaluation:
    """Statistics of graded depth-1 trees.

    Raises:
        RuntimeError: not one answer has a verdict.
    """
    settings = config.evaluate
    shares = np.array([_correct_share(record) for record in records])
    shares = shares[~np.isnan(shares)]
    if not len(shares):
        raise RuntimeError(f"evaluation: none of {len(records)} problems has a graded answer")
    low, high = bootstrap_interval(shares, seed=config.run.seed)
    verdicts = [verdict for record in records for verdict in record.verdicts]
    num_tokens = sum(record.tree.num_sampled_tokens for record in records)
    return Evaluation(
        step=step,
        version=version,
        data=settings.data.path,
        num_problems=len(records),
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        pass_at_1=float(shares.mean()),
        ci95_low=low,
        ci95_high=high,
        pass_at_k=float((shares > 0).mean()),
        length=num_tokens / len(verdicts),
        cut_off_share=verdicts.count(Verdict.CUT_OFF) / len(verdicts),
        errored_share=sum(not verdict.is_reward for verdict in verdicts) / len(verdicts),
        num_sampled_tokens=num_tokens,
        seconds=seconds,
    )


def bootstrap_interval(values: Float[np.ndarray, " problems"], *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, resampled by problem."""
    levels, counts = np.unique(values, return_counts=True)  # a few: shares of k answers
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(len(values), counts / len(values), NUM_RESAMPLES)
    means = resampled @ levels / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def save(evaluation: Evaluation, folder: str) -> None:
    """Write an evaluation into the run folder."""
    fs, root = fsspec.core.url_to_fs(folder)
    fs.makedirs(f"{root}/eval", exist_ok=True)
    text = json.dumps(asdict(evaluation), indent=1)
    fs.pipe_file(f"{root}/eval/step={evaluation.step:06d}.json", text.encode())


def read(folder: str, step: int) -> Evaluation | None:
    """The evaluation at `step` that the run folder holds, if there is one."""
    fs, root = fsspec.core.url_to_fs(folder)
    path = f"{root}/eval/step={step:06d}.json"
    return Evaluation(**json.loads(fs.cat_file(path))) if fs.exists(path) else None


def _correct_share(record: TreeRecord) -> float:
    """Share of correct answers among those with a verdict; NaN if none has one."""
    graded = [verdict for verdict in record.verdicts if verdict.is_reward]
    return float(np.mean([v is Verdict.CORRECT for v in graded])) if graded else float("nan")
