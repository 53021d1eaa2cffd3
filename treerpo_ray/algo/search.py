"""Tree search: grows one tree by asking an injected sampler for continuations.

There is no level barrier: every child is a request of its own, and a step is expanded the
moment it is finished, however slow its siblings are. What comes out, in an order in which
parents come first, are sibling groups; a tree can be taken up again from the groups held.

Note on the authors' saving (full continuations, cut into chains afterwards): it is the same in
distribution, but it would make a branch wait for its chain, so each step is asked for alone and
the engine's prefix cache spares the repeated prefill.

Whatever ends an answer for the sampler, an end token or a stop string, ends its step as a leaf
(StopReason.END_OF_TEXT), at whatever depth; a delimiter only ends a step. A token that does both
ends the answer.
"""

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree

Path = tuple[int, ...]
"""Child numbers from the prompt down; () is the prompt, (2, 0) the first child of its third."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """How a tree branches.

    Attributes:
        num_children: Children of each expanded step, by depth: (8, 8, 8) is the paper's N=8,
            D=3; (8,) is GRPO with 8 samples.
        step_tokens: Most tokens of a step, by depth.
        delimiters: Token ids that end a step above the last depth; empty: by length alone,
            as the paper cuts.
        entropy_window: Entropy branching: a step that reached its length and is to have several
            children ends before the least likely of so many tokens at its end; 0: off.
    """

    num_children: tuple[int, ...]
    step_tokens: tuple[int, ...]
    delimiters: tuple[int, ...] = ()
    entropy_window: int = 0

    def __post_init__(self) -> None:
        if not self.num_children or len(self.num_children) != len(self.step_tokens):
            raise ValueError(
                "tree.num_children and tree.step_tokens need one entry for each depth, not "
                f"{list(self.num_children)} and {list(self.step_tokens)}"
            )
        if min(self.num_children) < 1 or min(self.step_tokens) < 1:
            raise ValueError("tree.num_children and tree.step_tokens must be positive")
        if not 0 <= self.entropy_window < min(self.step_tokens):
            raise ValueError(
                f"tree.entropy_window={self.entropy_window} must be less than the shortest of "
                f"tree.step_tokens={list(self.step_tokens)}"
            )

    @property
    def max_steps(self) -> int:
        """Steps of a tree in which no branch ends early: sum over depths of prod(N)."""
        return int(sum(np.cumprod(self.num_children)))

    @property
    def max_leaves(self) -> int:
        """Answers of a tree in which no branch ends early."""
        return math.prod(self.num_children)

    @property
    def max_sampled_tokens(self) -> int:
        """Tokens of a tree in which no branch ends early."""
        return int(np.dot(np.cumprod(self.num_children), self.step_tokens))

    @property
    def max_answer_tokens(self) -> int:
        """Tokens of the longest path."""
        return sum(self.step_tokens)

    def has_group(self, group: "SiblingGroup") -> bool:
        """Whether a tree of this shape may have that group."""
        depth = len(group.parent)
        is_inside = depth < len(self.num_children)
        return is_inside and len(group.steps) == self.num_children[depth]


class Sampler(Protocol):
    """What the search asks of an engine: token ids in, one continuation out."""

    async def sample(
        self, prefix: list[int], *, max_tokens: int, delimiters: tuple[int, ...], seed: int
    ) -> Step:
        """One continuation of at most `max_tokens` tokens, as a step with parent ROOT.

        Cancelling the awaiting task must cancel the request. A request that the engine turned
        down comes back as a step with StopReason.ERROR; a dead engine raises.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SiblingGroup:
    """All children of one expanded step, finished; their `parent` fields are not yet set."""

    parent: Path
    steps: tuple[Step, ...]


