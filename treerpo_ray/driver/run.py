"""Run: wires the stages together, follows them and starts the train workers again that fail.

gate ──► tree pool ──► tree stream (scoring) ──► train workers ──► weight sync ──► engines
"""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Self

import ray
import ray.train

from treerpo_ray.actor import end_actors, make_actor, root_cause
from treerpo_ray.config import Config
from treerpo_ray.config.data import PROJECT
from treerpo_ray.driver.cluster import connected
from treerpo_ray.driver.result import (
    RunResult,
    collect_result,
)
from treerpo_ray.driver.sources import version_of
from treerpo_ray.driver.start import (
    EarlierStarts,
    check_same_contents,
    contents_of,
    reading,
    record_start,
)
from treerpo_ray.driver.supervisor import Supervisor, evaluation_progress, stop_actor
from treerpo_ray.driver.train_group import TrainGroup, make_trainer
from treerpo_ray.driver.versions import AgreedVersions
from treerpo_ray.engine.types import Sampling
from treerpo_ray.errors import RunFailed
from treerpo_ray.evaluate.evaluation import Evaluation, read_evaluation, step_name
from treerpo_ray.evaluate.examples import examples
from treerpo_ray.evaluate.grading import HeldOutEvaluator
from treerpo_ray.metrics.console import Console
from treerpo_ray.metrics.events import RunLogApi, write_failed
from treerpo_ray.metrics.rows import last_step, latest
from treerpo_ray.metrics.run_log import RunLog, RunLogSetup
from treerpo_ray.metrics.stage_status import StageApi
from treerpo_ray.metrics.step_table import StepTable
from treerpo_ray.metrics.watchdog import Heartbeats, Watchdog, watch_over
from treerpo_ray.preflight.inputs import Inputs
from treerpo_ray.prompts.prompt_set import load_tokenizer
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.lock import only_writer
from treerpo_ray.run_folder.logs import output_to_log
from treerpo_ray.run_folder.writer import BackgroundWriter
from treerpo_ray.search.gate import Gate
from treerpo_ray.search.tree_pool import make_pool
from treerpo_ray.stop import Stop
from treerpo_ray.task import RunActors, TreePoolApi
from treerpo_ray.weight_sync import WeightSync

END_ACTORS_S = 10.0
"""Time for the actors of a run to end by themselves, once their work is done."""


@dataclass(frozen=True, slots=True)
class KeptEngines:
    """Engines for runs one after the other, in one session of Ray."""

    pool: TreePoolApi
    versions: AgreedVersions


def run(
    config: Config,
    inputs: Inputs,
    earlier: EarlierStarts,
    console: Console,
    kept: KeptEngines | None = None,
) -> RunResult:
    """Run, resume or just report what `config` describes, on the cluster that is there.

    Args:
        config: The run's.
        inputs: What was loaded for it.
        earlier: What was found in its folder.
        console: Shows what happens.
        kept: Those of `kept_engines`, for one run of several that share them.

    Raises:
        ValueError: the cluster lacks resources for it, another job writes its folder, or the
            folder holds a run of other input.
        RunFailed: something failed for good; the same command goes on from the last checkpoint.
        KeyboardInterrupt: a signal ended it at once; the same command goes on, too.
    """
    folder = RunFolder(config.folder)
    with reading(folder):
        contents = contents_of(config, inputs.prompts, inputs.held_out)
        check_same_contents(config, contents)
    if earlier.changed:
        console.note(f"since the last start: {', '.join(earlier.changed)}")
    if earlier.result is not None:
        console.note(f"the run {config.run.name} is complete; another run.name starts a new one")
        return earlier.result
    if earlier.checkpoints:
        last = earlier.checkpoints[-1]
        console.note(f"the run goes on from its checkpoint of learner step {last}")
    stop = Stop()
    with stop.at_work(), only_writer(folder), output_to_log(folder):
        try:
            if kept is not None:
                return train(config, inputs, contents, console, stop, kept.versions, kept.pool)
            with ExitStack() as session:
                with console.stage("starting Ray"):
                    versions = session.enter_context(connected(config))
                return train(config, inputs, contents, console, stop, versions)
        except Exception as error:
            if isinstance(error, ValueError) and not isinstance(error, ray.exceptions.RayError):
                raise
            traceback.print_exc()
            if stop.is_asked:  # what ends with the run fails of that, too
                raise KeyboardInterrupt from error
            raise RunFailed(
                f"{root_cause(error)}; traces are in {config.folder}/logs, the same command goes "
                "on from the last checkpoint"
            ) from error


