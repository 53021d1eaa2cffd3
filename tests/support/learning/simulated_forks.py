"""Trees [1, N] of policies of which all is known, as a look of the learner would see them."""

import numpy as np

from tests.support.learning.trees import make_tree, on_leaves
from treerpo_ray.algo.forks.samples import TreeGradients, tree_gradients
from treerpo_ray.algo.tree import ROOT

SURE, UNSURE, CONTEXTS = 16, 4, 16


def late_forks(
    rng: np.random.Generator, num_trees: int, num_children: int, chance: float = 0.5
) -> list[TreeGradients]:
    """Trees [1, N] of 16 sure tokens and 4 that must all be right, each of one of 16 prompts, which
    have nothing in common."""
    found = []
    for tokens in rng.binomial(1, chance, (num_trees, num_children, UNSURE)):
        scores = np.zeros((1 + num_children, CONTEXTS, UNSURE))
        scores[1:, rng.integers(CONTEXTS)] = tokens - chance
        found.append(_of_tree(scores, tokens.min(-1), num_children))
    return found


def early_forks(
    rng: np.random.Generator, num_trees: int, num_children: int, chance: float = 0.3
) -> list[TreeGradients]:
    """Trees [1, N] whose first token decides, in one of 16 prompts; all others are sure."""
    found = []
    for is_right in rng.binomial(1, chance, num_trees):
        scores = np.zeros((1 + num_children, CONTEXTS, UNSURE))
        scores[0, rng.integers(CONTEXTS), 0] = is_right - chance
        found.append(_of_tree(scores, np.full(num_children, is_right), num_children))
    return found


def chain_forks(
    rng: np.random.Generator,
    num_trees: int,
    num_children: int,
    *,
    chance: float,
    baseline: float,
    contexts: int = CONTEXTS,
) -> list[TreeGradients]:
    """Trees [1, N] of eight tokens that must all be right, half of them before the fork, each of
    one of so many prompts, which have nothing in common."""
    found = []
    for _ in range(num_trees):
        before = rng.binomial(1, chance, UNSURE)
        after = rng.binomial(1, chance, (num_children, UNSURE))
        scores = np.zeros((1 + num_children, contexts, 2 * UNSURE))
        prompt = rng.integers(contexts)
        scores[0, prompt, :UNSURE] = before - chance
        scores[1:, prompt, UNSURE:] = after - chance
        rewards = before.min() * after.min(-1)
        found.append(_of_tree(scores, rewards, num_children, before=UNSURE, baseline=baseline))
    return found


def _of_tree(
    scores: np.ndarray,
    rewards: np.ndarray,
    num_children: int,
    *,
    before: int = SURE,
    baseline: float = 0.0,
) -> TreeGradients:
    tree = make_tree([ROOT, *[0] * num_children], [before, *[UNSURE] * num_children])
    found = tree_gradients(
        tree,
        scores.reshape(1 + num_children, -1),
        rewards=on_leaves(tree, rewards.astype(float).tolist()),
        baseline=baseline,
        num_cuts=1,
    )
    assert found is not None
    return found
