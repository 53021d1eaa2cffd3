"""Training: wires the stages together and follows the run; reads like the algorithm.

gate ──► engine pool ──► tree stream (scoring) ──► train workers ──► weight sync ──► engines
"""

import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory

import ray
import ray.train

from treerpo_ray.actor import make_actor
from treerpo_ray.config import Config
from treerpo_ray.config.files import to_yaml
from treerpo_ray.driver.cluster import connected
from treerpo_ray.driver.outcome import (
    RunResult,
    collect_outcome,
    finished_outcome,
    root_cause,
)
from treerpo_ray.driver.plan import Inputs
from treerpo_ray.driver.supervisor import Supervisor, evaluation_progress, stop_actor
from treerpo_ray.driver.trainer import make_trainer
from treerpo_ray.errors import RunFailed
from treerpo_ray.evaluate.evaluation import Evaluation, read_evaluation
from treerpo_ray.evaluate.grading import evaluate
from treerpo_ray.metrics.console import Console
from treerpo_ray.metrics.run_log import Event, RunLog, RunLogApi, last_step, latest, write_failed
from treerpo_ray.metrics.watchdog import Heartbeats, StageApi, Watchdog, watch_over
from treerpo_ray.prompts.prompt_set import load_tokenizer
from treerpo_ray.run_folder.files import CONFIG_FILE, RunFolder
from treerpo_ray.run_folder.lock import only_writer
from treerpo_ray.run_folder.logs import output_to_log
from treerpo_ray.run_folder.writer import BackgroundWriter
from treerpo_ray.scoring import Scorer
from treerpo_ray.search.gate import Gate
from treerpo_ray.search.tree_pool import TreePool
from treerpo_ray.task import GateApi, RunActors, TreePoolApi
from treerpo_ray.weight_sync import WeightSync

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(
    config: Config, inputs: Inputs, console: Console, pool: TreePoolApi | None = None
) -> RunResult:
    """Run, resume or just report what `config` describes, on the cluster that is there.

    `pool` is that of `kept_engines`, for one run of several that share engines.

    Raises:
        ValueError: the cluster lacks resources for it, or another job writes its folder.
        RunFailed: something failed for good; the same command goes on from the last checkpoint.
    """
    try:
        outcome = finished_outcome(config)
    except OSError as error:
        raise RunFailed(f"{config.folder} cannot be read: {error}") from error
    if outcome is not None:
        console.note("this run is complete; another run.name starts a new one")
        return outcome
    folder = RunFolder(config.folder)
    with only_writer(folder), output_to_log(folder):
        try:
            if pool is not None:
                return train(config, inputs, console, pool)
            with connected(config):
                return train(config, inputs, console)
        except Exception as error:
            if isinstance(error, ValueError) and not isinstance(error, ray.exceptions.RayError):
                raise
            traceback.print_exc()
            raise RunFailed(
                f"{root_cause(error)}; traces are in {config.folder}/logs, the same command goes "
                "on from the last checkpoint"
            ) from error


@contextmanager
def kept_engines(config: Config) -> Iterator[TreePoolApi]:
    """A Ray session and an engine pool for runs one after the other, whom `can_serve` allows."""
    with connected(config):
        pool = _make_pool(config)
        try:
            yield pool
        finally:
            stop_actor(pool.stop.remote, "engine pool")


def train(
    config: Config, inputs: Inputs, console: Console, pool: TreePoolApi | None = None
) -> RunResult:
    """Run or resume a training on the Ray cluster that is connected, with a pool kept or its own.

    Raises:
        ray.exceptions.RayError, RuntimeError: something failed for good; the run folder holds
            the last checkpoint, and the same command goes on from it.
    """
    RunFolder(config.folder).publish_file(CONFIG_FILE, to_yaml(config).encode())
    actors = _build(config, inputs, pool)
    scorer = None
    try:
        with closing(_watchdog(config, actors)) as dog:
            supervisor = Supervisor(actors.run_log, console, dog)
            with console.progress(f"starting {config.engine.num_engines} engine(s)", None):
                supervisor.run(lambda: ray.get(actors.pool.start.remote()))
            if inputs.held_out is not None:
                tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
                scorer = Scorer(config, tokenizer)

            def evaluated(step: int) -> Evaluation | None:
                return supervisor.run(
                    lambda: _evaluate(config, inputs, actors, scorer, console, step)
                )

            before = evaluated(0)
            steps_done = _fit(config, inputs, actors, supervisor)
            written = ray.get(actors.run_log.rows_since.remote(0))
            rows = latest(written)
            is_complete = steps_done >= last_step(config.run, rows)
            after = evaluated(steps_done) if is_complete else None
    finally:
        if scorer is not None:
            scorer.close()
        if pool is None:
            stop_actor(actors.pool.stop.remote, "engine pool", console)
        stop_actor(actors.run_log.close.remote, "run log", console)
    return collect_outcome(config, before, after, is_complete=is_complete)


