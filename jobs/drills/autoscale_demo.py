"""Show autoscaling on one machine: a real run whose rollout nodes Ray starts and takes away.

python jobs/drills/autoscale_demo.py
python jobs/drills/autoscale_demo.py run.name=mine engine.max_engines=2  # as for train.py

The head has room for the learner only. Engines ask for rollout nodes, which Ray's own autoscaler
starts (as further Ray processes of this machine, the only part that is not as on a cloud). The
evaluations have many trees in hand, the training in between few, so that the pool grows, shrinks
and grows again. Leaves `pool.png` in the run folder.
"""

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

if TYPE_CHECKING:
    from treerpo_ray.driver.result import RunResult
    from treerpo_ray.metrics.console import Console

MARK = "TREERPO_AUTOSCALE_DEMO"
"""Variable that every process of the cluster inherits, so that none is left over."""
HEAD_ID = "f" * 51 + "00000"
"""What the provider calls the head; its nodes are numbered from there."""
MAX_NODES = 3
IDLE_MINUTES = 0.1
IDLE_WAIT_S = 90
"""Time after which a rollout node that stands idle should be gone."""
NO_COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands"),
    *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)
"""Keys of a cluster file that say how nodes are set up."""
SETTINGS = [
    str(PROJECT / "conf/quickstart.yaml"),
    *("run.name=autoscale", "run.num_steps=40", "gate.trees_per_step=6"),
    *("engine.num_engines=1", f"engine.max_engines={MAX_NODES}", "engine.max_trees=16"),
    *("engine.shrink_after_s=10", "engine.kv_cache_gib=0.125"),
    *("engine.resources={CPU: 0.2, rollout_slot: 1}", "engine.labels={role: rollout}"),
    *("learner.resources={CPU: 0.2, train_slot: 1}", "metrics.wandb_project=null"),
    *("evaluate.data.num_problems=300", "evaluate.num_samples=16", "evaluate.every=0"),
]


def show(overrides: list[str]) -> int:
    """Run the demonstration; returns the exit status. A signal takes the cluster down."""
    ask_for_token(os.environ)
    from treerpo_ray.config import load
    from treerpo_ray.driver.run import run
    from treerpo_ray.driver.start import look_at_folder
    from treerpo_ray.metrics.console import Console
    from treerpo_ray.preflight.inputs import load_inputs
    from treerpo_ray.preflight.machine import check_vllm
    from treerpo_ray.stop import STOPPED

    config = load([*SETTINGS, *overrides])
    check_vllm(config)
    earlier, inputs = look_at_folder(config), load_inputs(config)
    console = Console()
    result = on_growing_cluster(lambda: run(config, inputs, earlier, console), console)
    draw(config.folder)
    console.note(f"nodes, engines and trees over time: {config.folder}/pool.png")
    return 0 if result.is_complete else STOPPED


def ask_for_token(environment: "MutableMapping[str, str]") -> None:
    """Let only who knows a random token talk to Ray, whose nodes listen on every interface."""
    environment.setdefault("RAY_AUTH_MODE", "token")
    environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def draw(folder: str) -> None:
    """Write `pool.png` into a run folder."""
    from treerpo_ray.study.analysis import Run
    from treerpo_ray.study.plots import plot_pool

    plot_pool(Run(folder)).savefig(f"{folder}/pool.png", dpi=120)


def head_environment(given: Mapping[str, str], mark: str) -> dict[str, str]:
    """That of the head's processes, and so of all nodes: what this command was given, and a mark
    by which they are found."""
    return {
        **given,
        MARK: mark,
        "PATH": f"{Path(sys.executable).parent}:{given['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }


def start_head(folder: str, environment: Mapping[str, str]) -> str:
    """Start a head that works in `folder`; returns its address.

    Raises:
        RuntimeError: it did not start; with what Ray says.
    """
    listeners = (
        "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
    )  # fmt: skip
    ports = dict(zip(listeners, free_ports(len(listeners)), strict=True))
    address = f"127.0.0.1:{ports['port']}"
    config = Path(folder, "cluster.json")
    config.write_text(json.dumps(_cluster_config(address)))
    command = [
        *("ray", "start", "--head", "--node-ip-address=127.0.0.1"),
        *("--num-cpus=1", "--num-gpus=0", '--resources={"train_slot": 1}'),
        *(f"--temp-dir={folder}", f"--autoscaling-config={config}", "--disable-usage-stats"),
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the head did not start: {done.stderr or done.stdout}")
    return address


@contextmanager
def autoscaling_cluster(
    start: Callable[[str, Mapping[str, str]], str] = start_head,
) -> Iterator[str]:
    """A head with an autoscaler and no rollout node, as `start` starts it; yields its address."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as folder:
        try:
            yield start(folder, head_environment(os.environ, mark))
        finally:
            _end_processes(f"{MARK}={mark}")


def _cluster_config(address: str) -> dict[str, object]:
    """The cluster as its autoscaler sees it."""
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "autoscale-demo",
        "max_workers": MAX_NODES,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": module,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": 1, "train_slot": 1},
                "node_config": {},
                "max_workers": 0,
            },
            "rollout": {
                "resources": {"CPU": 1, "rollout_slot": 1},
                "labels": {"role": "rollout"},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MAX_NODES,
            },
        },
        "head_node_type": "ray.head.default",
        # Nothing is set up on the nodes, but Ray has no defaults for a provider of this type.
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{name: [] for name in NO_COMMANDS},
    }


def wait_until_idle(address: str) -> None:
    """Return once only the head is left.

    Raises:
        TimeoutError: a node was not taken away.
    """
    from treerpo_ray.driver.cluster import session
    from treerpo_ray.engine.autoscaler import see_nodes

    with session(address=address, logging_level=logging.WARNING):
        deadline = time.monotonic() + IDLE_WAIT_S
        while see_nodes().num_alive > 1:
            if time.monotonic() > deadline:
                raise TimeoutError("an idle rollout node was not taken away")
            time.sleep(0.5)


def on_growing_cluster(
    train: "Callable[[], RunResult]",
    console: "Console",
    start: Callable[[str, Mapping[str, str]], str] = start_head,
    wait: Callable[[str], object] = wait_until_idle,
) -> "RunResult":
    """Have a run trained on a cluster that comes and goes with it, until no rollout node is left;
    a signal takes the cluster down.

    Args:
        train: Trains on the cluster that `RAY_ADDRESS` names.
        console: Told how long the last rollout node stayed.
        start: Starts the head of the cluster.
        wait: Waits until its rollout nodes are gone.
    """
    from treerpo_ray.stop import Stop

    with Stop().at_work(), autoscaling_cluster(start) as address:
        os.environ["RAY_ADDRESS"] = address
        result = train()
        trained = time.monotonic()
        wait(address)
        console.note(f"no rollout node is left {time.monotonic() - trained:.0f} s after the run")
    return result


def free_ports(number: int) -> list[int]:
    """Different ports that nothing listens on."""
    with ExitStack() as held:  # all at once, or one might come twice
        probes = [held.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _end_processes(variable: str) -> None:
    """End the processes that inherited an environment variable."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and variable.encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue  # it ended meanwhile, or is another user's


def main(overrides: list[str]) -> int:
    """Run the command; returns the exit status."""
    from treerpo_ray.errors import run_command

    return run_command(show, overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
