"""Tree stream: finished trees, scored, through Ray Data to the learner's workers.

One endless data set for the whole run: its read task pulls whatever trees are finished, scores
them as they come and yields them in batches, which Ray Train splits over its workers. A worker's
batch is one row: the whole trees that it consumes in one learner step. So a worker fetches once a
step, and no further stage adds the tenths of a second that Ray Data takes from one to the next.
Blocks are cut per row, nothing is prefetched and rows are not held back for locality, so that a
batch that is admitted always arrives (see `gate`).
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from treerpo_ray.algo.advantages.forms import step_advantages
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.shares import step_shares
from treerpo_ray.config import Config
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.errors import NodeDiffers
from treerpo_ray.metrics.events import Event, RunLogApi, check_failed, run_ends
from treerpo_ray.metrics.watchdog import Heartbeat
from treerpo_ray.prompts.prompt_set import load_tokenizer
from treerpo_ray.records import SCHEMA, TreeRecord, from_table, to_table
from treerpo_ray.scoring import Scorer, VerifierFailing, with_noise
from treerpo_ray.task import RunActors
from treerpo_ray.verifier.verifier import VariableNotSet

log = logging.getLogger(__name__)

TREES = "trees"
"""Column of a batch."""
WAIT_S = 10.0
"""Time after which the reader asks anew, and says that it waits."""
SCORED_TREES = 16
"""Most trees scored at a time: more make fewer calls, fewer are scored sooner."""
TOLD_S = 1.5
"""Processes tell Ray of tasks that have ended once a second; of one that is ended before, the last
task is shown as failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBatch:
    """A worker's trees of one learner step; times are Unix times in seconds."""

    records: list[TreeRecord]
    table: pa.Table
    """The same, as they came."""
    asked_at: float
    arrived_at: float

    def check(self, tickets: range, num_workers: int) -> None:
        """Invariant: a step consumes its own tickets, each once, and a worker an equal share.

        Args:
            tickets: Those of the step.
            num_workers: Workers of the group.

        Raises:
            RuntimeError: this is another batch.
        """
        own = [record.ticket for record in self.records]
        if not len(own) == len(set(own) & set(tickets)) == len(tickets) // num_workers:
            raise RuntimeError(f"tickets {own} are no worker batch of a learner step of {tickets}")


class Prefetcher:
    """A worker's batches, the next of which is fetched while it trains on the one before.

    Ray Data deals batches out by count, not by who asks first, so that asking early takes nothing
    from another worker; what may be in flight at all is the gate's to say. Ray's own prefetch
    would hold a batch back until the next one has come, which at staleness 0 is never.
    """

    def __init__(self, shard: ray.data.DataIterator) -> None:
        batches = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
        self._batches: Iterator[pa.Table] = iter(batches)
        self._ask()

    def take(self) -> WorkerBatch:
        """The next batch, waiting for it.

        Raises:
            RuntimeError: the stream has ended.
        """
        asked_at = time.time()
        batch = self._asked.result()
        if batch is None:
            raise RuntimeError("the stream of trees has ended")
        self._ask()
        arrived_at, table = time.time(), from_worker_batch(batch)
        return WorkerBatch(
            records=from_table(table), table=table, asked_at=asked_at, arrived_at=arrived_at
        )

    def await_end(self, limit_s: float) -> None:
        """Wait until the stream that was told to end has done so, for so long at most, and Ray has
        been told."""
        with suppress(Exception):  # it is not told any more
            self._asked.result(limit_s)
            time.sleep(TOLD_S)

    def _ask(self) -> None:
        self._asked: Future[pa.Table | None] = Future()
        # A daemon: behind the last step it waits for a batch that never comes.
        threading.Thread(target=self._fetch, args=(self._asked,), daemon=True).start()

    def _fetch(self, asked: "Future[pa.Table | None]") -> None:
        try:
            asked.set_result(next(self._batches, None))
        except BaseException as error:  # raised again in `take`
            asked.set_exception(error)


