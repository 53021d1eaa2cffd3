"""Step gradients: those of steps' log-probabilities by all that is trained, made small.

What a run measures while it trains is the gradient of one layer (`fork_probe`), which needs no
backward pass through the others. This is what that stands for: by all trained parameters, at a
backward pass for each step. Of a gradient g of millions of numbers a sketch is kept,

    S_j = sum of s_i g_i over i = j modulo its width W,

with independent random signs s_i: E S(g) . S(h) = g . h, of a variance of at most
2 |g|^2 |h|^2 / W where g and h are spread evenly. All that forks and updates are asked for are such
products.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from treerpo_ray.algo.loss_config import Normalisation
from treerpo_ray.algo.packing import Forest, pack
from treerpo_ray.algo.tree import Tree
from treerpo_ray.learner.optimizer import PolicyOptimizer

WIDTH = 2**14
"""Numbers of a sketch: a product is off by one hundredth of both lengths."""


class Sketch:
    """A random map of gradients to `width` numbers that keeps products, in the mean.

    Args:
        parameters: Whose gradients are sketched. Are they no more numbers than `width`, products
            stay as they are.
        seed: Of the signs.
        width: Numbers of a sketch.
    """

    def __init__(self, parameters: Sequence[Tensor], *, seed: int, width: int = WIDTH) -> None:
        self.width = width
        rng = np.random.default_rng(seed)
        self._signs = [
            torch.from_numpy(rng.choice(np.array([-1, 1], np.int8), each.numel())).to(each.device)
            for each in parameters
        ]

    def of(self, gradients: Sequence[Tensor | None]) -> Float32[Tensor, " width"]:
        """The sketch of the gradients of all parameters; one that has none counts as 0.

        Each parameter begins where the one before it ended, so that the first numbers of all are
        not added up in the same place.
        """
        found = torch.zeros(self.width, device=self._signs[0].device)
        begin = 0
        for gradient, signs in zip(gradients, self._signs, strict=True):
            if gradient is not None:
                flat = gradient.detach().float().flatten() * signs
                padded = torch.nn.functional.pad(flat, (begin, -(begin + len(flat)) % self.width))
                found += padded.view(-1, self.width).sum(0)
            begin = (begin + len(signs)) % self.width
        return found


def step_gradients(
    optimizer: PolicyOptimizer,
    trees: Sequence[Tree],
    *,
    seed: int,
    token_budget: int,
    normalisation: Normalisation,
    width: int = WIDTH,
) -> list[Float32[np.ndarray, "steps width"]]:
    """Sketches of the gradient of log p of each step of each tree, by all that is trained.

    Args:
        optimizer: Whose policy it is; not of one that is sharded.
        trees: Whose steps.
        seed: Of the sketches.
        token_budget: Most tokens of one forward pass.
        normalisation: Where steps weigh the same in the loss, each is over its tokens.
        width: Of the sketches.
    """
    sketch = Sketch(optimizer.policy.trained, seed=seed, width=width)
    found = []
    for tree in trees:
        own = np.zeros((len(tree), width), np.float32)
        # A tree at a time: through others a step's backward pass would only carry zeros.
        for forest in pack([tree], [np.zeros(len(tree), np.float32)], token_budget):
            for step, gradients in _by_step(optimizer, forest):
                own[step] = sketch.of(gradients).cpu().numpy()
        if normalisation is Normalisation.SEQUENCE_MEAN:
            own /= tree.lengths[:, None]
        found.append(own)
    return found


def _by_step(
    optimizer: PolicyOptimizer, forest: Forest
) -> Iterator[tuple[int, tuple[Tensor | None, ...]]]:
    """Each step of a forest of one tree, and the gradients of its log-probability."""
    logprobs = optimizer.logprobs(forest)
    place = torch.from_numpy(forest.step).to(logprobs.device)
    for number, step in enumerate(forest.origin.tolist()):
        yield (
            step,
            torch.autograd.grad(
                logprobs[place == number].sum(),
                optimizer.policy.trained,
                retain_graph=True,
                allow_unused=True,
            ),
        )
