"""Grading: k answers to each held-out problem, graded by the same verifier as training."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config import Config
from treerpo_ray.config.data import DataConfig
from treerpo_ray.engine.types import Sampling
from treerpo_ray.evaluate.evaluation import (
    Evaluation,
    Graded,
    save_evaluation,
    save_samples,
    step_name,
)
from treerpo_ray.evaluate.scores import powers_of_two, scores
from treerpo_ray.metrics.events import check_failed, run_ends
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.writer import BackgroundWriter
from treerpo_ray.scoring import Scorer, StartScorer
from treerpo_ray.task import RunActors, TreePoolApi
from treerpo_ray.verifier.verifier import VariableNotSet

if TYPE_CHECKING:
    import ray
    from transformers import PreTrainedTokenizerBase

GRADE_TREES = 32
"""Problems that are graded at a time, while the engines go on."""


class HeldOutEvaluator:
    """Evaluates a run on its held-out problems, into its run folder.

    It holds one verifier until it is closed: a start takes time in which all wait, and asks a paid
    judge again.

    Args:
        config: The run's configuration.
        prompts: The held-out problems.
        actors: Those of the run.
        tokenizer: Of the model.
        start_scorer: Starts what grades the answers.

    Raises:
        VariableNotSet: `verifier.env` names a variable that is not set here; the run log is told
            that the run ends of it, since workers that start anew would only run into it again.
    """

    def __init__(
        self,
        *,
        config: Config,
        prompts: PromptSet,
        actors: RunActors,
        tokenizer: "PreTrainedTokenizerBase",
        start_scorer: StartScorer = Scorer,
    ) -> None:
        self.config, self.prompts, self.actors = config, prompts, actors
        self.folder = RunFolder(config.folder)
        try:
            self._scorer = start_scorer(
                settings=config.verifier, tokenizer=tokenizer, on_fault=self._check_failed
            )
        except VariableNotSet as error:
            actors.get(actors.run_log.event.remote(run_ends(error)))
            raise

    def evaluate(
        self, *, step: int, version: int, advance: Callable[[int], None], writer: BackgroundWriter
    ) -> Evaluation:
        """Evaluate what the engines serve.

        The metrics have the result even where its files cannot be written.

        Args:
            step: Learner steps done.
            version: Version of the weights, which engines must serve already.
            advance: Told how many more problems are done.
            writer: Writes the files, and tells of those that cannot be written.
        """
        config, start = self.config, time.monotonic()
        trees = map(self.actors.get, sampled_trees(config, self.prompts, self.actors.pool))
        graded = grade_trees(trees, self._scorer, advance)
        result = summarise(
            config,
            graded,
            data=config.evaluate.data,
            model=config.model.path,
            step=step,
            version=version,
            seconds=time.monotonic() - start,
        )
        name = step_name(step)
        writer.put(f"eval/{name}.parquet", lambda: save_samples(graded, self.folder, name))
        writer.put(f"eval/{name}.json", lambda: save_evaluation(result, self.folder))
        self.actors.get(self.actors.run_log.step.remote(result.row()))
        return result

    def close(self) -> None:
        """End the verifier."""
        self._scorer.close()

    def _check_failed(self, reason: str) -> None:
        self.actors.run_log.event.remote(check_failed(reason))


def sampled_trees(
    config: Config, prompts: PromptSet, pool: TreePoolApi
) -> "Iterator[ray.ObjectRef[TreeRecord]]":
    """Have the pool sample `evaluate.num_samples` answers to each problem; a tree of leaves each,
    as they are finished."""
    settings = config.evaluate
    shape = TreeShape(
        num_children=(settings.num_samples,), step_tokens=(config.max_evaluated_tokens,)
    )
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p)
    return pool.evaluate.options(num_returns="streaming").remote(
        prompts, shape, sampling, config.run.seed
    )


def grade_trees(
    trees: Iterable[TreeRecord], scorer: Scorer, advance: Callable[[int], None]
) -> list[Graded]:
    """Grade answers while further ones are sampled; the result is in order of problems.

    Args:
        trees: The answers to a problem each.
        scorer: Grades the answers.
        advance: Told how many more problems are done.
    """
    graded: list[Graded] = []
    waiting: list[TreeRecord] = []

    def grade() -> None:
        records = scorer.score(waiting)
        pairs = zip(records, scorer.group(records), strict=True)
        graded.extend(Graded(record=record, group=group) for record, group in pairs)
        waiting.clear()

    for tree in trees:
        waiting.append(tree)
        advance(1)
        if len(waiting) == GRADE_TREES:
            grade()
    grade()
    return sorted(graded, key=lambda each: each.record.ticket)


def summarise(
    config: Config,
    graded: Sequence[Graded],
    *,
    data: DataConfig,
    model: str,
    step: int,
    version: int,
    seconds: float,
) -> Evaluation:
    """Statistics of graded samples of `model`, of problems that `data` describes.

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
        verifier=config.verifier.identity,
        system_prompt=data.system_prompt or "",
        prompt_template=data.prompt_template or "",
        chat_template_args=dict(data.chat_template_args),
        stop=list(config.model.stop),
        model=model,
        seed=config.run.seed,
        pass_at_1=found["pass@1"].value,
        ci95_low=found["pass@1"].low,
        ci95_high=found["pass@1"].high,
        pass_at_k=None if all_passed is None else all_passed.value,
        reward=found["reward"].value if "reward" in found else None,
        length=found["length"].value,
        cut_off_share=found["cut_off"].value,
        errored_share=sum(not verdict.is_reward for verdict in verdicts) / len(verdicts),
        num_sampled_tokens=sum(each.record.tree.num_sampled_tokens for each in graded),
        seconds=seconds,
        scores=found,
    )