class WorkerBatches:
    """Puts trees together to the batches of workers, in the order of the learner steps.

    Batches of a step are made once all its trees are there, so that all workers have about as much
    to train. That costs no time: whoever began before would wait for the last one's gradients. A
    redrawn tree may come after trees of the next step: those are held until its own is complete.

    Args:
        trees_per_step: Trees that a learner step consumes.
        size: Trees of a worker's batch.
        first: A ticket of the learner step that is due first.
        learner: Decides what is trained, and in how many minibatches.
    """

    def __init__(
        self, *, trees_per_step: int, size: int, first: int, learner: LearnerConfig
    ) -> None:
        self.trees_per_step, self.size, self.learner = trees_per_step, size, learner
        self.due = first // self.trees_per_step
        self.held: dict[int, list[TreeRecord]] = {}

    def add(self, tree: TreeRecord) -> None:
        """Hold a tree for its learner step."""
        self.held.setdefault(tree.ticket // self.trees_per_step, []).append(tree)

    def complete(self) -> Iterator[list[TreeRecord]]:
        """Give out the batches of the steps that are due and complete."""
        while len(self.held.get(self.due, [])) == self.trees_per_step:
            # By ticket, as the learner cuts its minibatches.
            trees = sorted(self.held.pop(self.due), key=lambda tree: tree.ticket)
            self.due += 1
            sizes = [trained_tokens(tree, self.learner) for tree in trees]
            num_workers = self.trees_per_step // self.size
            for share in step_shares(sizes, num_workers, self.learner.minibatches):
                yield [trees[place] for place in share]


def has_signal(record: TreeRecord, learner: LearnerConfig) -> bool:
    """Whether the learner would train on any step of a scored tree."""
    return bool(_is_trained(record, learner).any())


def trained_tokens(record: TreeRecord, learner: LearnerConfig) -> int:
    """Tokens of a scored tree that the learner would train on."""
    return int(record.tree.lengths[_is_trained(record, learner)].sum())


def _is_trained(record: TreeRecord, learner: LearnerConfig) -> np.ndarray:
    """Of each step."""
    advantages = step_advantages(
        record.tree,
        mean_backup(record.tree, record.rewards),
        form=learner.form,
        pruning=learner.pruning,
    )
    return ~np.isnan(advantages)


def to_worker_batch(trees: Sequence[TreeRecord]) -> pa.Table:
    """Table of one row that holds all `trees`."""
    rows = to_table(trees).to_struct_array().combine_chunks()
    return pa.table({TREES: pa.ListArray.from_arrays([0, len(rows)], rows)})


def from_worker_batch(batch: pa.Table) -> pa.Table:
    """Table with one row a tree, as `to_table` makes it."""
    chunks = batch.column(TREES).chunks  # not put together, which would copy them
    rows = [pa.RecordBatch.from_struct_array(chunk.flatten()) for chunk in chunks]
    return pa.Table.from_batches(rows).replace_schema_metadata(SCHEMA.metadata)


def tree_stream(
    config: Config, actors: RunActors, check_node: Callable[[], None]
) -> Callable[[], ray.data.Dataset]:
    """A callable that makes the data set of batches; each call is a stream of its own, read where
    `check_node` raises nothing."""

    def make() -> ray.data.Dataset:
        resources = dict(config.verifier.resources)
        # Where there is room: on the node of the driver, not on one that may be taken away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        stream = ray.data.read_datasource(
            ScoredTrees(
                read=partial(
                    worker_batches,
                    config,
                    actors=actors,
                    reader=uuid.uuid4().hex,
                    check_node=check_node,
                )
            ),
            override_num_blocks=1,
            num_cpus=resources.pop("CPU", 0),
            resources=resources,  # what the CPUs left
            # Ray would run a lost task again and drop as many batches as had come out before,
            # although they would be other trees: better the workers start anew and say so.
            ray_remote_args={"max_retries": 0, "scheduling_strategy": here},
        )
        stream.set_name(f"scored trees of {config.run.name}")
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
    """The scored trees of a run, as Ray Data reads them: by one task, without end.

    Args:
        read: Gives out the batches, in the process of the task.
    """

    def __init__(self, *, read: Callable[[], Iterator[pa.Table]]) -> None:
        super().__init__()
        self._read = read

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: ray.data.DataContext | None = None,
    ) -> list[ReadTask]:
        """One task, whatever `parallelism`: there is one queue of finished trees."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, unknown)]

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known."""
        return None


