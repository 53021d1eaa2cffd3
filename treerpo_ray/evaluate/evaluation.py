"""Evaluation: its result, its graded samples, and the files that they are kept in.

An evaluation leaves two files: NAME.json with the scores and NAME.parquet with every sample.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from treerpo_ray.algo.tree import StopReason
from treerpo_ray.config.files import with_moved_modules
from treerpo_ray.config.sections import EvaluateConfig
from treerpo_ray.evaluate.scores import Samples, Score
from treerpo_ray.metrics.rows import Row
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Verdict

log = logging.getLogger(__name__)

SAMPLES = pa.schema(
    [
        ("problem", pa.string()),
        ("question", pa.string()),
        ("references", pa.list_(pa.string())),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("verdict", pa.string()),
        ("reward", pa.float64()),
        ("num_tokens", pa.int32()),
        ("is_cut_off", pa.bool_()),
        ("group", pa.int32()),
    ]
)
"""A row a sample; `group` numbers the equal answers of a problem, -1 for none, null: not known.
`reward` is null without a verdict."""


def is_correct(verdicts: Sequence[Verdict]) -> Float[np.ndarray, " samples"]:
    """1 for the whole reward, 0 for less, NaN for none."""
    return np.array([float(v is Verdict.CORRECT) if v.is_reward else np.nan for v in verdicts])


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
        rewards = self.record.leaf_rewards
        return Samples(
            is_correct=is_correct(self.record.verdicts),
            reward=np.array(rewards) if rewards else None,
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
    """Mean over problems of the share of correct answers, those with the whole reward; problems
    without a verdict are left out, here and below."""
    ci95_low: float
    """95 % interval of `pass_at_1` over problems, as in `scores`."""
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
    """Most tokens of an answer; None, here and below: it is not recorded."""
    verifier: str | None = None
    """What graded the answers: `VerifierConfig.identity`."""
    system_prompt: str | None = None
    """What stood before each question, empty if nothing did."""
    prompt_template: str = ""
    """What the question stood in, empty if it stood alone."""
    chat_template_args: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables that the chat template was given."""
    stop: list[str] = field(default_factory=list)
    """Texts that ended an answer besides the end token."""
    model: str | None = None
    """What was evaluated: `model.path` of a run, of a job `benchmarks.source_of`."""
    seed: int | None = None
    """`run.seed`, from which the samples follow."""
    reward: float | None = None
    """Mean reward, where answers have partial credit; None: it is `pass_at_1`."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Every statistic with its interval, by name: reward (as above), pass@k, maj@k, length,
    median_length, cut_off."""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Evaluation":
        """The inverse of `asdict`, from what JSON made of it."""
        fields = with_moved_modules(fields)
        found = {name: Score(**score) for name, score in fields.get("scores", {}).items()}
        return cls(**fields | {"scores": found})

    @property
    def mean_reward(self) -> float:
        """Mean reward, with partial credit or without."""
        return self.pass_at_1 if self.reward is None else self.reward

    @property
    def sampling(self) -> str:
        """How the answers were sampled, in words; no number of theirs means anything without."""
        answers = "1 answer" if self.num_samples == 1 else f"{self.num_samples} answers"
        return f"{answers} a problem, temperature {self.temperature:g}, top-p {self.top_p:g}"

    def is_of(self, settings: EvaluateConfig) -> bool:
        """Whether it has as many answers a problem as settings ask for: interim ones have fewer."""
        return self.num_samples == settings.num_samples

    @property
    def sampling_fields(self) -> dict[str, float]:
        """The same as numbers by name."""
        names = ("num_samples", "temperature", "top_p")
        return {name: getattr(self, name) for name in names}

    def row(self) -> Row:
        """Its row in `metrics.jsonl`."""
        return {
            "step": self.step,
            "eval/pass_at_1": self.pass_at_1,
            **({} if self.reward is None else {"eval/reward": self.reward}),
            "eval/ci95_low": self.ci95_low,
            "eval/ci95_high": self.ci95_high,
            "eval/length": self.length,
            "eval/num_problems": self.num_problems,
            **{f"eval/{name}": value for name, value in self.sampling_fields.items()},
        }


def step_name(step: int) -> str:
    """Name of the evaluation at a learner step."""
    return f"step={step:06d}"


def save_evaluation(evaluation: Evaluation, folder: RunFolder, name: str | None = None) -> None:
    """Write an evaluation into `eval/`; it is named by its step if no name is given."""
    text = json.dumps(asdict(evaluation), indent=1)
    folder.publish_file(f"eval/{name or step_name(evaluation.step)}.json", text.encode())


def save_samples(graded: Sequence[Graded], folder: RunFolder, name: str) -> None:
    """Write the samples beside the evaluation of that name, as SAMPLES says."""
    rows = []
    for each in graded:
        record, samples = each.record, each.samples
        rewards = record.rewards[list(record.tree.leaves)].tolist()
        for number, (text, verdict, reward) in enumerate(
            zip(record.leaf_texts, record.verdicts, rewards, strict=True)
        ):
            rows.append(
                {
                    "problem": record.prompt_id,
                    "question": record.question,
                    "references": list(record.answers),
                    "sample": number,
                    "text": text,
                    "verdict": verdict.value,
                    "reward": reward if verdict.is_reward else None,
                    "num_tokens": int(samples.length[number]),
                    "is_cut_off": bool(samples.is_cut_off[number]),
                    "group": None if each.group is None else each.group[number],
                }
            )
    folder.publish_table(f"eval/{name}.parquet", pa.Table.from_pylist(rows, schema=SAMPLES))


def read_evaluation(folder: RunFolder, step: int) -> Evaluation | None:
    """The evaluation at `step` that the run folder holds, if there is one that can be read."""
    file = f"eval/{step_name(step)}.json"
    if not folder.exists(file):
        return None
    try:
        return Evaluation.from_fields(json.loads(folder.read_bytes(file)))
    except (ValueError, TypeError, AttributeError) as error:  # torn, or of another version
        log.warning("%s/%s cannot be read and is passed over: %s", folder, file, error)
        return None
