"""Together: what all workers of a sharded learner do at the word of the first one.

The first worker alone speaks to engines and run folder. What it does with weights takes the parts
of all: it says what it is about to do, and the others, who `follow` meanwhile, do the same.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from treerpo_ray.learner.learner import Learner

T = TypeVar("T")


class Together:
    """A learner's weights and state, for the first worker.

    Of a learner that is not sharded the first worker has all of them, and nobody follows.

    Args:
        learner: This worker's.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    @property
    def is_joint(self) -> bool:
        """Whether others have parts."""
        return self.learner.sharding is not None and dist.get_world_size() > 1

    # What the first worker calls -----------------------------------------------------------------

    @contextmanager
    def leading(self) -> Iterator[None]:
        """While the others follow; if what is done in it fails, they are lost with this worker."""
        yield
        self._say(None)

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Policy.named_weights`; all of them are to be taken."""
        self._say(partial(_give_weights, dtype=dtype))
        return self.learner.policy.named_weights(dtype)

    def sequence_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """See `Policy.sequence_logprobs`."""
        self._say(partial(_give_logprobs, token_ids=token_ids))
        return self.learner.policy.sequence_logprobs(token_ids)

    def write(self, folder: Path) -> None:
        """See `Learner.write`; may be called in another thread, while this one waits."""
        if self.learner.device.type == "cuda":
            torch.cuda.set_device(self.learner.device)  # each thread has its own
        self._say(partial(_write_part, folder=folder))
        self.learner.write(folder)

    def save_pretrained(self, folder: Path) -> None:
        """See `Policy.save_pretrained`."""
        self._say(partial(_give_export, folder=folder))
        self.learner.policy.save_pretrained(folder)

    # What the others call ------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what the first worker says, until it is done."""
        while (task := self._say(None)) is not None:
            task(self.learner)

    def _say(self, task: "Task | None") -> "Task | None":
        """What the first worker says, on all."""
        if not self.is_joint:
            return None
        box = [task]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def once_a_machine(
    opened: Callable[[], AbstractContextManager[T]], machine: str, *, is_first_here: bool
) -> Iterator[T]:
    """Open what all workers of a machine read, such as files from a store, once on each machine.

    Args:
        opened: Opens it; it is closed once all workers are done with it.
        machine: Name of this one.
        is_first_here: Whether this worker opens it for those of its machine.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        with opened() as alone:
            yield alone
        return
    found: list[tuple[str, T] | None] = [None] * dist.get_world_size()
    with ExitStack() as stack:
        own = (machine, stack.enter_context(opened())) if is_first_here else None
        dist.all_gather_object(found, own)
        yield next(each[1] for each in found if each is not None and each[0] == machine)
        dist.barrier()


Task = Callable[[Learner], None]
"""What a worker does that follows; it travels between them."""


def _give_weights(learner: Learner, dtype: torch.dtype) -> None:
    for _ in learner.policy.named_weights(dtype):
        pass


def _give_logprobs(learner: Learner, token_ids: list[int]) -> None:
    learner.policy.sequence_logprobs(token_ids)


def _write_part(learner: Learner, folder: Path) -> None:
    with suppress(OSError):  # the first worker has the same error, and waits for its disk
        learner.write(folder)


def _give_export(learner: Learner, folder: Path) -> None:
    learner.policy.save_pretrained(folder)