def worker_batches(
    config: Config,
    *,
    actors: RunActors,
    reader: str,
    check_node: Callable[[], None],
) -> Iterator[pa.Table]:
    """Take finished trees from the pool, score them and give them out, until the stream is ended.

    Args:
        config: Of the run.
        actors: Those of the run; the run log is told of a verifier that starts or fails.
        reader: Name of this stream; the pool serves the newest alone.
        check_node: Raises NodeDiffers where the node has other versions than the run.

    Raises:
        NodeDiffers, VariableNotSet, VerifierFailing: the node differs, the verifier cannot start or
            fails too often; the run log is told that the run ends of it.
    """
    heartbeat = Heartbeat(
        heartbeats=actors.heartbeats,
        stage="scoring",
        folder=config.folder,
        limit_s=config.run.stall_timeout_s,
    )
    heartbeat.at("starting the verifier")
    pool = actors.pool
    batches: WorkerBatches | None = None
    with ExitStack() as ending:
        ending.enter_context(_failures_told(actors))
        check_node()
        scorer = ending.enter_context(closing(_start_scorer(config, actors.run_log)))
        heartbeat.at("waiting for finished trees", is_busy=False)
        while True:
            trees = actors.get(pool.take.remote(reader, SCORED_TREES, WAIT_S))
            if trees is None:
                heartbeat.close()
                return
            if not trees:  # to ask again is not to move: all may wait for each other
                log.info("waiting for finished trees")
                continue
            if batches is None:
                batches = WorkerBatches(
                    trees_per_step=config.gate.trees_per_step,
                    size=actors.get(pool.worker_batch_size.remote()),
                    first=trees[0].ticket,
                    learner=config.learner,
                )
            heartbeat.at(f"scoring tickets {[tree.ticket for tree in trees]}")
            for graded in scorer.score(trees):
                tree = with_noise(graded, config.verifier, config.run.seed)
                if _is_redrawn(tree, config):
                    actors.get(pool.redraw.remote(reader, tree))
                else:
                    batches.add(tree)
            heartbeat.at("handing trees on", is_busy=False)
            yield from map(to_worker_batch, batches.complete())
            heartbeat.at("waiting for finished trees", is_busy=False)


def _start_scorer(config: Config, run_log: RunLogApi) -> Scorer:
    """What grades the answers, and tells the run log of its processes and their faults."""

    def on_start(pid: int) -> None:
        run_log.event.remote(Event(kind="verifier_started", fields={"pid": pid}))

    def on_fault(reason: str) -> None:
        run_log.event.remote(check_failed(reason))

    return Scorer(
        settings=config.verifier,
        tokenizer=load_tokenizer(config.model.path, config.model.trust_remote_code),
        on_start=on_start,
        on_fault=on_fault,
    )


@contextmanager
def _failures_told(actors: RunActors) -> Iterator[None]:
    """Tell the run log that the run ends of what workers that start anew would only run into
    again."""
    try:
        yield
    except (NodeDiffers, VariableNotSet, VerifierFailing) as error:
        actors.get(actors.run_log.event.remote(run_ends(error)))
        raise


def _is_redrawn(tree: TreeRecord, config: Config) -> bool:
    return tree.num_redraws < config.gate.max_redraws and not has_signal(tree, config.learner)
