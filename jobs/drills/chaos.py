"""Failure drill: a real training whose engines, learners, verifiers and nodes die or hang.

python jobs/drills/chaos.py                    # 20 kills, at most 15 minutes on two cores
python jobs/drills/chaos.py --kills 6 --steps 9 run.seed=1 run.root=/tmp/drills
python jobs/drills/chaos.py --kills 3 --steps 5 --victims node,learner
Ends with a table of what was killed and how long it took to be made good, and one line of JSON;
the exit status is 1 if a ticket was lost or doubled, a bound was broken, something is stale, what
was killed is still there or not made good, or it took longer than `--minutes`. The run is stopped
by Ctrl-C once it has done `--steps` learner steps and all is made good.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a job has only a working folder

import psutil
import rich.console
import rich.table
from ray.cluster_utils import Cluster

from jobs.drills.kills import Kill, Victim, draw_schedule, recovery_s, serving, victims
from treerpo_ray.config import Config, load
from treerpo_ray.errors import run_command
from treerpo_ray.metrics.events import EVENTS_FILE
from treerpo_ray.metrics.rows import latest_rows
from treerpo_ray.run_folder.files import RunFolder, Scalar
from treerpo_ray.stop import STOPPED, Stop, held_back
from treerpo_ray.study.audit import Fields, as_int, faults

PROJECT = Path(__file__).resolve().parents[2]
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}
"""Else Ray takes minutes to see that a node is gone."""


TAKES_DOWN = {
    "engine_serving": {Victim.ENGINE, Victim.CORE, Victim.HUNG_CORE, Victim.NODE},
    "learner_started": {Victim.LEARNER},
    "verifier_started": {Victim.VERIFIER, Victim.LEARNER},
}
"""Whose end is also that of what an event says to be up."""
ENDLESS = 10_000
"""Learner steps of a run that the drill ends."""
POLL_S = 0.2
"""Time between looks at the run folder."""
GONE_S = 60.0
"""Time that a process gets to be gone, once the run has ended."""
SMALL = [
    *("prompts.num_problems=256", "evaluate.data.path=''", "metrics.wandb_project=null"),
    *("gate.trees_per_step=6", "gate.max_staleness=1", "checkpoint.every=1"),
    *("engine.num_engines=2", "engine.resources={CPU: 0.1, rollout_slot: 1}"),
    *("engine.kv_cache_gib=0.125", "engine.request_timeout_s=120", "run.stall_timeout_s=300"),
    *("engine.load_timeout_s=30", "learner.num_workers=2"),
    "learner.resources={CPU: 0.1, train_slot: 0.5}",
]
"""The quickstart, small enough to be killed often; each node holds one engine."""


class Drill:
    """Kills what `schedule` names while a run goes on; nothing but processes that it recorded.

    Args:
        config: The run's.
        cluster: Where it runs.
        schedule: Learner steps after which something dies, and what.
        num_steps: Learner steps after which the run is stopped.
    """

    def __init__(
        self,
        *,
        config: Config,
        cluster: Cluster,
        schedule: list[tuple[int, Victim]],
        num_steps: int,
    ) -> None:
        self.num_steps = num_steps
        self.config, self.cluster, self.schedule = config, cluster, schedule
        self.kills: list[Kill] = []

    def run(self, training: subprocess.Popen[bytes], end: float) -> None:
        """Kill while `training` lasts, then stop it; at the monotonic time `end` it is killed."""
        for step, victim in self.schedule:
            while training.poll() is None and time.monotonic() < end:
                time.sleep(POLL_S)
                if self._steps_done() >= step and (kill := self._kill(victim)):
                    self.kills.append(kill)
                    print(f"killed: {victim}, pid {kill.pid}", file=sys.stderr)
                    break
        while training.poll() is None and time.monotonic() < end and not self._is_over():
            time.sleep(POLL_S)
        if training.poll() is None and time.monotonic() < end:
            training.send_signal(signal.SIGINT)
        try:
            training.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            training.kill()
            training.wait()

    def _steps_done(self) -> int:
        rows = latest_rows(RunFolder(self.config.folder))
        return int(rows[-1]["step"]) if rows else 0

    def _is_over(self) -> bool:
        """Whether all is made good, and the run has gone on as far as it should."""
        events = RunFolder(self.config.folder).read_lines(EVENTS_FILE)
        are_good = all(recovery_s(kill, events) is not None for kill in self.kills)
        return are_good and self._steps_done() >= self.num_steps

    def _kill(self, victim: Victim) -> Kill | None:
        """Kill one of its kind; None if none is up."""
        events = RunFolder(self.config.folder).read_lines(EVENTS_FILE)
        if victim is Victim.NODE:
            return self._kill_node(events)
        is_core = victim in (Victim.CORE, Victim.HUNG_CORE)
        if victim is Victim.ENGINE or is_core:
            up: Sequence[Fields] = list(serving(events).values())
        else:
            kind = "learner_started" if victim is Victim.LEARNER else "verifier_started"
            up = [event for event in events if event["kind"] == kind][-1:]
        # The one that has been up longest, so that none is spared.
        for event in sorted(
            filter(self._is_whole, up), key=lambda event: float(str(event["time"]))
        ):
            pid, engine = event["core" if is_core else "pid"], event.get("engine")
            assert isinstance(pid, int) and isinstance(engine, int | None)
            try:
                os.kill(pid, signal.SIGSTOP if victim is Victim.HUNG_CORE else signal.SIGKILL)
            except ProcessLookupError:
                continue  # its end is not in the events yet
            return Kill(time=time.time(), victim=victim, pid=pid, engine=engine)
        return None

    def _is_whole(self, up: Fields) -> bool:
        """Whether nothing that this event says to be up was killed since."""
        return all(
            kill.time < float(str(up["time"]))
            for kill in self.kills
            if kill.victim in TAKES_DOWN[str(up["kind"])] and kill.engine == up.get("engine")
        )

    def _kill_node(self, events: list[dict[str, Scalar]]) -> Kill | None:
        """Kill the node that an engine is on, and put another in its place."""
        [node] = self.cluster.worker_nodes
        raylet = raylet_pid(node)
        up = {engine: event for engine, event in serving(events).items() if self._is_whole(event)}
        on_it = [engine for engine, event in up.items() if parent_pid(event["pid"]) == raylet]
        if not on_it:
            return None
        kill = Kill(time=time.time(), victim=Victim.NODE, pid=raylet, engine=on_it[0])
        self.cluster.remove_node(node, allow_graceful=False)
        add_node(self.cluster)
        return kill


def raylet_pid(node: object) -> int:
    """Process id of a node's raylet."""
    [raylet] = node.all_processes["raylet"]  # type: ignore[attr-defined]  # Ray's own, untyped
    return raylet.process.pid


