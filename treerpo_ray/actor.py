"""Actor: a Ray actor's handle as the type checker should see it.

Ray's own type says that a handle has no methods, so that what follows a call is not checked.
What a method returns is not known here either: callers name its type.
"""

from typing import Literal, Protocol, cast

import ray
from ray.exceptions import RayTaskError


class Actor(Protocol):
    """A handle; each attribute is a method of the actor."""

    def __getattr__(self, name: str) -> "Method":
        """The method of that name."""


class Method(Protocol):
    """A method of an actor."""

    def remote(self, *arguments: object) -> ray.ObjectRef:
        """Call it."""

    def options(self, *, num_returns: Literal["streaming"]) -> "StreamMethod":
        """The same method, for one that yields."""


class StreamMethod(Protocol):
    """A method of an actor that yields."""

    def remote(self, *arguments: object) -> ray.ObjectRefGenerator:
        """Call it; the references come as it yields."""


def make_actor(kind: type[object], *arguments: object, concurrency: int = 10_000) -> Actor:
    """An actor on the node of the driver."""
    here = ray.get_runtime_context().get_node_id()
    node = {ray._raylet.RAY_NODE_ID_KEY: here}  # type: ignore[attr-defined]  # not in Ray's stub
    made = ray.remote(kind).options(num_cpus=0, label_selector=node, max_concurrency=concurrency)
    return cast(Actor, made.remote(*arguments))


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, without what Ray puts around that of an actor."""
    if isinstance(error, RayTaskError):
        error = error.cause
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
