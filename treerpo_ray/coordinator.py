"""Coordinator: what the train workers of a run tell and ask its other actors.

Most of it the first worker says for all: what the engines are to serve, which step the gate may
count as consumed, the row of a step, what belongs to a checkpoint.
"""

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import ray

from treerpo_ray.algo.forks.adaptive_shape import ShapeChoice, single_answers
from treerpo_ray.engine.types import EngineTotals
from treerpo_ray.learner.policy import DTYPES
from treerpo_ray.learner.publisher import Publisher
from treerpo_ray.learner.together import Together
from treerpo_ray.learner.update_result import UpdateResult
from treerpo_ray.metrics.events import Event, write_done, write_failed, write_waits
from treerpo_ray.metrics.rows import Row, latest
from treerpo_ray.metrics.stage_status import IdleTimes
from treerpo_ray.metrics.watchdog import Heartbeat
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.checkpoints import CheckpointContents
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.patience import Patience
from treerpo_ray.task import GateState, WorkerTask
from treerpo_ray.tree_stream import WorkerBatch
from treerpo_ray.weights.transport import make_transport

GATE_FILE = "gate.json"
"""State of the gate, in a checkpoint."""
IDLE = ("learner", "scoring")
"""Kinds of stages whose idle time a row has; engines count their own. A learner is idle while it
waits for trees, the scoring while it waits for trees or for a learner to take them."""


