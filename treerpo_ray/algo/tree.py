"""The tree: a prompt and the steps sampled after it, flat and parent-indexed.

    prompt ──► step 0 ──► step 2
          └──► step 1 ──► step 3       parents = [-1, -1, 0, 1]

Steps stand in an order in which parents come before their children and the siblings of one
step group are neighbours in the order they were asked for. A step holds its own tokens only;
what came before them is read off its ancestors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from typing import Self

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

ROOT = -1
"""The parent of the first steps: the prompt itself."""


class StopReason(StrEnum):
    """Why a step ended."""

    END_OF_TEXT = "end_of_text"
    """The model ended its answer, by an end token or a stop string: the step is a leaf."""
    BOUNDARY = "boundary"
    """The step is full or reached a delimiter; at the depth limit this cuts the answer off."""
    ERROR = "error"
    """The sampler failed: the step is a leaf without a reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: the tokens between two branching points.

    Attributes:
        parent: Index of the parent step, or ROOT.
        token_ids: The step's own tokens; includes the end-of-text token if there is one, or those
            that complete a stop string.
        logprobs: Behaviour log-probability (nats) of each token when it was sampled, under the
            temperature-processed distribution that it was drawn from.
        versions: Version of the weights that sampled each token.
        stop: Why the step ended.
        num_discarded: Tokens that were sampled behind the step's end and are in no tree.
    """

    parent: int
    token_ids: Int32[np.ndarray, " tokens"]
    logprobs: Float32[np.ndarray, " tokens"]
    versions: Int32[np.ndarray, " tokens"]
    stop: StopReason
    num_discarded: int = 0

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.logprobs) == len(self.versions):
            raise ValueError(
                f"a step's token_ids, logprobs and versions must have one length, not "
                f"{len(self.token_ids)}, {len(self.logprobs)} and {len(self.versions)}"
            )


def error_step() -> Step:
    """A step that a sampler turned down: no tokens, no reward."""
    return Step(
        parent=ROOT,
        token_ids=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        versions=np.empty(0, np.int32),
        stop=StopReason.ERROR,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Siblings:
    """Sibling sets of one tree that lie at one depth and have equally many steps, stacked."""

    depth: int
    """Depth of the steps."""
    parents: Int64[np.ndarray, " groups"]
    """Parent of each set, ascending; ROOT is -1."""
    children: Int64[np.ndarray, "groups children"]
    """Steps of each set, in sampling order."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A prompt and its steps as flat arrays; see the module's drawing for the order of the steps.

    Attributes:
        prompt_ids: Tokens of the prompt.
        parents: Index of each step's parent step, or ROOT.
        lengths: Number of each step's own tokens.
        stops: Why each step ended.
        num_discarded: As `Step.num_discarded`, of each step.
        token_ids: Own tokens of all steps, one step after the other.
        logprobs: As `Step.logprobs`, of each token.
        versions: As `Step.versions`, of each token.
    """

    prompt_ids: Int32[np.ndarray, " prompt_tokens"]
    parents: Int32[np.ndarray, " steps"]
    lengths: Int32[np.ndarray, " steps"]
    stops: tuple[StopReason, ...]
    num_discarded: Int32[np.ndarray, " steps"]
    token_ids: Int32[np.ndarray, " tokens"]
    logprobs: Float32[np.ndarray, " tokens"]
    versions: Int32[np.ndarray, " tokens"]

    def __post_init__(self) -> None:
        is_late = (self.parents < ROOT) | (self.parents >= np.arange(len(self)))
        if is_late.any():
            index = int(is_late.argmax())
            raise ValueError(f"step {index} has parent {self.parents[index]}: parents come first")

    @classmethod
    def from_steps(cls, prompt_ids: Int32[np.ndarray, " tokens"], steps: Sequence[Step]) -> Self:
        """The tree of these steps."""
        return cls(
            prompt_ids=prompt_ids,
            parents=np.array([step.parent for step in steps], np.int32),
            lengths=np.array([len(step.token_ids) for step in steps], np.int32),
            stops=tuple(step.stop for step in steps),
            num_discarded=np.array([step.num_discarded for step in steps], np.int32),
            token_ids=_joined([step.token_ids for step in steps], np.int32),
            logprobs=_joined([step.logprobs for step in steps], np.float32),
            versions=_joined([step.versions for step in steps], np.int32),
        )

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.parents)

    def __getstate__(self) -> dict[str, object]:
        """What is pickled: the fields, and nothing of what follows from them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def starts(self) -> Int64[np.ndarray, " steps"]:
        """Place of each step's first token in `token_ids`."""
        return self.lengths.cumsum(dtype=np.int64) - self.lengths

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps one by one; their arrays are views of the tree's."""
        ends = (self.starts + self.lengths).tolist()
        return tuple(
            Step(
                parent=parent,
                token_ids=self.token_ids[start:end],
                logprobs=self.logprobs[start:end],
                versions=self.versions[start:end],
                stop=stop,
                num_discarded=num_discarded,
            )
            for parent, start, end, stop, num_discarded in zip(
                self.parents.tolist(),
                self.starts.tolist(),
                ends,
                self.stops,
                self.num_discarded.tolist(),
                strict=True,
            )
        )

    @cached_property
    def children(self) -> dict[int, tuple[int, ...]]:
        """Child steps of each expanded step (and of ROOT), in sampling order."""
        found: dict[int, list[int]] = {}
        for index, parent in enumerate(self.parents.tolist()):
            found.setdefault(parent, []).append(index)
        return {parent: tuple(indices) for parent, indices in found.items()}

    @cached_property
    def siblings(self) -> tuple[Siblings, ...]:
        """All sibling sets, shallow ones first, those of like shape stacked."""
        order = np.argsort(self.parents, kind="stable")
        parents, first, counts = np.unique(
            self.parents[order], return_index=True, return_counts=True
        )
        depths = self.depth_array[order[first]]
        stacks = []
        for depth, count in sorted(set(zip(depths.tolist(), counts.tolist(), strict=True))):
            own = (depths == depth) & (counts == count)
            children = order[first[own][:, None] + np.arange(count)]
            stacks.append(Siblings(depth=depth, parents=parents[own], children=children))
        return tuple(stacks)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Steps without children, in order."""
        is_leaf = np.ones(len(self) + 1, bool)
        is_leaf[self.parents] = False
        return tuple(np.flatnonzero(is_leaf[:ROOT]).tolist())

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each step; the prompt has depth 0, its children 1."""
        return tuple(self.depth_array.tolist())

    @cached_property
    def depth_array(self) -> Int64[np.ndarray, " steps"]:
        """The same as an array."""
        return self._summed_up(np.ones(len(self), np.int64))

    @cached_property
    def path_lengths(self) -> Int64[np.ndarray, " steps"]:
        """Tokens from the end of the prompt to the end of each step."""
        return self._summed_up(self.lengths)

    def _summed_up(self, own: Int[np.ndarray, " steps"]) -> Int64[np.ndarray, " steps"]:
        """Sum of `own` over the path to each step."""
        above, parents, own = self.parents, np.append(self.parents, ROOT), np.append(own, 0)
        total = own[:ROOT].astype(np.int64)
        while (above != ROOT).any():
            total += own[above]
            above = parents[above]
        return total

    @cached_property
    def depth_first(self) -> Int64[np.ndarray, " steps"]:
        """All steps, each before its children, siblings in sampling order."""
        sizes = np.ones(len(self) + 1, np.int64)  # of the subtrees; ROOT = -1 is the last
        for siblings in reversed(self.siblings):
            sizes[siblings.parents] += sizes[siblings.children].sum(1)
        places = np.full(len(self) + 1, -1)
        for siblings in self.siblings:
            below = sizes[siblings.children]
            first = places[siblings.parents][:, None] + 1
            places[siblings.children] = first + below.cumsum(1) - below
        return places[:ROOT].argsort()

    @cached_property
    def paths(self) -> Int64[np.ndarray, "steps depth"]:
        """The path to each step, itself included, filled up behind it with ROOT."""
        paths = np.full((len(self), int(self.depth_array.max(initial=0))), ROOT)
        for siblings in self.siblings:
            above = siblings.depth - 1
            if above:
                paths[siblings.children, :above] = paths[siblings.parents, None, :above]
            paths[siblings.children, above] = siblings.children
        return paths

    def path(self, index: int) -> tuple[int, ...]:
        """Steps from the first below the prompt down to `index`, both included."""
        path: list[int] = []
        while index != ROOT:
            path.append(index)
            index = int(self.parents[index])
        return tuple(reversed(path))

    def path_token_ids(self, index: int) -> list[int]:
        """Tokens of the answer that ends with step `index`, without the prompt."""
        starts, lengths = self.starts, self.lengths
        return [
            token
            for i in self.path(index)
            for token in self.token_ids[starts[i] : starts[i] + lengths[i]].tolist()
        ]

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that were sampled for this tree: of each step once, and those discarded."""
        return len(self.token_ids) + int(self.num_discarded.sum())

    @property
    def min_version(self) -> int:
        """Oldest version that sampled any token of the tree."""
        return int(self.versions.min()) if len(self.versions) else 0

    @property
    def max_version(self) -> int:
        """Newest version that sampled any token of the tree."""
        return int(self.versions.max()) if len(self.versions) else 0


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays, dtype=dtype) if arrays else np.empty(0, dtype)
