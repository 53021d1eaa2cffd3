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

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from treerpo_ray.coordinator import Coordinator
from treerpo_ray.evaluate.evaluation import read_evaluation
from treerpo_ray.evaluate.grading import HeldOutEvaluator
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.together import Together, once_a_machine
from treerpo_ray.learner.update_result import UpdateResult
from treerpo_ray.metrics.watchdog import Heartbeat
from treerpo_ray.records import with_training
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.checkpoints import Checkpoints, CheckpointSaver
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.writer import BackgroundWriter
from treerpo_ray.task import STREAM, WorkerTask
from treerpo_ray.tree_stream import Prefetcher, WorkerBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_S = 60.0
"""Time for the stream of trees to end by itself; it is ended with the workers in any case."""
WRITE_S = 60.0
"""Time for a disk that takes what is written, before it is said that it does not."""


class Evaluator(Protocol):
    """As `HeldOutEvaluator`."""

    def evaluate(
        self, *, step: int, version: int, advance: Callable[[int], None], writer: BackgroundWriter
    ) -> object: ...

    def close(self) -> None: ...


StartEvaluator = Callable[["PreTrainedTokenizerBase"], Evaluator]


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
            gate=config.gate,
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
            start_evaluator=partial(interim_evaluator, task),
        )
        worker.open(checkpoint)
    worker.barrier()
    worker.batches = Prefetcher(ray.train.get_dataset_shard(STREAM))
    with worker.ending:
        yield worker
    heartbeat.close()


def interim_evaluator(task: WorkerTask, tokenizer: "PreTrainedTokenizerBase") -> Evaluator:
    """What evaluates on the way."""
    assert task.held_out is not None
    return HeldOutEvaluator(
        config=replace(task.config, evaluate=task.config.evaluate.interim),
        prompts=task.held_out,
        actors=task.actors,
        tokenizer=tokenizer,
    )


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
        start_evaluator: Starts what evaluates on the way; the tokenizer is the policy's.
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
        start_evaluator: StartEvaluator,
    ) -> None:
        self.config, self.held_out = task.config, task.held_out
        self._start_evaluator = start_evaluator
        self.rank, self.num_workers, self.is_first = rank, num_workers, rank == 0
        self.step, self.learner, self.checkpoints = step, learner, checkpoints
        self.heartbeat = heartbeat
        self.together = Together(learner)
        self.folder = RunFolder(self.config.folder)
        self.ending = ExitStack()
        """Of what the worker has started."""
        self.batches: Prefetcher
        self.coordinator = Coordinator(
            task=task,
            node=node,
            num_workers=num_workers,
            together=self.together,
            heartbeat=heartbeat,
        )
        self.ending.callback(self.coordinator.publisher.close)
        self.sampled_tokens = 0.0
        self.is_last = False
        self.trees_kept: int | None = None
        patience = self.coordinator.patience
        self.writer = BackgroundWriter(warn=self.coordinator.warn, place=patience.place)
        self.saver = CheckpointSaver(
            checkpoints,
            every=self.config.checkpoint.every,
            step=step,
            warn=self.coordinator.warn,
            patience=patience,
        )

    # The loop, in order ----------------------------------------------------------------------

    def open(self, checkpoint: Path | None) -> None:
        """Bring what trains with this worker to where its learner is, before the first ticket.

        Args:
            checkpoint: Folder of the one that the learner was restored from.
        """
        if self.is_first:
            self.coordinator.begin(self.step, checkpoint, self.checkpoints.passed_over)
        else:
            self.follow()  # the first publication

    def steps(self) -> Iterator[int]:
        """The learner steps that are due, until the gate or the budget says that one was last."""
        self.sampled_tokens = self.coordinator.sampled_tokens(self.step)
        # A stop that came while this group was started is for it, too.
        is_told_to_stop = self.is_first and self.coordinator.is_told_to_stop()
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
        if self.config.engine.sleep:  # all trees of the step have grown
            if self.is_first:
                self.coordinator.sleep()
            self.barrier()
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
                self.coordinator.patience.until_written(name, self.writer.make_room)
            self.writer.put(name, lambda: self.folder.publish_table(name, table))
            self.trees_kept = done

    def publish(self) -> None:
        """Have every engine serve the learner's weights; `consume` says who waits for it."""
        if self.config.engine.sleep:
            self._give_memory_back()
        if self.is_first:
            self.coordinator.publish()
        else:
            self.follow()

    def consume(self, step: int, update: UpdateResult) -> None:
        """Tell the gate that the step is consumed, once the engines serve what came of it.

        With staleness 0 that is awaited: no further ticket is out, and no tree to go on with.
        """
        self.step = step + 1
        self.sampled_tokens += update.stats.num_sampled_tokens
        if self.config.engine.sleep and not update.has_updated:
            self._give_memory_back()
            if self.is_first:
                self.coordinator.wake()
        if self.is_first:
            self.coordinator.consume(step, update)
            self.is_last = self.coordinator.is_told_to_stop() or self._is_over()
            if self.is_last:
                self.coordinator.await_engines()
        self.is_last = self._agreed(self.is_last)

    def report(self, batch: WorkerBatch, update: UpdateResult) -> None:
        """Write the step's row."""
        if self.is_first:
            self.coordinator.report(self.step, batch, update, self.sampled_tokens)

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
                contents = self.coordinator.checkpoint(self.step, self.trees_kept)
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
            self.coordinator.await_engines()
            self._evaluator.evaluate(
                step=self.step,
                version=self.learner.version,
                advance=lambda num_problems: self.heartbeat.at("evaluating"),
                writer=self.writer,
            )
        self.is_last = self._agreed(self.is_first and self.coordinator.is_told_to_stop())
        if self.is_last:
            self.checkpoint_if_due()

    def finish(self) -> None:
        """End the stream of trees, and write the model, once all else is written."""
        if self.is_first:
            self.coordinator.end_stream()
        self.heartbeat.at("writing the model")
        patience = self.coordinator.patience
        with suppress(Exception):  # it was told of; the end of the writer leaves it out
            patience.until_written("trees", lambda: self.writer.flush(WRITE_S))
        self.writer.close()
        if self.is_first:
            save = self.together.save_pretrained
            with self.together.leading():
                patience.until_written("model", lambda: self.folder.publish_model(save))
        else:
            self.follow()
        # What is ended in the middle of its work is shown as a failure by Ray's dashboard.
        self.heartbeat.at("waiting for the stream of trees to end", is_busy=False)
        self.batches.await_end(END_S)

    def _give_memory_back(self) -> None:
        """Of all workers, what torch keeps of the update on GPUs that engines are to have."""
        torch.cuda.empty_cache()
        self.barrier()

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

    def _is_over(self) -> bool:
        """Whether the steps that are done are all of the run."""
        return self.progress >= 1

    @cached_property
    def _evaluator(self) -> Evaluator:
        """Of every evaluation on the way."""
        evaluator = self._start_evaluator(self.learner.policy.tokenizer)
        return self.ending.enter_context(closing(evaluator))

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
