"""Evaluation: k answers to each held-out problem, graded by the same verifier as training.

An evaluation leaves two files: NAME.json with the scores and NAME.parquet with every sample.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import ray

from treerpo_ray.algo.search import TreeShape
from treerpo_ray.algo.tree import StopReason
from treerpo_ray.config import Config
from treerpo_ray.config.files import with_moved_modules
from treerpo_ray.config.sections import PromptsConfig
from treerpo_ray.engine.types import Sampling
from treerpo_ray.evaluate.scores import Samples, Score, powers_of_two, scores
from treerpo_ray.metrics.run_log import Row, RunLogApi, write_failed
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.files import publish_file, publish_table
from treerpo_ray.run_folder.writer import Outbox
from treerpo_ray.scoring import Scorer
from treerpo_ray.task import TreePoolApi

log = logging.getLogger(__name__)


GRADE_TREES = 32
"""Problems that are graded at a time, while the engines go on."""


SAMPLES = pa.schema(
    [
        ("problem", pa.string()),
        ("question", pa.string()),
        ("references", pa.list_(pa.string())),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("verdict", pa.string()),
        ("num_tokens", pa.int32()),
        ("is_cut_off", pa.bool_()),
        ("group", pa.int32()),
    ]
)
"""A row a sample; `group` numbers the equal answers of a problem, -1 for none, null: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """A problem with its graded samples."""

    record: TreeRecord
    group: list[int] | None
    """As `Verifier.group` tells."""

    @property
    def samples(self) -> Samples:
        """What the scores are of."""
        steps = [self.record.tree.steps[leaf] for leaf in self.record.tree.leaves]
        verdicts = self.record.verdicts
        return Samples(
            is_correct=np.array([v.reward if v.is_reward else np.nan for v in verdicts]),
            length=np.array([len(step.token_ids) for step in steps]),
            is_cut_off=np.array([step.stop is StopReason.BOUNDARY for step in steps]),
            group=None if self.group is None else np.array(self.group),
        )


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
    pass_at_k: float | None
    """pass@k of `scores` with all k samples; None if no problem has k verdicts."""
    length: float
    """Mean tokens of an answer, as in `scores`."""
    cut_off_share: float
    """Share of answers that the length limit ended, with or without a result: `scores` too."""
    errored_share: float
    """Answers without a verdict (errored or timed out); they count as neither right nor wrong."""
    num_sampled_tokens: int
    seconds: float
    top_p: float = 1.0
    max_tokens: int | None = None
    """Most tokens of an answer; None in the file of a version that did not record it."""
    verifier: str | None = None
    """Module that graded the answers; None as above."""
    system_prompt: str | None = None
    """What stood before each question, empty if nothing did; None as above."""
    model: str | None = None
    """What was evaluated: `model.path` of a run, of a job `benchmarks.source_of`; None as above."""
    seed: int | None = None
    """`run.seed`, from which the samples follow; None as above."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Every statistic with its interval, by name: pass@k, maj@k, length, median_length, cut_off."""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Evaluation":
        """The inverse of `asdict`, from what JSON made of it."""
        fields = with_moved_modules(fields)
        found = {name: Score(**score) for name, score in fields.get("scores", {}).items()}
        return cls(**fields | {"scores": found})

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
    pool: TreePoolApi,
    run_log: RunLogApi,
    scorer: Scorer,
    *,
    step: int,
    version: int,
    advance: Callable[[int], None],
    outbox: Outbox | None = None,
) -> Evaluation:
    """Evaluate during training, into the run folder; engines must serve `version` already.

    Files that cannot be written are told as events `write_failed`; the metrics have the result.

    Args:
        config: The run's configuration.
        prompts: The held-out problems.
        pool: Actor of `TreePool`.
        run_log: Actor of `RunLog`.
        scorer: Grades the answers.
        step: Learner steps done.
        version: Version of the weights that is evaluated.
        advance: Told how many more problems are done.
        outbox: Writes the files when it can; without it they get a limited time.
    """
    start = time.monotonic()
    graded = grade_samples(config, prompts, pool, scorer, advance)
    data, seconds = config.evaluate.data, time.monotonic() - start
    result = summarise(config, graded, data=data, step=step, version=version, seconds=seconds)
    box = outbox or Outbox(lambda *why: run_log.event.remote(write_failed(*why)))
    name = step_name(step)
    box.put(f"eval/{name}.parquet", lambda: save_samples(graded, config.folder, name))
    box.put(f"eval/{name}.json", lambda: save(result, config.folder))
    if outbox is None:
        box.close()
    ray.get(run_log.step.remote(result.row()))
    return result