@contextmanager
def kept_engines(config: Config) -> Iterator[KeptEngines]:
    """A Ray session and an engine pool for runs one after the other, of whose setups the one of
    `config` `can_serve` each."""
    with Stop().at_work(), connected(config) as versions:
        pool = make_pool(config, versions.check_node)
        try:
            yield KeptEngines(pool, versions)
        finally:
            stop_actor(pool.stop.remote, "the engines")


def train(
    config: Config,
    inputs: Inputs,
    contents: Mapping[str, str],
    console: Console,
    stop: Stop,
    versions: AgreedVersions,
    pool: TreePoolApi | None = None,
) -> RunResult:
    """Run or resume a training on the Ray cluster that is connected, with a pool kept or its own.

    `contents` is what `contents_of` gave of the inputs, `versions` what `connected` gave.

    Raises:
        ray.exceptions.RayError, RuntimeError: something failed for good; the run folder holds
            the last checkpoint, and the same command goes on from it.
    """
    record_start(config, contents)
    console.expect_steps(StepTable.of(config))
    was_evaluated = read_evaluation(RunFolder(config.folder), 0) is not None
    with RunSession(
        config=config, inputs=inputs, console=console, versions=versions, pool=pool, stop=stop
    ) as session:
        session.start_engines()
        before = session.evaluate(step=0)
        if before is not None:
            console.expect_evaluation(before.seconds)
        if not was_evaluated:  # else they were shown then
            session.show_examples(0, "before training")
        steps_done = session.train_group.fit()
        is_complete = steps_done >= session.last_step() and not stop.is_asked
        after = session.evaluate(steps_done) if is_complete else None
        if is_complete:
            session.show_examples(steps_done, "after training")
    return collect_result(config, before, after, is_complete=is_complete)


