"""Train worker: the loop that each Ray Train worker runs, from restored state to last step."""

import os
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from treerpo_ray.engine.types import EngineTotals
from treerpo_ray.evaluate.evaluation import read_evaluation
from treerpo_ray.evaluate.grading import evaluate
from treerpo_ray.learner.learner import Learner, UpdateResult
from treerpo_ray.learner.policy import DTYPES
from treerpo_ray.metrics.run_log import Event, Row, latest, write_failed
from treerpo_ray.metrics.watchdog import Heartbeat
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord, from_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.checkpoints import Checkpoints, CheckpointSaver
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.writer import BackgroundWriter
from treerpo_ray.scoring import Scorer
from treerpo_ray.search import curriculum
from treerpo_ray.search.curriculum import Measurement
from treerpo_ray.task import STREAM, WorkerTask
from treerpo_ray.tree_stream import Prefetcher, from_share
from treerpo_ray.weight_sync import Probe, pack_weights


class TrainWorker:
    """One worker of the group; the first one also speaks for all to the other actors."""

    def __init__(self, task: WorkerTask) -> None:
        self.config, self.actors = task.config, task.actors
        self.held_out = task.held_out
        self.probe_ids = task.probe_ids
        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.is_first = self.rank == 0
        self.folder = RunFolder(self.config.folder)
        self.engines = EngineTotals()
        self.sampled_tokens = 0.0
        self.writer = BackgroundWriter(self._warn)
        limit_s = self.config.run.stall_timeout_s
        self.heartbeat = Heartbeat(
            self.actors.heartbeats, f"learner {self.rank}", self.folder.place, limit_s
        )
        self.heartbeat.at("restoring its state")
        self.checkpoints = Checkpoints(self.folder, self.config.checkpoint.keep)
        self.left_over: list[TreeRecord] = []
        self.measurements: list[Measurement] = []
        with self.checkpoints.newest() as found:
            self.step, checkpoint = found or (0, None)
            self.learner = Learner(self.config, ray.train.torch.get_device(), checkpoint)
            if checkpoint is not None and self.is_first:
                self.left_over = saved_trees.read(checkpoint, self.config)
                self.measurements = curriculum.read(checkpoint, self.config)
        self.saver = CheckpointSaver(
            self.checkpoints,
            every=self.config.checkpoint.every,
            step=self.step,
            warn=self._warn,
        )
        self.trees_kept: int | None = None

    def run(self) -> None:
        """Take batches until the gate says that it was the last one."""
        if self.is_first:
            self._open()
        self._barrier()
        shares = Prefetcher(ray.train.get_dataset_shard(STREAM))
        rows = ray.get(self.actors.run_log.rows_since.remote(0))
        done = latest(rows)
        self.sampled_tokens = sum(
            row.get("tokens/sampled", 0.0) for row in done if row["step"] <= self.step
        )
        is_last = self._is_over()
        if not is_last:
            self._evaluate(unless_done=True)  # the workers before may have died over it
        while not is_last:
            is_last = self._step(shares)
            if self.is_first and (is_last or self.saver.is_due(self.step)):
                self._save(is_last)
            if not is_last:
                self._evaluate()
        self.heartbeat.at("writing the model")
        self.writer.close()
        if self.is_first:
            self.folder.publish_model(self.learner.policy.save_pretrained)
        self.heartbeat.close()

    def _open(self) -> None:
        """Bring engines, gate and log to where the learner is, before the first ticket."""
        ray.get(self.actors.heartbeats.forget.remote("learner"))
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
        grown: list[TreeRecord] = ray.get(pool.unconsumed.remote(first))
        self._publish()
        totals = ray.get(pool.stats.remote())
        self.engines.since_last(totals)
        session: int = ray.get(gate.restart.remote(self.step, self.measurements))
        saved = saved_trees.usable(
            [*self.left_over, *grown], step=self.step, version=version, config=self.config
        )
        ray.get(pool.grow_tickets.remote(gate, session, first, self.num_workers, saved))
        self._note(
            "learner_started",
            step=self.step,
            version=version,
            workers=self.num_workers,
            saved_trees=len(saved),
            pid=os.getpid(),
        )
        self.left_over = []

    def _step(self, shares: "Prefetcher") -> bool:
        """One learner step; returns whether it was the last."""
        start = time.time()
        self.heartbeat.at(f"waiting for the trees of step {self.step}", is_busy=False)
        share = shares.take()
        if share is None:
            raise RuntimeError(f"the tree stream ended before learner step {self.step}")
        arrived = time.time()
        table = from_share(share)
        records = from_table(table)
        self._check_tickets([record.ticket for record in records])
        version = self.learner.version
        self.heartbeat.at(f"updating in step {self.step}")
        result = self.learner.update(records, self._progress())
        updated = time.time()
        self._save_trees(table)
        self.step += 1
        self.sampled_tokens += result.stats.num_sampled_tokens
        is_last = False
        if self.is_first:
            if result.has_updated:
                self._publish()
            consumed = self.actors.gate.consumed.remote(self.step - 1, result.stats.measured)
            is_last = ray.get(consumed) or self._is_over()
            # Of the wait, what a finished tree spent on scoring, and a scored one on its way here.
            finished = max(start, result.stats.last_finished_s)
            scored = max(finished, result.stats.last_scored_s)
            times = {
                "time/wait_s": arrived - start,
                "time/score_s": scored - finished,
                "time/hop_s": arrived - scored,
                "time/update_s": updated - arrived,
                "time/sync_s": time.time() - updated,
                "time/step_s": time.time() - start,
            }
            self._report(result, version, times)
        return self._agreed(is_last)

    def _progress(self) -> float:
        """Share of the run that is done, by its learner steps or its tokens."""
        run = self.config.run
        spent = self.sampled_tokens / run.max_sampled_tokens if run.max_sampled_tokens else 0.0
        return max(self.step / run.num_steps, spent)

    def _is_over(self) -> bool:
        """Whether the steps that are done are all of the run."""
        return self._progress() >= 1

    def _check_tickets(self, tickets: list[int]) -> None:
        """Invariant: this step consumes its own tickets, each once, and an equal share of them."""
        size = self.config.gate.trees_per_step
        own = range(self.step * size, (self.step + 1) * size)
        if len(set(tickets) & set(own)) != size // self.num_workers:
            raise RuntimeError(f"tickets {tickets} are no share of learner step {self.step}: {own}")

    def _report(self, result: UpdateResult, version: int, times: dict[str, float]) -> None:
        totals = ray.get(self.actors.pool.stats.remote())
        row: Row = {
            "step": self.step,
            "version": self.learner.version,
            **result.stats.metrics(version),
            **result.metrics,
            **times,
            "tokens/per_s": result.stats.num_sampled_tokens / times["time/step_s"],
            **self.engines.since_last(totals),
        }
        ray.get(self.actors.run_log.step.remote(row))
        self._note(
            "consumed",
            step=self.step - 1,
            first=(self.step - 1) * self.config.gate.trees_per_step,
            trees=self.config.gate.trees_per_step,
            version=self.learner.version,
        )

    def _publish(self) -> None:
        """Have every engine serve the learner's weights."""
        self.heartbeat.at(f"publishing version {self.learner.version}")
        learner = self.learner
        manifest, chunks = pack_weights(
            learner.policy.named_weights(),
            version=learner.version,
            dtype=DTYPES[self.config.model.dtype],
            chunk_bytes=self.config.sync.chunk_mib * 2**20,
        )
        logprobs = learner.policy.sequence_logprobs(self.probe_ids).tolist()
        probe = Probe(token_ids=self.probe_ids, logprobs=logprobs)
        refs = [ray.put(chunk) for chunk in chunks]
        ray.get(self.actors.weight_sync.publish.remote(manifest, refs, probe))
        self._note("published", version=learner.version, digest=manifest.digests[0])

    def _evaluate(self, *, unless_done: bool = False) -> None:
        """Evaluate if it is due; the learner waits, so that all answers are of one version."""
        every = self.config.evaluate.every
        if not every or self.step % every or self.held_out is None:
            return
        if not self.is_first:
            self.heartbeat.at("waiting for the evaluation", is_busy=False)
        elif not (unless_done and read_evaluation(self.folder, self.step)):
            self._evaluate_on(self.held_out)
        self._barrier()

    def _evaluate_on(self, held_out: PromptSet) -> None:
        tokenizer = self.learner.policy.tokenizer
        with closing(Scorer(self.config, tokenizer)) as scorer:
            evaluate(
                self.config,
                held_out,
                self.actors.pool,
                self.actors.run_log,
                scorer,
                step=self.step,
                version=self.learner.version,
                advance=lambda num_problems: self.heartbeat.at("evaluating"),
                writer=self.writer,
            )

    def _save(self, is_last: bool) -> None:
        """Save a checkpoint; training goes on while it is put in its place, but for the last."""
        self.heartbeat.at(f"writing the checkpoint of step {self.step}")
        num_lines: int = ray.get(self.actors.run_log.num_lines.remote())[0]
        first = self.step * self.config.gate.trees_per_step

        def write(folder: Path) -> None:
            self.learner.write(folder)
            trees: list[TreeRecord] = ray.get(self.actors.pool.unconsumed.remote(first))
            saved_trees.write(folder, trees, self.config)
            measurements: list[Measurement] = ray.get(self.actors.gate.measurements.remote())
            curriculum.write(folder, measurements, self.config)

        self.saver.save(
            self.step,
            write,
            partial(self._is_settled, num_lines, self.trees_kept),
            partial(self._note, "checkpoint", step=self.step, version=self.learner.version),
            is_last=is_last,
        )

    def _is_settled(self, num_lines: int, trees_kept: int | None) -> bool:
        """Whether the run folder has so many rows and events, and the trees of that step."""
        if ray.get(self.actors.run_log.num_lines.remote())[1] < num_lines:
            return False
        if trees_kept is None:
            return True
        return saved_trees.are_kept(self.folder, trees_kept, self.num_workers)

    def _save_trees(self, table: pa.Table) -> None:
        every, step = self.config.metrics.save_trees_every, self.step + 1
        if every and step % every == 0:
            name = saved_trees.name(step, self.rank)
            self.writer.put(name, lambda: self.folder.publish_table(name, table))
            self.trees_kept = step

    def _warn(self, what: str, reason: str) -> None:
        self.actors.run_log.event.remote(write_failed(what, reason))

    def _note(self, kind: str, **fields: str | int) -> None:
        ray.get(self.actors.run_log.event.remote(Event(kind=kind, fields=fields)))

    def _barrier(self) -> None:
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
