"""Train: the loop of each train worker, from restored state to the last step.

    gate ──tickets──► engines ──trees──► scoring ─batches──► train worker ──weights──► engines
      ▲                                                           │ step consumed         │
      └───────────────────────────────────────────────────────────┴──── all serve it ◄────┘

Who waits for whom:
- A worker waits for its batch of the step's trees, then for the other workers (gradients, counts).
- The gate lets further tickets out once a step is consumed: its update is made and every engine has
  proved that it serves what came of it. That bounds the staleness of every tree.
- With `gate.max_staleness` 0 the worker waits for the engines at once, as there are no trees that
  it could train on. Else trees of the next step are on their way already, and it goes on with them
  while the engines load and prove; it waits before the next version is published, before an
  evaluation, and after the last step.
- Files, rows and checkpoints are written behind its back. A checkpoint is put in its place once the
  engines serve its version.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from treerpo_ray.actor import Get
from treerpo_ray.engine.types import EngineTotals
from treerpo_ray.evaluate.evaluation import read_evaluation
from treerpo_ray.evaluate.grading import HeldOutEvaluator
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.policy import DTYPES
from treerpo_ray.learner.publisher import Publisher
from treerpo_ray.learner.together import Together, once_a_machine
from treerpo_ray.learner.update_result import UpdateResult
from treerpo_ray.metrics.events import (
    Event,
    write_done,
    write_failed,
    write_waits,
)
from treerpo_ray.metrics.rows import Row, latest
from treerpo_ray.metrics.stage_status import IdleTimes
from treerpo_ray.metrics.watchdog import Heartbeat
from treerpo_ray.records import RootValue, TreeRecord, with_training
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.checkpoints import CheckpointContents, Checkpoints, CheckpointSaver
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.patience import Patience
from treerpo_ray.run_folder.writer import BackgroundWriter
from treerpo_ray.task import STREAM, GateState, WorkerTask
from treerpo_ray.tree_stream import Prefetcher, WorkerBatch

GATE_FILE = "gate.json"
"""State of the gate, in a checkpoint."""
IDLE = ("learner", "scoring")
"""Kinds of stages whose idle time a row has; engines count their own. A learner is idle while it
waits for trees, the scoring while it waits for trees or for a learner to take them."""
END_S = 60.0
"""Time for the stream of trees to end by itself; it is ended with the workers in any case."""
WRITE_S = 60.0
"""Time for a disk that takes what is written, before it is said that it does not."""


def train(task: WorkerTask) -> None:
    """One train worker: every learner step, from restored state to the last."""
    with restore(task) as worker:  # learner, engines and gate at the same step
        for step in worker.steps():
            batch = worker.next_batch(step)  # its part of this step's trees, scored
            update = worker.learner.update(batch.records, worker.progress)
            worker.keep(step, batch, update)
            if update.has_updated:
                worker.publish()  # every engine serves and proves the version
            worker.consume(step, update)  # then the gate lets the next tickets out
            worker.report(batch, update)
            worker.checkpoint_if_due()
            worker.evaluate_if_due()  # a stop that comes meanwhile is for this step
        worker.finish()


@contextmanager
def restore(task: WorkerTask) -> Iterator["TrainWorker"]:
    """This worker at the newest checkpoint; of the first one also the actors are brought there."""
    config, context = task.config, ray.train.get_context()
    rank = context.get_world_rank()
    heartbeat = Heartbeat(
        heartbeats=task.actors.heartbeats,
        stage=f"learner {rank}",
        folder=config.folder,
        limit_s=config.run.stall_timeout_s,
    )
    heartbeat.at("restoring its state")
    checkpoints = Checkpoints(RunFolder(config.folder), config.checkpoint.keep)
    node = ray.get_runtime_context().get_node_id()
    with once_a_machine(checkpoints.newest, node) as found:
        step, checkpoint = found or (0, None)
        learner = Learner(
            model=config.model,
            learner=config.learner,
            loss=config.loss,
            tree=config.tree,
            max_staleness=config.gate.max_staleness,
            max_tokens=config.max_model_tokens,
            device=ray.train.torch.get_device(),
            sets=config.prompts.sets,
            lora=config.lora,
            checkpoint=checkpoint,
        )
        worker = TrainWorker(
            task=task,
            rank=rank,
            num_workers=context.get_world_size(),
            node=node,
            step=step,
            learner=learner,
            checkpoints=checkpoints,
            heartbeat=heartbeat,
        )
        if rank == 0:
            worker.open(checkpoint)
        else:
            worker.follow()
    worker.barrier()
    worker.batches = Prefetcher(ray.train.get_dataset_shard(STREAM))
    with worker.ending:
        yield worker
    heartbeat.close()


class TrainWorker:
    """One worker of the group; the first one also speaks for all to the other actors.

    Args:
        task: What every worker is given.
        rank: Its number; 0 is the first.
        num_workers: Workers of the group.
        node: Ray's id of the node that it is on.
        step: Learner steps done.
        learner: The learner after these steps.
        checkpoints: Of the run.
        heartbeat: Told what it does.
        get: Waits for what an actor answers.
    """

    def __init__(
        self,
        *,
        task: WorkerTask,
        rank: int,
        num_workers: int,
        node: str,
        step: int,
        learner: Learner,
        checkpoints: Checkpoints,
        heartbeat: Heartbeat,
        get: Get = ray.get,
    ) -> None:
        self._get = get
        self.config, self.actors, self.held_out = task.config, task.actors, task.held_out
        self.rank, self.num_workers, self.is_first = rank, num_workers, rank == 0
        self.step, self.learner, self.checkpoints = step, learner, checkpoints
        self.heartbeat = heartbeat
        self.together = Together(learner)
        self.folder = RunFolder(self.config.folder)
        self.ending = ExitStack()
        """Of what the worker has started."""
        self.batches: Prefetcher
        self.patience = Patience(
            folder=self.folder,
            waits=lambda what, reason: self._tell(write_waits(what, reason)),
            written=lambda what, seconds: self._tell(write_done(what, seconds)),
            is_told_to_stop=self._is_told_to_stop,
            moves=lambda what: self.heartbeat.at(what, is_busy=False),
        )
        self.publisher = Publisher(
            send=self.actors.weight_sync.publish.remote,
            node=node,
            probe_ids=task.probe_ids,
            dtype=DTYPES[self.config.model.dtype],
            chunk_bytes=self.config.sync.chunk_mib * 2**20,
            until_written=self.patience.until_written,
            get=get,
        )
        self.ending.callback(self.publisher.close)
        self.engines: EngineTotals
        self.idle: IdleTimes
        """Those at the last row."""
        self.consumed: Future[GateState]
        """State of the gate after the newest learner step, once it knows of it."""
        self.sampled_tokens = 0.0
        self.is_last = False
        self.trees_kept: int | None = None
        self.writer = BackgroundWriter(warn=self._warn, place=self.patience.place)
        self.saver = CheckpointSaver(
            checkpoints,
            every=self.config.checkpoint.every,
            step=step,
            warn=self._warn,
            patience=self.patience,
        )

    # The loop, in order ----------------------------------------------------------------------

    def open(self, checkpoint: Path | None) -> None:
        """Bring engines, gate and log to where the learner is, before the first ticket.

        Args:
            checkpoint: Folder of the one that the learner was restored from.
        """
        self._get(self.actors.heartbeats.forget.remote("learner"))
        self.folder.withdraw_model()  # of a run that was stopped: it tells of a whole one
        for step, fault in self.checkpoints.passed_over.items():
            self._note("checkpoint_passed_over", step=step, fault=fault)
        try:
            saved_trees.take_back(self.folder, self.step)
        except Exception as error:  # any store's own
            self._warn(f"trees after step {self.step}", f"left: {type(error).__name__}: {error}")
        gate, pool, version = self.actors.gate, self.actors.pool, self.learner.version
        first = self.step * self.config.gate.trees_per_step
        # What grows on once the engines have turned back would be of weights that never were.
        grown: list[TreeRecord] = self._get(pool.recall.remote(first))
        self.publish()
        self._await_engines()
        totals = self._get(pool.stats.remote())
        self.engines = EngineTotals(stats=totals)
        self.idle = self._get(self.actors.heartbeats.idle.remote())
        session: int = self._get(gate.restart.remote(self.step, _read_gate(checkpoint)))
        left_over = saved_trees.read(checkpoint, self.config.tree)
        saved = saved_trees.usable(
            [*left_over, *grown], step=self.step, version=version, gate=self.config.gate
        )
        # Noted before any of its trees is finished, and after the last one of those before it.
        self._note(
            "learner_started",
            step=self.step,
            version=version,
            workers=self.num_workers,
            saved_trees=len(saved),
            pid=os.getpid(),
        )
        self._get(pool.grow_tickets.remote(gate, session, first, self.num_workers, saved))

    def steps(self) -> Iterator[int]:
        """The learner steps that are due, until the gate or the budget says that one was last."""
        rows = self._get(self.actors.run_log.rows_since.remote(0))
        self.sampled_tokens = sum(
            row.get("tokens/sampled", 0.0) for row in latest(rows) if row["step"] <= self.step
        )
        # A stop that came while this group was started is for it, too.
        is_told_to_stop = self.is_first and self._is_told_to_stop()
        self.is_last = self._agreed(self._is_over() or is_told_to_stop)
        if not self.is_last:
            self.evaluate_if_due(unless_done=True)  # the workers before may have died over it
        while not self.is_last:
            yield self.step

    def next_batch(self, step: int) -> WorkerBatch:
        """This worker's trees of a learner step, once they are there."""
        self.heartbeat.at(f"waiting for the trees of step {step}", is_busy=False)
        batch, size = self.batches.take(), self.config.gate.trees_per_step
        batch.check(range(step * size, (step + 1) * size), self.num_workers)
        self.heartbeat.at(f"updating in step {step}")
        return batch

    def keep(self, step: int, batch: WorkerBatch, update: UpdateResult) -> None:
        """Have the trees of the step written to the run folder, every few steps, with what the
        learner made of them."""
        every, done = self.config.metrics.save_trees_every, step + 1
        if every and done % every == 0:
            name = saved_trees.name(done, self.rank)
            table = with_training(batch.table, update.trained.training())
            with suppress(Exception):  # it was told of; what comes on top is left out
                self.patience.until_written(name, self.writer.make_room)
            self.writer.put(name, lambda: self.folder.publish_table(name, table))
            self.trees_kept = done

    def publish(self) -> None:
        """Have every engine serve the learner's weights; `consume` says who waits for it."""
        if not self.is_first:
            self.follow()
            return
        self._await_engines()  # the publication before
        version = self.learner.version
        self.heartbeat.at(f"publishing version {version}")
        start = time.monotonic()
        with self.together.leading():
            digest = self.publisher.publish(self.together, version)
        self.publisher.then(partial(self._published, version, digest, start))

    def _published(self, version: int, digest: str, start: float) -> None:
        seconds = time.monotonic() - start
        self._note("published", version=version, digest=digest, seconds=seconds)

    def consume(self, step: int, update: UpdateResult) -> None:
        """Tell the gate that the step is consumed, once the engines serve what came of it.

        With staleness 0 that is awaited: no further ticket is out, and no tree to go on with.
        """
        self.step = step + 1
        self.sampled_tokens += update.stats.num_sampled_tokens
        if self.is_first:
            version = self.learner.version
            if not update.has_updated:
                self._await_engines()  # no publication of this step has waited for the one before
            roots = update.stats.root_values
            self.consumed = self.publisher.then(partial(self._consumed, step, version, roots))
            if not self.config.gate.max_staleness:
                self._await_engines()
            self.is_last = self._is_told_to_stop() or self._is_over()
            if self.is_last:
                self._await_engines()
        self.is_last = self._agreed(self.is_last)

    def _consumed(self, step: int, version: int, root_values: tuple[RootValue, ...]) -> GateState:
        size = self.config.gate.trees_per_step
        state: GateState = self._get(self.actors.gate.consumed.remote(step, root_values))
        self._note("consumed", step=step, first=step * size, trees=size, version=version)
        return state

    def report(self, batch: WorkerBatch, update: UpdateResult) -> None:
        """Write the step's row."""
        if not self.is_first:
            return
        # Of the wait, what a finished tree spent on scoring, and a scored one on its way here.
        finished = max(batch.asked_at, update.stats.last_finished_s)
        scored = max(finished, update.stats.last_scored_s)
        asked = self.actors.pool.stats.remote(), self.actors.heartbeats.idle.remote()
        totals, idle = self._get(asked[0]), self._get(asked[1])
        shares, self.idle = idle.shares_since(self.idle), idle
        now = time.time()
        row: Row = {
            "step": self.step,
            "version": self.learner.version,
            **update.stats.metrics(self.learner.version - update.has_updated),
            **update.metrics,
            "time/wait_s": batch.arrived_at - batch.asked_at,
            "time/score_s": scored - finished,
            "time/hop_s": batch.arrived_at - scored,
            "time/update_s": update.seconds,
            "time/sync_s": now - batch.arrived_at - update.seconds,
            "time/step_s": now - batch.asked_at,
            "tokens/total": self.sampled_tokens,
            **self.engines.since_last(totals),
            **{f"idle/{kind}_share": shares[kind] for kind in IDLE if kind in shares},
        }
        self._get(self.actors.run_log.step.remote(row))

    def checkpoint_if_due(self) -> None:
        """Save a checkpoint; training goes on while it is put in its place, but for the last."""
        if not self.is_first:
            self.follow()
            return
        with self.together.leading():
            if not (self.is_last or self.saver.is_due(self.step)):
                return
            self.heartbeat.at(f"writing the checkpoint of step {self.step}")
            if not (self.is_last and self.saver.has(self.step)):
                self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        first = self.step * self.config.gate.trees_per_step
        consumed, trees_kept = self.consumed, self.trees_kept
        num_lines = 0

        def write(folder: Path) -> None:
            self.together.write(folder)
            trees = self._get(self.actors.pool.unconsumed.remote(first))
            saved_trees.write(folder, trees, self.config.tree)

        def before_place(folder: Path) -> None:
            nonlocal num_lines
            # No checkpoint tells of a step that the gate holds for due.
            (folder / GATE_FILE).write_text(consumed.result())
            num_lines = self._get(self.actors.run_log.num_lines.remote())[0]

        contents = CheckpointContents(
            write=write,
            before_place=before_place,
            is_settled=lambda: self._is_settled(num_lines, trees_kept),
            placed=partial(self._note, "checkpoint", step=self.step, version=self.learner.version),
            num_bytes=self.learner.checkpoint_bytes,
        )
        self.saver.save(self.step, contents, is_last=self.is_last)

    def evaluate_if_due(self, *, unless_done: bool = False) -> None:
        """Evaluate if it is due; the learner waits, so that all answers are of one version.

        The evaluation takes long: a stop that came meanwhile makes the step that is done the last.
        """
        every = self.config.evaluate.every
        if self.is_last or not every or self.step % every or self.held_out is None:
            return
        if not self.is_first:
            self.heartbeat.at("waiting for the evaluation", is_busy=False)
        elif not (unless_done and read_evaluation(self.folder, self.step)):
            self._await_engines()
            self._evaluator.evaluate(
                step=self.step,
                version=self.learner.version,
                advance=lambda num_problems: self.heartbeat.at("evaluating"),
                writer=self.writer,
            )
        self.is_last = self._agreed(self.is_first and self._is_told_to_stop())
        if self.is_last:
            self.checkpoint_if_due()

    def finish(self) -> None:
        """End the stream of trees, and write the model, once all else is written."""
        if self.is_first:
            closing_gate = self.actors.gate.close.remote()
            self._get(self.actors.pool.end_stream.remote())
            self._get(closing_gate)
        self.heartbeat.at("writing the model")
        with suppress(Exception):  # it was told of; the end of the writer leaves it out
            self.patience.until_written("trees", lambda: self.writer.flush(WRITE_S))
        self.writer.close()
        if self.is_first:
            save = self.together.save_pretrained
            with self.together.leading():
                self.patience.until_written("model", lambda: self.folder.publish_model(save))
        else:
            self.follow()
        # What is ended in the middle of its work is shown as a failure by Ray's dashboard.
        self.heartbeat.at("waiting for the stream of trees to end", is_busy=False)
        self.batches.await_end(END_S)

    def follow(self) -> None:
        """Give this worker's part to what the first one does with a sharded learner's weights."""
        if self.together.is_joint:
            self.heartbeat.at("waiting for the first worker", is_busy=False)
            self.together.follow()

    # What it is made of ----------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run that is done, by its learner steps or its tokens."""
        run = self.config.run
        spent = self.sampled_tokens / run.max_sampled_tokens if run.max_sampled_tokens else 0.0
        return max(self.step / run.num_steps, spent)

    def _is_told_to_stop(self) -> bool:
        return self._get(self.actors.gate.is_told_to_stop.remote())

    def _is_over(self) -> bool:
        """Whether the steps that are done are all of the run."""
        return self.progress >= 1

    def _await_engines(self) -> None:
        """Wait until the engines serve what was published, and the gate knows of it."""
        if self.publisher.is_under_way:
            self.heartbeat.at(f"waiting for the engines to serve version {self.learner.version}")
        self.publisher.wait()

    @cached_property
    def _evaluator(self) -> HeldOutEvaluator:
        """Of every evaluation on the way."""
        assert self.held_out is not None
        evaluator = HeldOutEvaluator(
            config=replace(self.config, evaluate=self.config.evaluate.interim),
            prompts=self.held_out,
            pool=self.actors.pool,
            run_log=self.actors.run_log,
            tokenizer=self.learner.policy.tokenizer,
            get=self._get,
        )
        return self.ending.enter_context(closing(evaluator))

    def _is_settled(self, num_lines: int, trees_kept: int | None) -> bool:
        """Whether the run folder has so many rows and events, and the trees of that step."""
        if self._get(self.actors.run_log.num_lines.remote())[1] < num_lines:
            return False
        if trees_kept is None:
            return True
        return saved_trees.are_kept(self.folder, trees_kept, self.num_workers)

    def _warn(self, what: str, reason: str) -> None:
        self._tell(write_failed(what, reason))

    def _tell(self, event: Event) -> None:
        self.actors.run_log.event.remote(event)

    def _note(self, kind: str, **fields: str | float) -> None:
        self._get(self.actors.run_log.event.remote(Event(kind=kind, fields=fields)))

    def barrier(self) -> None:
        """Wait for the other workers."""
        if self.num_workers > 1:
            dist.barrier()

    def _agreed(self, is_last: bool) -> bool:
        """What the first worker says, on every worker."""
        if self.num_workers == 1:
            return is_last
        if not self.is_first:
            self.heartbeat.at("waiting for the first worker", is_busy=False)
        flag = torch.tensor([int(is_last)], device=self.learner.device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())


def _read_gate(checkpoint: Path | None) -> GateState | None:
    """State of the gate in a checkpoint, if there is one."""
    if checkpoint is None or not (checkpoint / GATE_FILE).exists():
        return None
    return GateState((checkpoint / GATE_FILE).read_text())