def grade_samples(
    config: Config,
    prompts: PromptSet,
    pool: TreePoolApi,
    scorer: Scorer,
    advance: Callable[[int], None],
) -> list[Graded]:
    """Sample `evaluate.num_samples` answers to each problem and grade them, in order of problems.

    The arguments are those of `evaluate`.
    """
    settings = config.evaluate
    shape = TreeShape(
        num_children=(settings.num_samples,), step_tokens=(config.max_evaluated_tokens,)
    )
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p)
    trees = pool.evaluate.options(num_returns="streaming").remote(
        prompts, shape, sampling, config.run.seed
    )
    graded: list[Graded] = []
    waiting: list[TreeRecord] = []

    def grade() -> None:
        records = scorer.score(waiting)
        pairs = zip(records, scorer.group(records), strict=True)
        graded.extend(Graded(record=record, group=group) for record, group in pairs)
        waiting.clear()

    for tree in trees:
        waiting.append(ray.get(tree))
        advance(1)
        if len(waiting) == GRADE_TREES:
            grade()
    grade()
    return sorted(graded, key=lambda each: each.record.ticket)


def summarise(
    config: Config,
    graded: Sequence[Graded],
    *,
    data: PromptsConfig,
    step: int,
    version: int,
    seconds: float,
) -> Evaluation:
    """Statistics of graded samples, of problems that `data` describes.

    Raises:
        RuntimeError: not one answer has a verdict.
    """
    settings, most = config.evaluate, config.evaluate.num_samples
    found = scores(
        [each.samples for each in graded],
        pass_ks=sorted({*(settings.pass_ks or powers_of_two(most)), most}),
        num_samples=most,
        seed=config.run.seed,
    )
    if "pass@1" not in found:
        raise RuntimeError(f"evaluation: none of {len(graded)} problems has a graded answer")
    verdicts = [verdict for each in graded for verdict in each.record.verdicts]
    all_passed = found.get(f"pass@{most}")
    return Evaluation(
        step=step,
        version=version,
        data=data.path,
        num_problems=len(graded),
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=config.max_evaluated_tokens,
        verifier=config.verifier.check,
        system_prompt=data.system_prompt or "",
        model=config.model.path,
        seed=config.run.seed,
        pass_at_1=found["pass@1"].value,
        ci95_low=found["pass@1"].low,
        ci95_high=found["pass@1"].high,
        pass_at_k=None if all_passed is None else all_passed.value,
        length=found["length"].value,
        cut_off_share=found["cut_off"].value,
        errored_share=sum(not verdict.is_reward for verdict in verdicts) / len(verdicts),
        num_sampled_tokens=sum(each.record.tree.num_sampled_tokens for each in graded),
        seconds=seconds,
        scores=found,
    )


def step_name(step: int) -> str:
    """Name of the evaluation at a learner step."""
    return f"step={step:06d}"


def save(evaluation: Evaluation, folder: str, name: str | None = None) -> None:
    """Write an evaluation into `folder`/eval; it is named by its step if no name is given."""
    text = json.dumps(asdict(evaluation), indent=1)
    publish_file(folder, f"eval/{name or step_name(evaluation.step)}.json", text.encode())


def save_samples(graded: Sequence[Graded], folder: str, name: str) -> None:
    """Write the samples beside the evaluation of that name, as SAMPLES says."""
    rows = []
    for each in graded:
        record, samples = each.record, each.samples
        for number, (text, verdict) in enumerate(
            zip(record.leaf_texts, record.verdicts, strict=True)
        ):
            rows.append(
                {
                    "problem": record.prompt_id,
                    "question": record.question,
                    "references": list(record.answers),
                    "sample": number,
                    "text": text,
                    "verdict": verdict.value,
                    "num_tokens": int(samples.length[number]),
                    "is_cut_off": bool(samples.is_cut_off[number]),
                    "group": None if each.group is None else each.group[number],
                }
            )
    publish_table(folder, f"eval/{name}.parquet", pa.Table.from_pylist(rows, schema=SAMPLES))


def read(folder: str, step: int) -> Evaluation | None:
    """The evaluation at `step` that the run folder holds, if there is one that can be read."""
    fs, root = fsspec.core.url_to_fs(folder)
    path = f"{root}/eval/{step_name(step)}.json"
    if not fs.exists(path):
        return None
    try:
        return Evaluation.from_fields(json.loads(fs.cat_file(path)))
    except (ValueError, TypeError, AttributeError) as error:  # torn, or of another version
        log.warning("%s cannot be read and is passed over: %s", path, error)
        return None