def _build(config: Config, inputs: Inputs, pool: TreePoolApi | None) -> RunActors:
    """The actors of a run; all of them mostly wait."""
    shape = replace(config.shape, delimiters=inputs.delimiters)
    run_log: RunLogApi = make_actor(RunLog, concurrency=1)(config)
    pool = pool or _make_pool(config)
    ray.get(pool.begin.remote(config, inputs.prompts, shape, run_log))
    gate = make_actor(Gate)(
        num_prompts=len(inputs.prompts),
        trees_per_step=config.gate.trees_per_step,
        max_staleness=config.gate.max_staleness,
        num_steps=config.run.num_steps,
        seed=config.run.seed,
        revisit=config.gate.revisit,
    )
    return RunActors(
        gate=gate,
        pool=pool,
        weight_sync=make_actor(WeightSync)(pool=pool, probe_every=config.sync.probe_every),
        run_log=run_log,
        heartbeats=make_actor(Heartbeats, concurrency=1)(),
    )


def _make_pool(config: Config) -> TreePoolApi:
    return make_actor(TreePool)(config, config.log_folder)


def _fit(config: Config, inputs: Inputs, actors: RunActors, supervisor: Supervisor) -> int:
    """Run the train workers and follow them; returns the learner steps that are done.

    A group that failed is started again from the last checkpoint, with whatever workers there are.
    """
    failures = reached = 0
    fewest, most = config.learner.fewest_workers, config.learner.num_workers
    number = f"{most}" if fewest == most else f"{fewest} to {most}"
    while True:
        supervisor.console.note(f"starting {number} train worker(s)")
        error = _fit_once(config, inputs, actors, supervisor)
        done = ray.get(actors.gate.done.remote())
        if error is None:
            return done
        failures = 1 if done > reached else failures + 1
        reached = max(done, reached)
        is_over = failures > config.learner.max_failures
        wait_s = 0.0 if is_over else restart_wait_s(failures)
        lost: dict[str, str | float] = {"step": done, "failures": failures, "wait_s": wait_s}
        lost["cause"] = root_cause(error)
        ray.get(actors.run_log.event.remote(Event(kind="learner_lost", fields=lost)))
        if is_over:
            raise error
        ray.get(actors.heartbeats.forget.remote("learner"))
        supervisor.run(partial(time.sleep, wait_s))


def _fit_once(
    config: Config, inputs: Inputs, actors: RunActors, supervisor: Supervisor
) -> ray.train.TrainingFailedError | None:
    """Run a group of train workers to its end; returns what it failed of."""
    with (
        TemporaryDirectory(prefix="treerpo-train-", ignore_cleanup_errors=True) as storage,
        stop_on_signal(actors.gate, supervisor.console),
    ):
        try:
            supervisor.run(make_trainer(config, inputs, actors, storage).fit)
        except ray.train.TrainingFailedError as error:
            return error
    return None


def restart_wait_s(failures: int) -> float:
    """Seconds before a group is started again that failed so many times without progress.

    The first time it may well be one machine that was lost, and nothing to wait for; later it is
    likely something that all need, such as the store, and takes a while to come back.
    """
    return 1.0 if failures == 1 else min(60.0, 5.0 * 2**failures)


def _watchdog(config: Config, actors: RunActors) -> Watchdog:
    stages: dict[str, StageApi] = {
        "gate": actors.gate,
        "engines": actors.pool,
        "weight sync": actors.weight_sync,
        "metrics": actors.run_log,
    }
    return watch_over(config, stages, actors.heartbeats)


@contextmanager
def stop_on_signal(gate: GateApi, console: Console) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint; the second at
    once. `ray job stop` waits for it as long as RAY_JOB_STOP_WAIT_TIME_S of the job says."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        console.note("stopping after this step, with a checkpoint; once more to stop at once")
        gate.stop.remote()
        for each in STOP_SIGNALS:
            signal.signal(each, signal.default_int_handler)

    # Ray's own handler of SIGTERM, which ends the driver at once, stands before and after.
    previous = {each: signal.signal(each, stop) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _evaluate(
    config: Config,
    inputs: Inputs,
    actors: RunActors,
    scorer: Scorer | None,
    console: Console,
    step: int,
) -> Evaluation | None:
    """Evaluate what the engines serve now, unless the run folder holds the result."""
    if inputs.held_out is None or scorer is None:
        return None
    result = read_evaluation(RunFolder(config.folder), step)
    if result is not None:
        return result
    version = ray.get(actors.pool.version.remote())
    if step == 0 and version:
        raise RuntimeError("engines that have served a run cannot evaluate the start of another")
    num_problems = len(inputs.held_out)
    title = f"evaluating on {num_problems} problems"
    warn = lambda *why: actors.run_log.event.remote(write_failed(*why))  # noqa: E731
    with (
        evaluation_progress(config, console, actors.heartbeats, title, num_problems) as advance,
        closing(BackgroundWriter(warn)) as writer,
    ):
        return evaluate(
            config,
            inputs.held_out,
            actors.pool,
            actors.run_log,
            scorer,
            step=step,
            version=version,
            advance=advance,
            writer=writer,
        )
