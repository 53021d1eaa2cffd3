"""Tree stream: finished trees, scored, through Ray Data to the learner's workers.

One endless data set for the whole run: its read task pulls whatever trees are finished, scores
them as they come and yields them in shares, which Ray Train splits over its workers. A share is
one row: the whole trees that one worker consumes in one learner step. So a worker fetches once a
step, and no further stage adds the tenths of a second that Ray Data takes from one to the next.
Blocks are cut per row, nothing is prefetched and rows are not held back for locality, so that a
batch that is admitted always arrives (see `gate`).
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from treerpo_ray.actor import Actor
from treerpo_ray.algo.tree import StopReason
from treerpo_ray.config import Config
from treerpo_ray.error_share import ErrorShare, VerifierFailing
from treerpo_ray.metrics import FATAL, Event
from treerpo_ray.prompts import load_tokenizer
from treerpo_ray.records import TreeRecord
from treerpo_ray.reward_noise import add_noise
from treerpo_ray.shares import Shares, has_signal, to_share
from treerpo_ray.verifier import Answer, Verdict, Verifier
from treerpo_ray.watchdog import Mover

if TYPE_CHECKING:  # Ray's own actors of a data set import this, too
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WAIT_S = 10.0
"""Time after which the reader asks anew, and says that it waits."""
SCORED_TREES = 16
"""Most trees scored at a time: more make fewer calls, fewer are scored sooner."""


def tree_stream(
    config: Config, pool: Actor, run_log: Actor, watch: Actor
) -> Callable[[], ray.data.Dataset]:
    """A callable that makes the data set of shares; each call is a stream of its own."""

    def make() -> ray.data.Dataset:
        resources = dict(config.verifier.resources)
        # Where there is room: on the node of the driver, not on one that may be taken away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        stream = ray.data.read_datasource(
            ScoredTrees(config, pool, run_log, watch, uuid.uuid4().hex),
            override_num_blocks=1,
            num_cpus=resources.pop("CPU", 0),
            resources=resources,  # what the CPUs left
            # Ray would run a lost task again and drop as many shares as had come out before,
            # although they would be other trees: better the workers start anew and say so.
            ray_remote_args={"max_retries": 0, "scheduling_strategy": here},
        )
        # Ray Train calls this in its own process, where settings made elsewhere are not known.
        stream.context.target_max_block_size = 1
        stream.context.execution_options.verbose_progress = False
        stream.context.enable_progress_bars = False
        stream.context.execution_options.preserve_order = False
        # A long evaluation or a slow batch is no fault; hung engines are found by the pool.
        stream.context.execution_no_progress_timeout_s = -1
        return stream

    return make


class ScoredTrees(Datasource):
    """Reads finished trees from the engine pool, without end, and scores them."""

    def __init__(
        self, config: Config, pool: Actor, run_log: Actor, watch: Actor, reader: str
    ) -> None:
        super().__init__()
        self.config, self.pool, self.reader = config, pool, reader
        self.run_log, self.watch = run_log, watch

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: ray.data.DataContext | None = None,
    ) -> list[ReadTask]:
        """One task, whatever `parallelism`: there is one queue of finished trees."""
        arguments = (self.config, self.pool, self.run_log, self.watch, self.reader)
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: _shares(*arguments), unknown)]

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known."""
        return None