class RunSession:
    """One session of a run: its actors, from their making to their end, and who watches them.

    Args:
        config: The run's configuration.
        inputs: Its checked inputs.
        console: Shows what happens.
        versions: What nodes must have that come later.
        pool: A pool that outlives the session; None: it has its own.
        stop: What signals ask of it.
    """

    def __init__(
        self,
        *,
        config: Config,
        inputs: Inputs,
        console: Console,
        versions: AgreedVersions,
        pool: TreePoolApi | None,
        stop: Stop,
    ) -> None:
        self.config, self.inputs, self.console, self.stop = config, inputs, console, stop
        self._versions = versions
        self._ending = ExitStack()
        own: list[object] = []
        with self._ending:  # what was made ends where the rest fails
            self._ending.callback(end_actors, own, END_ACTORS_S)
            run_log: RunLogApi = make_actor(RunLog, name=f"run log of {config.run.name}")(
                setup=RunLogSetup.of(config, commit=version_of(PROJECT))
            )
            self._at_end(run_log.close.remote, "the run log")
            if pool is None:
                pool = make_pool(config, versions.check_node)
                own += [run_log, pool]  # a pool that is kept still tells the log of its engines
                self._at_end(pool.stop.remote, "the engines")
            self.actors = _make_actors(config, inputs, pool, run_log)
            own += [self.actors.gate, self.actors.weight_sync, self.actors.heartbeats]
            watchdog = self._ending.enter_context(closing(_watchdog(config, self.actors)))
            self.supervisor = Supervisor(
                run_log=self.actors.run_log, console=console, watchdog=watchdog
            )
            self._ending.callback(self.supervisor.show_last)
            self._evaluator: HeldOutEvaluator | None = None
            self._ending = self._ending.pop_all()

    def _at_end(self, stop: "Callable[[], ray.ObjectRef[None]]", name: str) -> None:
        self._ending.callback(stop_actor, stop, name, self.console)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.close()

    @property
    def train_group(self) -> "TrainGroup":
        """The train workers of this session."""
        return TrainGroup(
            limits=self.config.learner,
            fit_once=self._fit_once,
            actors=self.actors,
            supervisor=self.supervisor,
            is_stopping=lambda: self.stop.is_asked,
        )

    def start_engines(self) -> None:
        """Start the engines, unless a kept pool has them."""
        with self.console.stage(f"starting vLLM: {self.config.engine.num_engines} engine(s)"):
            self.supervisor.run(lambda: ray.get(self.actors.pool.start.remote()))

    def last_step(self) -> int:
        """The learner step that ends the run, as far as its rows tell."""
        written = ray.get(self.actors.run_log.rows_since.remote(0))
        return last_step(self.config.run, latest(written))

    def evaluate(self, step: int) -> Evaluation | None:
        """Evaluate what the engines serve now, unless the run folder holds the result of `step`;
        None without held-out problems."""
        if self.inputs.held_out is None:
            return None
        if self._evaluator is None:
            model = self.config.model
            with self.console.stage("starting the verifier"):
                evaluator = HeldOutEvaluator(
                    config=self.config,
                    prompts=self.inputs.held_out,
                    actors=self.actors,
                    tokenizer=load_tokenizer(model.path, model.trust_remote_code),
                )
                self._evaluator = self._ending.enter_context(closing(evaluator))
        return self.supervisor.run(partial(self._evaluate, self._evaluator, step))

    def show_examples(self, step: int, when: str) -> None:
        """Show a right and a wrong answer of the evaluation at `step`, where there are such."""
        found = examples(RunFolder(self.config.folder), step_name(step))
        if found:
            self.console.note(f"{when}, for example:")
        for example in found:
            for line in example.lines(self.console.width):
                self.console.note(line)

    def _evaluate(self, evaluator: HeldOutEvaluator, step: int) -> Evaluation:
        config, actors = self.config, self.actors
        result = read_evaluation(RunFolder(config.folder), step)
        if result is not None and result.is_of(config.evaluate):
            return result
        version = ray.get(actors.pool.version.remote())
        if step == 0 and version:
            raise RuntimeError("engines that served a run cannot evaluate the start of another")
        size = len(evaluator.prompts)
        title = f"evaluating on {size} problems"
        with (
            evaluation_progress(config, self.console, actors.heartbeats, title, size) as advance,
            closing(BackgroundWriter(warn=self._warn)) as writer,
        ):
            return evaluator.evaluate(step=step, version=version, advance=advance, writer=writer)

    def _warn(self, what: str, reason: str) -> None:
        self.actors.run_log.event.remote(write_failed(what, reason))

    def _fit_once(self) -> ray.train.TrainingFailedError | None:
        """Run a group of train workers to its end; returns what it failed of."""
        with (
            TemporaryDirectory(prefix="treerpo-train-", ignore_cleanup_errors=True) as storage,
            self.stop.gently(self._end_after_step),
            self.console.training(),
        ):
            try:
                trainer = make_trainer(
                    self.config, self.inputs, self.actors, storage, self._versions
                )
                self.supervisor.run(trainer.fit)
            except ray.train.TrainingFailedError as error:
                return error
        return None

    def _end_after_step(self) -> None:
        """End the run after its step, with a checkpoint. `ray job stop` waits for that as long as
        RAY_JOB_STOP_WAIT_TIME_S of the job says."""
        self.console.note("stopping after this step, with a checkpoint; once more to stop at once")
        self.actors.gate.stop.remote()


def _make_actors(
    config: Config, inputs: Inputs, pool: TreePoolApi, run_log: RunLogApi
) -> RunActors:
    """The actors of a run; all of them mostly wait."""
    shape = replace(config.shape, delimiters=inputs.delimiters)
    begun = pool.begin.remote(
        gate=config.gate,
        prompts=inputs.prompts,
        shape=shape,
        sampling=Sampling(temperature=config.tree.temperature),
        seed=config.run.seed,
        run_log=run_log,
    )
    ray.get(begun)
    run = config.run.name
    gate = make_actor(Gate, name=f"gate of {run}")(
        mixture=inputs.prompts.sets,
        trees_per_step=config.gate.trees_per_step,
        max_staleness=config.gate.max_staleness,
        num_steps=config.run.num_steps,
        seed=config.run.seed,
        num_children=config.tree.num_children,
        adapt_every=config.learner.fork_every if config.tree.adaptive else 0,
    )
    return RunActors(
        gate=gate,
        pool=pool,
        weight_sync=make_actor(WeightSync, name=f"weight sync of {run}")(
            pool=pool,
            gate=gate,
            run_log=run_log,
            folder=config.folder,
            probe_every=config.sync.probe_every,
            fetch_limit_s=config.engine.load_timeout_s,
        ),
        run_log=run_log,
        heartbeats=make_actor(Heartbeats, name=f"heartbeats of {run}")(),
    )


def _watchdog(config: Config, actors: RunActors) -> Watchdog:
    stages: dict[str, StageApi] = {
        "gate": actors.gate,
        "engines": actors.pool,
        "weight sync": actors.weight_sync,
        "metrics": actors.run_log,
    }
    return watch_over(config, stages, actors.heartbeats)