class Coordinator:
    """One worker's side of the actors of the run.

    Args:
        task: What every worker is given.
        node: Ray's id of the node that the worker is on.
        num_workers: Workers of the group.
        together: The learner, of whose weights all workers may have parts.
        heartbeat: Told what is waited for.
    """

    def __init__(
        self,
        *,
        task: WorkerTask,
        node: str,
        num_workers: int,
        together: Together,
        heartbeat: Heartbeat,
    ) -> None:
        self.config, self.actors, self.get = task.config, task.actors, task.actors.get
        self.num_workers, self.together, self.heartbeat = num_workers, together, heartbeat
        self.folder = RunFolder(self.config.folder)
        self.patience = Patience(
            folder=self.folder,
            waits=lambda what, reason: self.tell(write_waits(what, reason)),
            written=lambda what, seconds: self.tell(write_done(what, seconds)),
            is_told_to_stop=self.is_told_to_stop,
            moves=lambda what: self.heartbeat.at(what, is_busy=False),
        )
        self.publisher = Publisher(
            send=lambda *sent: self.get(self.actors.weight_sync.publish.remote(*sent)),
            transport=make_transport(
                self.config.sync.transport,
                device=together.learner.device,
                address=ray.util.get_node_ip_address(),
                next_round=lambda poll: self.get(self.actors.weight_sync.next_round.remote(poll)),
                limit_s=self.config.engine.join_timeout_s,
            ),
            node=node,
            probe_ids=task.probe_ids,
            dtype=DTYPES[self.config.model.dtype],
            chunk_bytes=self.config.sync.chunk_mib * 2**20,
            until_written=self.patience.until_written,
        )
        self.engines: EngineTotals
        self.idle: IdleTimes
        """Those at the last row."""
        self.consumed: Future[GateState]
        """State of the gate after the newest learner step, once it knows of it."""

    @property
    def version(self) -> int:
        """Of the learner's weights."""
        return self.together.learner.version

    # What any worker may say ---------------------------------------------------------------------

    def is_told_to_stop(self) -> bool:
        """Whether the run is to end after the learner step under way."""
        return self.get(self.actors.gate.is_told_to_stop.remote())

    def sampled_tokens(self, step: int) -> float:
        """Tokens that the rows of so many learner steps tell of."""
        rows = self.get(self.actors.run_log.rows_since.remote(0))
        return sum(row.get("tokens/sampled", 0.0) for row in latest(rows) if row["step"] <= step)

    def warn(self, what: str, reason: str) -> None:
        """Tell the run log of something that could not be written."""
        self.tell(write_failed(what, reason))

    def tell(self, event: Event) -> None:
        """Tell the run log of an event, and do not wait."""
        self.actors.run_log.event.remote(event)

    def _note(self, kind: str, **fields: str | float) -> None:
        self.get(self.actors.run_log.event.remote(Event(kind=kind, fields=fields)))

    # What the first worker says, in order of the loop --------------------------------------------

    def begin(self, step: int, checkpoint: Path | None, passed_over: Mapping[int, str]) -> None:
        """Bring engines, gate and log to where the learner is, before the first ticket.

        Args:
            step: Learner steps done.
            checkpoint: Folder of the one that the learner was restored from.
            passed_over: Faults of those, by step, that could not be restored from.
        """
        self.get(self.actors.heartbeats.forget.remote("learner"))
        self.folder.withdraw_model()  # of a run that was stopped: it tells of a whole one
        for faulty, fault in passed_over.items():
            self._note("checkpoint_passed_over", step=faulty, fault=fault)
        try:
            saved_trees.take_back(self.folder, step)
        except Exception as error:  # any store's own
            self.warn(f"trees after step {step}", f"left: {type(error).__name__}: {error}")
        gate, pool = self.actors.gate, self.actors.pool
        first = step * self.config.gate.trees_per_step
        # What grows on once the engines have turned back would be of weights that never were.
        grown: list[TreeRecord] = self.get(pool.recall.remote(first))
        self.publish()
        self.await_engines()
        totals = self.get(pool.stats.remote())
        self.engines = EngineTotals(stats=totals)
        self.idle = self.get(self.actors.heartbeats.idle.remote())
        session: int = self.get(gate.restart.remote(step, _read_gate(checkpoint)))
        left_over = saved_trees.read(checkpoint, self.config.tree)
        saved = saved_trees.usable(
            [*left_over, *grown], step=step, version=self.version, gate=self.config.gate
        )
        # Noted before any of its trees is finished, and after the last one of those before it.
        self._note(
            "learner_started",
            step=step,
            version=self.version,
            workers=self.num_workers,
            saved_trees=len(saved),
            pid=os.getpid(),
        )
        self.get(pool.grow_tickets.remote(gate, session, first, self.num_workers, saved))

    def sleep(self) -> None:
        """Have the engines give their GPUs' memory to the learner until the next publication."""
        self.heartbeat.at("waiting for the engines to sleep", is_busy=False)
        self.get(self.actors.pool.sleep.remote())

    def wake(self) -> None:
        """Have engines that sleep go on with what they served."""
        self.heartbeat.at("waiting for the engines to wake")
        self.get(self.actors.pool.wake.remote())

    def publish(self) -> None:
        """Begin to have every engine serve the learner's weights, once they serve those before."""
        self.await_engines()
        version = self.version
        self.heartbeat.at(f"publishing version {version}")
        start = time.monotonic()
        with self.together.leading():
            digest = self.publisher.publish(self.together, version)
        self.publisher.then(partial(self._published, version, digest, start))

    def _published(self, version: int, digest: str, start: float) -> None:
        seconds = time.monotonic() - start
        self._note("published", version=version, digest=digest, seconds=seconds)

    def await_engines(self) -> None:
        """Wait until the engines serve what was published, and the gate knows of it."""
        if self.publisher.is_under_way:
            self.heartbeat.at(f"waiting for the engines to serve version {self.version}")
        self.publisher.wait()

    def consume(self, step: int, update: UpdateResult) -> None:
        """Tell the gate that a step is consumed, once the engines serve what came of it.

        With staleness 0 that is awaited: no further ticket is out, and no tree to go on with.
        """
        if not update.has_updated:
            self.await_engines()  # no publication of this step has waited for the one before
        self.consumed = self.publisher.then(partial(self._consumed, step, self.version, update))
        if not self.config.gate.max_staleness:
            self.await_engines()

    def _consumed(self, step: int, version: int, update: UpdateResult) -> GateState:
        size, chosen = self.config.gate.trees_per_step, update.chosen
        shape = None if chosen is None else chosen.num_children
        state: GateState = self.get(self.actors.gate.consumed.remote(step, shape))
        self._note("consumed", step=step, first=step * size, trees=size, version=version)
        if chosen is not None:
            before = update.chosen_before
            known = (
                single_answers(len(chosen.num_children)) if before is None else before.num_children
            )
            if chosen.num_children != known:
                self._note_shape(chosen, step)
        return state

    def _note_shape(self, chosen: ShapeChoice, step: int) -> None:
        """Tell of another shape that is chosen in a learner step."""
        first = step + 1 + self.config.gate.max_staleness
        share = chosen.token_share
        told = f"trees of {list(chosen.num_children)}", f"predicted to need at most {share:.2f} of"
        if not chosen.is_forked:
            told = "single answers", "no fork is predicted to save a tenth of"
        what, why = told
        self._note(
            "shape_chosen",
            shape=str(list(chosen.num_children)),
            from_step=first + 1,  # as rows count steps
            token_share=share,
            what=f"{what} from step {first + 1} on: {why} the tokens of single answers",
        )

    def report(
        self, step: int, batch: WorkerBatch, update: UpdateResult, sampled_tokens: float
    ) -> None:
        """Write the row of a step.

        Args:
            step: Learner steps done, with it.
            batch: The first worker's trees.
            update: What was made of those of all.
            sampled_tokens: Of all steps that are done.
        """
        # Of the wait, what a finished tree spent on scoring, and a scored one on its way here.
        finished = max(batch.asked_at, update.stats.last_finished_s)
        scored = max(finished, update.stats.last_scored_s)
        asked = self.actors.pool.stats.remote(), self.actors.heartbeats.idle.remote()
        totals, idle = self.get(asked[0]), self.get(asked[1])
        shares, self.idle = idle.shares_since(self.idle), idle
        now = time.time()
        row: Row = {
            "step": step,
            "version": self.version,
            **update.stats.metrics(self.version - update.has_updated),
            **update.metrics,
            "time/wait_s": batch.arrived_at - batch.asked_at,
            "time/score_s": scored - finished,
            "time/hop_s": batch.arrived_at - scored,
            "time/update_s": update.seconds,
            "time/sync_s": now - batch.arrived_at - update.seconds,
            "time/step_s": now - batch.asked_at,
            "tokens/total": sampled_tokens,
            "engine/count": len(totals),
            **self.engines.since_last(totals),
            **{f"idle/{kind}_share": shares[kind] for kind in IDLE if kind in shares},
        }
        self.get(self.actors.run_log.step.remote(row))

    def checkpoint(self, step: int, trees_kept: int | None) -> CheckpointContents:
        """What belongs to the checkpoint of a step, and when it may be put in its place.

        Args:
            step: Learner steps done.
            trees_kept: The newest of them whose trees are kept in the run folder.
        """
        first, consumed = step * self.config.gate.trees_per_step, self.consumed
        num_lines = 0

        def write(folder: Path) -> None:
            self.together.write(folder)
            trees = self.get(self.actors.pool.unconsumed.remote(first))
            saved_trees.write(folder, trees, self.config.tree)

        def before_place(folder: Path) -> None:
            nonlocal num_lines
            # No checkpoint tells of a step that the gate holds for due.
            (folder / GATE_FILE).write_text(consumed.result())
            num_lines = self.get(self.actors.run_log.num_lines.remote())[0]

        return CheckpointContents(
            write=write,
            before_place=before_place,
            is_settled=lambda: self._is_settled(num_lines, trees_kept),
            placed=partial(self._note, "checkpoint", step=step, version=self.version),
            num_bytes=self.together.learner.checkpoint_bytes,
        )

    def _is_settled(self, num_lines: int, trees_kept: int | None) -> bool:
        """Whether the run folder has so many rows and events, and the trees of that step."""
        if self.get(self.actors.run_log.num_lines.remote())[1] < num_lines:
            return False
        if trees_kept is None:
            return True
        return saved_trees.are_kept(self.folder, trees_kept, self.num_workers)

    def end_stream(self) -> None:
        """Tell whoever waits for tickets or trees that none will come."""
        closing_gate = self.actors.gate.close.remote()
        self.get(self.actors.pool.end_stream.remote())
        self.get(closing_gate)


def _read_gate(checkpoint: Path | None) -> GateState | None:
    """State of the gate in a checkpoint, if there is one."""
    if checkpoint is None or not (checkpoint / GATE_FILE).exists():
        return None
    return GateState((checkpoint / GATE_FILE).read_text())
