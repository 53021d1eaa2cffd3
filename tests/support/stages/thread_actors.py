"""Actors for the driver's tests: in this process, each call in a thread of its own, without Ray."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from ray.exceptions import GetTimeoutError


class Handle:
    """Stands in for a Ray actor's handle."""

    def __init__(self, target: object) -> None:
        self._target = target

    def __getattr__(self, name: str) -> "Method":
        return Method(getattr(self._target, name))


@dataclass
class Method:
    """A method of a handle; the references that it returns are futures."""

    call: Callable[..., object]

    def options(self, *, num_returns: str) -> "StreamMethod":
        assert num_returns == "streaming"
        return StreamMethod(self.call)

    def remote(self, *arguments: object, **named: object) -> concurrent.futures.Future:
        answer: concurrent.futures.Future = concurrent.futures.Future()

        def work() -> None:
            try:
                answer.set_result(self.call(*arguments, **named))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return answer


@dataclass
class StreamMethod:
    """A method that yields references."""

    call: Callable[..., object]

    def remote(self, *arguments: object, **named: object) -> object:
        return self.call(*arguments, **named)


def get(refs: object, timeout: float | None = None) -> object:
    if isinstance(refs, list):
        return [get(ref, timeout) for ref in refs]
    try:
        return refs.result(timeout)
    except concurrent.futures.TimeoutError as error:
        if refs.done():
            raise
        raise GetTimeoutError("no answer yet") from error


def wait(refs: list[concurrent.futures.Future], num_returns: int, timeout: float) -> tuple:
    assert num_returns == len(refs)
    done, others = concurrent.futures.wait(refs, timeout)
    return list(done), list(others)


@contextmanager
def without_ray() -> Iterator[None]:
    """References of these actors can be waited for as those of Ray."""
    with mock.patch("ray.get", get), mock.patch("ray.wait", wait):
        yield
