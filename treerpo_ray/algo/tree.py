"""The tree: a prompt and the steps sampled after it, flat and parent-indexed.

    prompt ──► step 0 ──► step 2
          └──► step 1 ──► step 3       parents = [-1, -1, 0, 1]

Steps stand in an order in which parents come before their children and the siblings of one
step group are neighbours in the order they were asked for. A step holds its own tokens only;
what came before them is read off its ancestors.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int32

ROOT = -1
"""The parent of the first steps: the prompt itself."""


class StopReason(StrEnum):
    """Why a step ended."""

    END_OF_TEXT = "end_of_text"
    """The model ended its answer: the step is a leaf."""
    BOUNDARY = "boundary"
    """The step is full or reached a delimiter; at the depth limit this cuts the answer off."""
    ERROR = "error"
    """The sampler failed: the step is a leaf without a reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: the tokens between two branching points.

    Attributes:
        parent: Index of the parent step, or ROOT.
        token_ids: The step's own tokens; includes the end-of-text token if there is one.
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


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A prompt and its steps; see the module's drawing for the order of `steps`."""

    prompt_ids: Int32[np.ndarray, " tokens"]
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for index, step in enumerate(self.steps):
            if not ROOT <= step.parent < index:
                raise ValueError(f"step {index} has parent {step.parent}: parents come first")

    @cached_property
    def children(self) -> dict[int, tuple[int, ...]]:
        """Child steps of each expanded step (and of ROOT), in sampling order."""
        found: dict[int, list[int]] = {}
        for index, step in enumerate(self.steps):
            found.setdefault(step.parent, []).append(index)
        return {parent: tuple(indices) for parent, indices in found.items()}

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Steps without children, in order."""
        return tuple(i for i in range(len(self.steps)) if i not in self.children)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each step; the prompt has depth 0, its children 1."""
        depths: list[int] = []
        for step in self.steps:
            depths.append(1 if step.parent == ROOT else depths[step.parent] + 1)
        return tuple(depths)

    def path(self, index: int) -> tuple[int, ...]:
        """Steps from the first below the prompt down to `index`, both included."""
        path: list[int] = []
        while index != ROOT:
            path.append(index)
            index = self.steps[index].parent
        return tuple(reversed(path))

    def path_token_ids(self, index: int) -> list[int]:
        """Tokens of the answer that ends with step `index`, without the prompt."""
        return [int(t) for i in self.path(index) for t in self.steps[i].token_ids]

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that were sampled for this tree: of each step once, and those discarded."""
        return sum(len(step.token_ids) + step.num_discarded for step in self.steps)

    @property
    def min_version(self) -> int:
        """Oldest version that sampled any token of the tree."""
        return min((int(s.versions.min()) for s in self.steps if len(s.versions)), default=0)

    @property
    def max_version(self) -> int:
        """Newest version that sampled any token of the tree."""
        return max((int(s.versions.max()) for s in self.steps if len(s.versions)), default=0)