def _shares(
    config: Config, pool: Actor, run_log: Actor, watch: Actor, reader: str
) -> Iterator[pa.Table]:
    def on_start(pid: int) -> None:
        run_log.event.remote(Event(kind="verifier_started", fields={"pid": pid}))

    mover = Mover(watch, "scoring", config.folder, config.run.stall_timeout_s)
    mover.at("starting the verifier")
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    shares: Shares | None = None
    with closing(Scorer(config, tokenizer, on_start)) as scorer:
        while True:
            mover.at("waiting for finished trees", is_busy=False)
            trees: list[TreeRecord] | None = ray.get(pool.take.remote(reader, SCORED_TREES, WAIT_S))
            if trees is None:
                mover.close()
                return
            if not trees:
                log.info("waiting for finished trees")
                continue
            if shares is None:
                size: int = ray.get(pool.share_size.remote())
                shares = Shares(config, size=size, first=trees[0].ticket)
            mover.at(f"scoring tickets {[tree.ticket for tree in trees]}")
            try:
                scored = scorer.score(trees)
            except VerifierFailing as error:  # workers that start anew would only run into it again
                event = Event(kind=FATAL, fields={"reason": str(error)})
                ray.get(run_log.event.remote(event))
                raise
            for tree in scored:
                noisy = _noisy(tree, config)
                if noisy.num_redraws < config.gate.max_redraws and not has_signal(noisy, config):
                    ray.get(pool.redraw.remote(reader, noisy))
                else:
                    shares.add(noisy)
            mover.at("handing trees on", is_busy=False)
            yield from map(to_share, shares.complete())


def _noisy(tree: TreeRecord, config: Config) -> TreeRecord:
    verifier = config.verifier
    if not verifier.false_positive_rate and not verifier.false_negative_rate:
        return tree
    return add_noise(
        tree,
        false_positive_rate=verifier.false_positive_rate,
        false_negative_rate=verifier.false_negative_rate,
        seed=config.run.seed,
    )


class Scorer:
    """Gives every leaf of a tree its text and its verdict."""

    def __init__(
        self,
        config: Config,
        tokenizer: "PreTrainedTokenizerBase",
        on_start: Callable[[int], None] = lambda pid: None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.verifier = Verifier(
            check=config.verifier.check,
            num_workers=config.verifier.num_workers,
            timeout_s=config.verifier.timeout_s,
            memory_mib=config.verifier.memory_mib,
            on_start=on_start,
        )
        self.verifier.self_test()
        self.error_share = ErrorShare(config.verifier.max_error_share)

    def score(self, records: list[TreeRecord]) -> list[TreeRecord]:
        """The same trees with texts and verdicts; all leaves are graded in one go.

        Raises:
            VerifierFailing: more answers than `verifier.max_error_share` got no verdict.
        """
        texts = [self._leaf_texts(record) for record in records]
        answers = [
            Answer(
                text=text,
                references=record.answers,
                is_cut_off=record.tree.steps[leaf].stop is StopReason.BOUNDARY,
            )
            for record, leaf_texts in zip(records, texts, strict=True)
            for leaf, text in zip(record.tree.leaves, leaf_texts, strict=True)
        ]
        graded = self.verifier.grade(answers)
        questions = [record.question for record in records for _ in record.tree.leaves]
        for question, answer, verdict in zip(questions, answers, graded, strict=True):
            self.error_share.add(question, answer, verdict)
        verdicts = iter(graded)
        now = time.time()
        return [
            replace(
                record,
                leaf_texts=leaf_texts,
                verdicts=tuple(
                    self._verdict(record, leaf, next(verdicts)) for leaf in record.tree.leaves
                ),
                scored_at_s=now,
            )
            for record, leaf_texts in zip(records, texts, strict=True)
        ]

    def group(self, records: list[TreeRecord]) -> list[list[int] | None]:
        """Which leaves of each scored tree have equal answers; see `Verifier.group`."""
        return self.verifier.group(
            [
                [
                    Answer(
                        text=text,
                        references=(),
                        is_cut_off=record.tree.steps[leaf].stop is StopReason.BOUNDARY,
                    )
                    for leaf, text in zip(record.tree.leaves, record.leaf_texts, strict=True)
                ]
                for record in records
            ]
        )

    def _leaf_texts(self, record: TreeRecord) -> tuple[str, ...]:
        tree = record.tree
        ids = [tree.path_token_ids(leaf) for leaf in tree.leaves]
        return tuple(self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    @staticmethod
    def _verdict(record: TreeRecord, leaf: int, verdict: Verdict) -> Verdict:
        """An answer that the engine broke off has no verdict of its own."""
        is_error = record.tree.steps[leaf].stop is StopReason.ERROR
        return Verdict.ERRORED if is_error else verdict

    def close(self) -> None:
        """End the verifier's processes."""
        self.verifier.close()