async def grow(
    prompt_ids: list[int],
    shape: TreeShape,
    sampler: Sampler,
    *,
    seed: int,
    held: Iterable[SiblingGroup] = (),
) -> AsyncIterator[SiblingGroup]:
    """Grow a tree, yielding each sibling group once it is finished and its parent's was yielded.

    Groups in `held` are taken as they are and not yielded again. Closing the iterator cancels
    every request of the tree; an exception of the sampler ends the search and is raised here.
    """
    search = _Search(
        shape=shape,
        sampler=sampler,
        seed=seed,
        held={group.parent: group.steps for group in held},
    )
    root = asyncio.create_task(search.expand((), prompt_ids))
    root.add_done_callback(lambda _: search.finished.put_nowait(None))
    try:
        while (group := await search.finished.get()) is not None:
            yield group
        failure: Exception | None = None
        try:
            await root
        except* Exception as failures:
            failure = _first(failures)
        if failure is not None:
            raise failure
    finally:
        root.cancel()
        await asyncio.gather(root, return_exceptions=True)


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    """One of the sampler's exceptions: all branches of a tree fail of one cause."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


class _Search:
    """The state of one growing tree."""

    def __init__(
        self,
        *,
        shape: TreeShape,
        sampler: Sampler,
        seed: int,
        held: dict[Path, tuple[Step, ...]],
    ) -> None:
        self.shape, self.sampler, self.seed, self.held = shape, sampler, seed, held
        self.finished: asyncio.Queue[SiblingGroup | None] = asyncio.Queue()
        self._yielded: set[Path] = set(held)
        self._waiting: dict[Path, list[SiblingGroup]] = {}

    async def expand(self, path: Path, prefix: list[int]) -> None:
        """Sample the children of `path`, and their children as each one finishes."""
        count = self.shape.num_children[len(path)]
        steps: list[Step | None] = [None] * count

        async def child(number: int) -> None:
            if path in self.held:
                step = self.held[path][number]
            else:
                step = steps[number] = await self._sample((*path, number), prefix)
                if all(s is not None for s in steps):
                    self._finish(SiblingGroup(parent=path, steps=tuple(s for s in steps if s)))
            if step.stop is StopReason.BOUNDARY and len(path) + 1 < len(self.shape.num_children):
                await self.expand((*path, number), prefix + step.token_ids.tolist())

        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(child(number))

    async def _sample(self, path: Path, prefix: list[int]) -> Step:
        depth = len(path) - 1
        is_last = depth + 1 == len(self.shape.num_children)
        step = await self.sampler.sample(
            prefix,
            max_tokens=self.shape.step_tokens[depth],
            delimiters=() if is_last else self.shape.delimiters,
            seed=step_seed(self.seed, path),
        )
        is_full = len(step.token_ids) == self.shape.step_tokens[depth]
        is_forked = not is_last and self.shape.num_children[depth + 1] > 1
        if not is_forked or not is_full or step.stop is not StopReason.BOUNDARY:
            return step
        return cut_at_surprise(step, self.shape.entropy_window)

    def _finish(self, group: SiblingGroup) -> None:
        """Yield `group`, and those below it that waited for it; else let it wait for its parent."""
        above = group.parent[:-1]
        if group.parent and above not in self._yielded:
            self._waiting.setdefault(above, []).append(group)
            return
        self._yielded.add(group.parent)
        self.finished.put_nowait(group)
        for below in self._waiting.pop(group.parent, []):
            self._finish(below)


def cut_at_surprise(step: Step, window: int) -> Step:
    """Entropy branching: `step` without its least likely token among the last `window`, and on.

    The children so begin where the policy hesitated (TreeRL, arXiv 2506.11902, forks
    at the tokens of highest entropy; the surprise of the token sampled is its one-sample estimate).
    Where it is cut depends on tokens that are discarded, so the step's own log-probabilities are
    those of the policy, but not of the way in which it was chosen.
    """
    if not window:
        return step
    end = len(step.token_ids) - window + int(np.argmin(step.logprobs[-window:]))
    return replace(
        step,
        token_ids=step.token_ids[:end],
        logprobs=step.logprobs[:end],
        versions=step.versions[:end],
        num_discarded=len(step.token_ids) - end,
    )


def assemble(prompt_ids: list[int], groups: Iterable[SiblingGroup]) -> Tree:
    """The tree made of finished sibling groups, breadth first: the same whatever their order.

    Raises:
        ValueError: a group hangs below a step that no group holds.
    """
    by_parent: Mapping[Path, SiblingGroup] = {group.parent: group for group in groups}
    steps: list[Step] = []
    index: dict[Path, int] = {(): ROOT}
    for path in sorted(by_parent, key=lambda path: (len(path), path)):
        if path not in index:
            raise ValueError(f"sibling group {path} hangs below a step that no group holds")
        for number, step in enumerate(by_parent[path].steps):
            index[(*path, number)] = len(steps)
            steps.append(replace(step, parent=index[path]))
    return Tree.from_steps(np.asarray(prompt_ids, np.int32), steps)


def sibling_groups(tree: Tree) -> list[SiblingGroup]:
    """The sibling groups that a tree is made of, parents first: `assemble` undone."""
    paths: dict[int, Path] = {ROOT: ()}
    groups = []
    for parent, children in tree.children.items():  # in the order of the first children
        paths |= {index: (*paths[parent], number) for number, index in enumerate(children)}
        steps = tuple(replace(tree.steps[index], parent=ROOT) for index in children)
        groups.append(SiblingGroup(parent=paths[parent], steps=steps))
    return groups


def step_seed(tree_seed: int, path: Path) -> int:
    """Seed of the request for the step at `path`: the same whenever and wherever it is sampled."""
    digest = hashlib.blake2b(repr((tree_seed, path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