def parent_pid(pid: Scalar) -> int | None:
    """Parent of a process; None if it is gone. That of an actor is its node's raylet."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return None


def add_node(cluster: Cluster) -> None:
    """Add the node that may go, with room for one engine."""
    cluster.add_node(num_cpus=1, resources={"rollout_slot": 1})


@contextmanager
def small_cluster(make: Callable[[], Cluster] = Cluster) -> Iterator[Cluster]:
    """A head with the learners and one engine, and a node with the other, of a cluster that `make`
    makes and that has none yet."""
    # Ray listens on every interface: only who knows the token may talk to this one.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = make()
    try:
        with held_back():  # half of Ray is hard to end
            cluster.add_node(
                num_cpus=2,
                resources={"rollout_slot": 1, "train_slot": 1},
                include_dashboard=False,
                _system_config=HEALTH,
            )
            add_node(cluster)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        cluster.shutdown()


def train_on_cluster(
    command: list[str],
    cluster: AbstractContextManager[Cluster],
    work: Callable[[Cluster, subprocess.Popen[bytes]], object],
) -> int:
    """Start a job on a cluster and do `work` with both; returns the job's exit status.

    Whatever comes, a signal too, the job is ended after that, and the cluster is taken down.
    """
    with Stop().at_work(), cluster as there:
        job = subprocess.Popen(command, stdout=sys.stderr)
        try:
            work(there, job)
        finally:
            job.kill()  # does nothing once it has ended
            job.wait()
    return job.returncode


def unrepaired(kills: list[Kill], recoveries: list[float | None], end: float) -> list[str]:
    """The kills that were not made good by the `end` of the run."""
    return [
        f"{kill.victim}, pid {kill.pid}, was not made good in {end - kill.time:.0f} s"
        for kill, recovery in zip(kills, recoveries, strict=True)
        if recovery is None
    ]


def left_over(kills: list[Kill]) -> list[str]:
    """What was killed, or hung and was replaced, and holds its memory still."""
    return [f"{kill.victim}, pid {kill.pid}, is still there" for kill in kills if _lives(kill.pid)]


def _lives(pid: int) -> bool:
    """Whether there is such a process; it gets a while to go."""
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(POLL_S)
    return True


def report(
    config: Config,
    kills: list[Kill],
    recoveries: list[float | None],
    problems: list[str],
    start: float,
    seconds: float,
) -> None:
    """The table on stderr, with times from the `start` of the run; one line of JSON on stdout."""
    table = rich.table.Table("time", "killed", "pid", "engine", "made good after", box=None)
    for kill, recovery in zip(kills, recoveries, strict=True):
        engine = "" if kill.engine is None else str(kill.engine)
        good = "not before the end" if recovery is None else f"{recovery:.1f} s"
        table.add_row(f"{kill.time - start:.0f} s", kill.victim, str(kill.pid), engine, good)
    console = rich.console.Console(file=sys.stderr)
    console.print(table)
    for problem in problems:
        console.print(f"broken: {problem}", markup=False)
    summary = {
        "run": config.folder,
        "kills": {v.value: sum(kill.victim is v for kill in kills) for v in Victim},
        "seconds": round(seconds, 1),
        "recoveries": [
            asdict(kill) | {"recovery_s": None if s is None else round(s, 2)}
            for kill, s in zip(kills, recoveries, strict=True)
        ],
        "broken": problems,
    }
    print(json.dumps(summary))


def drill(arguments: list[str]) -> int:
    """Run the drill; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument(
        "--victims", type=victims, default=list(Victim), help="default: " + ",".join(Victim)
    )
    parser.add_argument("--minutes", type=float, default=15, help="the longest that it may take")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    arguments = [
        *(str(PROJECT / "conf/quickstart.yaml"), f"run.name=chaos-{time.time_ns()}", *SMALL),
        *(f"run.num_steps={ENDLESS}", *options.overrides),
    ]
    config = load(arguments)
    start, limit_s = time.monotonic(), 60 * options.minutes
    schedule = draw_schedule(options.kills, options.steps, config.run.seed, options.victims)
    command = [sys.executable, str(PROJECT / "jobs/train.py"), *arguments]
    kills: list[Kill] = []

    def work(cluster: Cluster, training: subprocess.Popen[bytes]) -> None:
        run = Drill(config=config, cluster=cluster, schedule=schedule, num_steps=options.steps)
        run.run(training, start + limit_s)
        kills.extend(run.kills)

    status = train_on_cluster(command, small_cluster(), work)
    seconds = time.monotonic() - start
    events = RunFolder(config.folder).read_lines(EVENTS_FILE)
    times = [float(str(event["time"])) for event in events] or [0.0]
    recoveries = [recovery_s(kill, events) for kill in kills]
    done = [as_int(event["step"]) + 1 for event in events if event["kind"] == "consumed"]
    as_run = replace(config, run=replace(config.run, num_steps=max(done, default=1)))
    problems = [*faults(as_run, events), *unrepaired(kills, recoveries, times[-1])]
    problems += left_over(kills)
    if status != STOPPED:
        problems.append(f"the job ended with status {status}")
    if len(kills) < len(schedule):
        problems.append(f"{len(kills)} kills, should be {len(schedule)}")
    if seconds > limit_s:
        problems.append(f"it took {seconds:.0f} s, should be at most {limit_s:.0f} s")
    report(config, kills, recoveries, problems, times[0], seconds)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_command(drill, sys.argv[1:]))
