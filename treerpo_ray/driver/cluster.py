"""Cluster: what Ray has of what a run needs, and the connection to it."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
import ray
from ray._private import services, utils
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import state as ray_state
from ray.autoscaler.sdk import request_resources
from ray.core.generated import gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from treerpo_ray.config import Config
from treerpo_ray.driver.versions import AgreedVersions, check_versions
from treerpo_ray.errors import one_line
from treerpo_ray.preflight.machine import GIB, check_gpus, machine_gib
from treerpo_ray.preflight.placement import (
    Node,
    Stage,
    check_places,
    missing_resources,
    needed_resources,
    stages,
    total,
)
from treerpo_ray.stop import held_back

log = logging.getLogger(__name__)


LOOK_EVERY_S = 15.0
"""Time between looks at a cluster that is still starting."""


HEAD_S = 30.0
"""Time for the head of a cluster to answer; one that has just been started takes some."""


HEAD_POLL_S = 5.0
"""Time between attempts to reach it."""


TOKEN_WARNING = "ray._private.authentication.authentication_token_setup"
"""Logger of Ray's warning that a cluster asks for a token."""


RUNTIME_ENV = {
    "env_vars": {
        # Ray Data notices metadata that it fetches on a thread when the next block comes, or after
        # 0.1 s: a share of the tree stream would always wait that long, since the next one comes a
        # step later.
        "RAY_DATA_METADATA_PREFETCH_ON_THREAD": "0",
        # After a node was lost, Ray Train counts on it for up to 20 s more, and would then wait a
        # minute for a place that is not there before it starts the workers that there is room for.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
        # It tells training functions of nodes that leave, and ours does not ask: one process less.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
}
"""Settings of Ray's own libraries, in all processes of a job."""


def local_resources(config: Config, *, cpus: int, gpus: int) -> dict[str, float]:
    """What a cluster started on a machine of so many CPUs and GPUs would have; role slots are
    declared as far as needed."""
    return {"CPU": cpus, "GPU": gpus, **_local_slots(config)}


def _local_slots(config: Config) -> dict[str, float]:
    needed = needed_resources(config, config.engine.most)
    return {name: needed[name] for name in needed if name.endswith("_slot")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Available:
    """What there is of what a run needs."""

    where: str
    resources: dict[str, float]
    nodes: tuple[Node, ...]
    memory_gib: float
    """Of this machine, or of the node that has most."""


def look_at_resources(config: Config) -> Available:
    """What the cluster has that `RAY_ADDRESS` names, or this machine, where a run starts its own.

    Raises:
        ValueError: nothing answers at `RAY_ADDRESS`, or it does not let us in.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        import torch

        cpus, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
        found = local_resources(config, cpus=cpus, gpus=gpus)
        here = Node(found, config.engine.labels)  # a cluster of one's own has them
        return Available(
            where="this machine", resources=found, nodes=(here,), memory_gib=machine_gib()
        )
    await_head(address, patience_s=0.0)
    with ExitStack() as ends:
        try:
            ends.enter_context(session(logging_level=logging.ERROR))
        except (ConnectionError, RuntimeError) as error:  # such as a token that is not right
            raise ValueError(f"RAY_ADDRESS={address}: {one_line(error)}") from error
        nodes = _nodes()
        has = [node.resources for node in nodes]
        # Ray keeps what it shares objects in apart from what it gives to processes.
        memory = [each.get("memory", 0) + each.get("object_store_memory", 0) for each in has]
        return Available(
            where=f"the cluster at {address}, {len(nodes)} node(s)",
            resources=ray.cluster_resources(),
            nodes=nodes,
            memory_gib=max(memory, default=0) / GIB,
        )


class BeginSession(Protocol):
    """As `ray.init`, whose settings these are."""

    def __call__(self, *, log_to_driver: bool, **settings: Any) -> object: ...


class RequestResources(Protocol):
    """Asks the autoscaler for bundles of resources, in the place of those before."""

    def __call__(self, *, bundles: list[dict[str, float]]) -> object: ...


@contextmanager
def connected(config: Config, *, trains: bool = True) -> Iterator[AgreedVersions]:
    """Connect to the cluster that the environment names, or start one here for the while; yields
    what its nodes have.

    Raises:
        ValueError: nothing answers at `RAY_ADDRESS`, the GPUs here cannot be used, the run needs
            more than the cluster has, or its nodes differ; names what and where to change it.
    """
    begin: BeginSession = ray.init
    where: dict[str, Any] = {}
    if address := os.environ.get("RAY_ADDRESS"):
        await_head(address)
    else:
        check_gpus(config)
        # Ray listens on every interface, and who may talk to it may run code. Unless told
        # otherwise it asks for a token: one that only the processes of this run know.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray warns of that, with the words to turn it off, which nobody should.
        logging.getLogger(TOKEN_WARNING).setLevel(logging.ERROR)
        begin = _init_here
        where |= {"resources": _local_slots(config), "labels": config.engine.labels}
    with session(
        begin,
        logging_level=logging.WARNING,
        runtime_env=RUNTIME_ENV,
        job_config=ray.job_config.JobConfig(metadata={"treerpo_run": config.run.name}),
        **where,
    ):
        with places_held(config, trains=trains):
            versions = (
                check_versions(stages(config, config.engine.most, trains=trains))
                if address
                else AgreedVersions.of_this_node()
            )
        yield versions


@contextmanager
def session(
    begin: BeginSession = ray.init,
    end: Callable[[], object] = ray.shutdown,
    **settings: Any,
) -> Iterator[None]:
    """A session of Ray, as every process begins one, with these settings of `ray.init`.

    A signal is heeded once it has begun, as half of Ray is hard to end. Ray's own handler of
    SIGTERM would end the driver at once: it is left out.
    """
    try:
        with held_back(), _replaced(utils, "set_sigterm_handler", lambda handler: None):
            begin(log_to_driver=False, **settings)
        yield
    finally:
        end()


def _init_here(**settings: Any) -> None:
    """Start Ray on this machine and connect to it."""
    with _replaced(services, "ConsolePopen", _Apart):
        ray.init(address="local", include_dashboard=False, **settings)


class _Apart(services.ConsolePopen):
    """A process of Ray in a session of its own.

    Ray only keeps Ctrl-C from its processes. Of a SIGTERM to the driver's whole group, as cluster
    managers send it, they would end before the driver has its checkpoint; they end with the driver
    in any case.
    """

    def __init__(self, *command: Any, **settings: Any) -> None:
        super().__init__(*command, **settings | {"start_new_session": True})


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Have a module of Ray call something else meanwhile."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def await_head(address: str, patience_s: float = HEAD_S) -> None:
    """Wait until Ray answers at `host:port`; Ray itself would wait for minutes, in silence.

    Raises:
        ValueError: nothing listens there or it is not Ray, or it asks for another token.
    """
    if address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS={address}: a run cannot be driven from outside its cluster: use `ray job "
            "submit`, or host:port of the head on one of its machines"
        )
    found = address
    if address == "auto":
        try:
            found = services.canonicalize_bootstrap_address_or_die(address)
        except ConnectionError as error:
            raise ValueError(f"RAY_ADDRESS={address}: {one_line(error)}") from error
    place = urlsplit(found if "://" in found else f"//{found}")
    try:
        host, port = place.hostname, place.port
    except ValueError as error:
        raise ValueError(f"RAY_ADDRESS={address}: {error}") from error
    if host is None or port is None:  # such as "local"
        return
    end = time.monotonic() + patience_s
    while (fault := _fault_of_head(host, port, end)) is not None:
        left_s = end - time.monotonic()
        if left_s <= 0:
            raise ValueError(
                f"RAY_ADDRESS={address}: {fault}; start the cluster, or unset RAY_ADDRESS to run "
                "on this machine alone"
            )
        log.warning("waiting for Ray at %s, for %.0f s more: %s", address, left_s, fault)
        time.sleep(min(HEAD_POLL_S, left_s))


NO_RAY = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
"""What something else than Ray's control store answers; it will not become one."""
OTHER_TOKEN = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def _fault_of_head(host: str, port: int, end: float) -> str | None:
    """Why there is no Ray at an address, which may come; None if it answers.

    Args:
        host: Name or address of its head.
        port: That its control store listens at.
        end: Time of the monotonic clock until which an answer is waited for.

    Raises:
        ValueError: it will not come.
    """
    left_s = max(end - time.monotonic(), 0.1)
    try:
        socket.create_connection((host, port), timeout=min(LOOK_EVERY_S, left_s)).close()
    except OSError as error:
        return f"nothing answers there ({one_line(error)})"
    with init_grpc_channel(f"{host}:{port}") as channel:
        store = NodeInfoGcsServiceStub(channel)
        try:
            # The first seconds of a head go by before it listens; an answer takes milliseconds.
            request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
            store.CheckAlive(request, timeout=min(LOOK_EVERY_S, left_s))
        except grpc.RpcError as error:
            code = error.code()
            if code in OTHER_TOKEN:
                raise ValueError(
                    f"RAY_ADDRESS={host}:{port}: Ray is there and asks for another token: set "
                    "RAY_AUTH_MODE and RAY_AUTH_TOKEN as on the cluster"
                ) from error
            if code in NO_RAY:
                raise ValueError(f"RAY_ADDRESS={host}:{port}: what listens there is not Ray") from (
                    error
                )
            return f"what listens there does not answer as Ray does ({code.name.lower()})"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a cluster can hold."""

    resources: Mapping[str, float]
    """Of all nodes that are there."""
    most: Mapping[str, float] | None
    """What it says that it may grow to; few autoscalers do (Ray's own for VMs and Kubernetes do
    not)."""
    nodes: Sequence[Node]


def look_at_capacity() -> Capacity:
    """That of the cluster that this process is connected to."""
    return Capacity(
        resources=ray.cluster_resources(),
        most=ray_state.get_max_resources_from_cluster_config(),
        nodes=_nodes(),
    )


def _nodes() -> tuple[Node, ...]:
    """Those of the cluster that this process is connected to."""
    return tuple(Node(n["Resources"], n["Labels"]) for n in ray.nodes() if n["Alive"])


@contextmanager
def places_held(
    config: Config,
    *,
    trains: bool,
    look: Callable[[], Capacity] = look_at_capacity,
    request: RequestResources = request_resources,
    look_every_s: float = LOOK_EVERY_S,
) -> Iterator[None]:
    """Wait until all that the run starts with has a place on the cluster, and keep its nodes for
    the while; a cluster that grows by itself may still be starting its first.

    What is to be there from the start is asked of the autoscaler, which may have no node of its
    kind yet and would wait for a demand, as this would for a node.

    Args:
        config: Of the run.
        trains: Whether it has a learner.
        look: Tells what the cluster can hold.
        request: Asks its autoscaler for `bundles` of resources, in the place of those before.
        look_every_s: Time between two looks.

    Raises:
        ValueError: something has no place; names what is lacking and whose it is.
    """
    patience_s = config.engine.start_timeout_s if _may_grow(config) else 0.0
    end = time.monotonic() + patience_s
    starting = starting_stages(config, trains=trains)
    has_asked = False
    try:
        while True:
            try:
                check_capacity(starting, look())
                break
            except ValueError as error:
                if time.monotonic() >= end:
                    raise
                left_s = end - time.monotonic()
                log.warning("waiting for nodes, for %.0f s more: %s", left_s, error)
            if not has_asked:
                request(bundles=[s.resources for s in starting for _ in range(s.count)])
                has_asked = True
            time.sleep(min(look_every_s, patience_s))
        yield
    finally:
        if has_asked:
            request(bundles=[])  # from here on the stages ask themselves


def _may_grow(config: Config) -> bool:
    return config.engine.max_engines is not None and bool(os.environ.get("RAY_ADDRESS"))


def starting_stages(config: Config, *, trains: bool) -> list[Stage]:
    """What must have a place before the run starts.

    Few autoscalers say what they could add, so the engines of a pool that may grow are taken on
    trust on a cluster that was there before: they wait for nodes, say so, and fail the start after
    `engine.start_timeout_s`.
    """
    num_engines = 0 if _may_grow(config) else config.engine.num_engines
    learner = replace(config.learner, num_workers=config.learner.fewest_workers)
    return stages(replace(config, learner=learner), num_engines, trains=trains)


def check_capacity(starting: Sequence[Stage], capacity: Capacity) -> None:
    """Check that what a run starts with has a place.

    Raises:
        ValueError: it has not; names what is lacking and whose it is.
    """
    limits = dict(capacity.resources)
    limits |= {name: max(limits.get(name, 0), n) for name, n in (capacity.most or {}).items()}
    if lacking := missing_resources(total(starting), limits):
        keys = [s.key for s in starting if s.count and s.resources.keys() & lacking.keys()]
        raise ValueError(
            f"the cluster lacks {lacking} for this run, which {', '.join(keys)} ask for: change "
            "them or engine.num_engines or learner.num_workers, add nodes, or set "
            "engine.max_engines where an autoscaler adds them"
        )
    if capacity.most is None:
        check_places(starting, capacity.nodes)
