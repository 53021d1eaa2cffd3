"""Actor: Ray actors as the type checker should see them.

Ray's own type of a handle says nothing of its methods. What a stage calls of another one it writes
down as a Protocol of `actor_method`s, so that names, arguments and results of each `.remote(` are
checked:

    class GateApi(Protocol):
        @actor_method
        def restart(self, step: int) -> int: ...

    session = ray.get(gate.restart.remote(step=3))  # an int

That the actor's class has these methods is for a test to check (`tests/test_actor.py`).
"""

import inspect
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast

if TYPE_CHECKING:  # who only reads what a run wrote needs no Ray
    import ray

P = ParamSpec("P")
R = TypeVar("R")
MOST_CALLS = 10_000
"""Calls of an asynchronous actor that may be under way."""


class ActorMethod(Protocol[P, R]):
    """A method of an actor; asynchronous or not, its caller gets a reference to the result."""

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> "ray.ObjectRef[R]":
        """Call it."""


class ActorStream(Protocol[P]):
    """A method of an actor that yields."""

    def options(self, *, num_returns: Literal["streaming"]) -> "ActorStreamCall[P]":
        """The same method; its caller gets each result as it is yielded."""


class ActorStreamCall(Protocol[P]):
    """A method of an actor that yields, ready to be called."""

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> "ray.ObjectRefGenerator":
        """Call it; the references come as it yields."""


def actor_method(signature: Callable[Concatenate[Any, P], R]) -> ActorMethod[P, R]:
    """Decorator: a method of an actor with this signature, in a Protocol of what is called."""
    return cast(ActorMethod[P, R], signature)


def actor_stream(signature: Callable[Concatenate[Any, P], object]) -> ActorStream[P]:
    """Decorator: as `actor_method`, for one that yields."""
    return cast(ActorStream[P], signature)


class MakeActor(Protocol):
    """As `make_actor`."""

    def __call__(
        self, kind: Callable[P, object], *, name: str | None = None
    ) -> Callable[P, Any]: ...


def make_actor(
    kind: Callable[P, object],
    *,
    name: str | None = None,
    node: str | None = None,
) -> Callable[P, Any]:
    """What makes an actor on `node` (Ray's id) or that of the caller, called with the arguments of
    its class. On a node that is gone, calls of the actor fail. Ray's dashboard shows its name.

    One with asynchronous methods has as many calls under way as come; any other has one at a time,
    since Ray would start a thread for each, and ends an actor whose threads take 10 s to start.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(
        node or ray.get_runtime_context().get_node_id(), soft=False
    )
    made = ray.remote(kind).options(
        num_cpus=0,
        scheduling_strategy=here,
        max_concurrency=MOST_CALLS if is_asynchronous(kind) else 1,
        **shown_as(name),
    )
    return cast(Callable[P, Any], made.remote)


def is_asynchronous(kind: object) -> bool:
    """Whether a class has asynchronous methods, by which Ray runs all in one event loop."""
    return any(
        inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
        for _, member in inspect.getmembers(kind)
    )


def shown_as(name: str | None) -> dict[str, str]:
    """Options of an actor that Ray shows under a name; others may have the same one, since nobody
    looks for actors by their names."""
    return {} if name is None else {"name": name, "namespace": uuid.uuid4().hex}


def end_actors(actors: Sequence[object], limit_s: float) -> None:
    """Have actors end by themselves, once they have told Ray of what they did; one that has not
    within `limit_s` is ended with the last handle to it."""
    import ray

    with suppress(ray.exceptions.RayError):
        ended = [cast(Any, actor).__ray_terminate__.remote() for actor in actors]
        ray.wait(ended, num_returns=len(ended), timeout=limit_s)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, without what Ray puts around that of an actor."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        error = error.cause
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


def root_cause(error: BaseException) -> str:
    """One line for what made a run fail, from under the wrappers that Ray puts around it."""
    from ray.exceptions import RayTaskError
    from ray.train import WorkerGroupError

    while True:
        inner = error.__cause__
        if isinstance(error, WorkerGroupError):
            inner = next(iter(error.worker_failures.values()))
        elif isinstance(error, RayTaskError):
            inner = error.cause
        if inner is None or inner is error:
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
        error = inner
