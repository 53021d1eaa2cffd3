from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.learning.trees import (
    by_range,
    edge_contexts,
    full_tree,
    make_tree,
    on_leaves,
    segment_context,
    shuffled,
    trees,
)
from treerpo_ray.algo.advantages.forms import AdvantageForm, step_advantages
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.packing import Forest, pack, unpack
from treerpo_ray.algo.tree import Tree

NAN = float("nan")
HAND_TREE = make_tree([-1, -1, 0, 0, 1, 1], lengths=[2, 1, 1, 2, 1, 1], prompt_length=2)
"""Tokens: prompt 0 1; step 0: 2 3; 1: 4; 2: 5; 3: 6 7; 4: 8; 5: 9."""
HAND_ADVANTAGES = np.array([-4 / 3, 4 / 3, -2.0, 2.0, NAN, NAN])


Edge = tuple[tuple[int, ...], int, float, float, int]
"""Context, target, advantage, behaviour log-prob and position id of the target."""


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Tree], list[np.ndarray], int]:
    """Trees with unique tokens over all of them, advantages, and a budget that is enough."""
    batch: list[Tree] = []
    advantages: list[np.ndarray] = []
    next_token = longest = 0
    for shape in draw(st.lists(trees(), min_size=1, max_size=4)):
        parents = [step.parent for step in shape.steps]
        lengths = [len(step.token_ids) for step in shape.steps]
        tree = make_tree(parents, lengths, len(shape.prompt_ids), first_token=next_token)
        next_token += len(tree.prompt_ids) + tree.num_sampled_tokens
        is_trained = draw(st.lists(st.booleans(), min_size=len(parents), max_size=len(parents)))
        batch.append(tree)
        advantages.append(np.where(is_trained, np.arange(len(parents)) - 1.5, NAN))
        longest = max(longest, *(len(context(tree, leaf)) for leaf in tree.leaves))
    return batch, advantages, longest + draw(st.integers(0, 40))


def context(tree: Tree, index: int) -> list[int]:
    """Prompt and answer tokens up to the end of step `index`."""
    return [*tree.prompt_ids.tolist(), *tree.path_token_ids(index)]


def expected_edges(batch: list[Tree], advantages: list[np.ndarray]) -> Counter[Edge]:
    """Every trained token with its whole context, advantage and behaviour log-prob."""
    edges: Counter[Edge] = Counter()
    for tree, advantage in zip(batch, advantages, strict=True):
        for index in np.flatnonzero(~np.isnan(advantage)):
            step = tree.steps[index]
            for i, token in enumerate(step.token_ids.tolist()):
                before = (*context(tree, step.parent), *step.token_ids[:i].tolist())
                logprob = float(step.logprobs[i])
                edges[before, token, float(advantage[index]), logprob, len(before)] += 1
    return edges


def found_edges(forests: list[Forest]) -> Counter[Edge]:
    """The same as `expected_edges`, read off forests; the last is the target's position id."""
    return Counter(
        (tuple(seen), *edge)
        for forest in forests
        for seen, *edge in zip(
            edge_contexts(forest),
            forest.target.tolist(),
            forest.advantage.tolist(),
            forest.behaviour_logprob.tolist(),
            (forest.position_ids[forest.source] + 1).tolist(),
            strict=True,
        )
    )


def test_a_tree_by_hand_from_rewards_to_edges() -> None:
    values = mean_backup(HAND_TREE, on_leaves(HAND_TREE, [0.0, 1.0, 1.0, 1.0]))
    advantages = step_advantages(
        HAND_TREE, values, form=AdvantageForm.BERNOULLI, pruning=by_range(0.1)
    )
    np.testing.assert_allclose(advantages, HAND_ADVANTAGES)

    (forest,) = pack([HAND_TREE], [advantages], token_budget=8)
    assert forest.token_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert forest.position_ids.tolist() == [0, 1, 2, 3, 2, 4, 4, 5]
    assert forest.segment_start.tolist() == [0, 2, 4, 5, 6]
    assert forest.segment_length.tolist() == [2, 2, 1, 1, 2]
    assert forest.segment_parent.tolist() == [-1, 0, 0, 1, 1]
    assert forest.segment_depth.tolist() == [0, 1, 1, 2, 2]
    assert forest.source.tolist() == [1, 2, 1, 3, 3, 6]
    assert forest.target.tolist() == [2, 3, 4, 5, 6, 7]
    assert forest.step.tolist() == [0, 0, 1, 2, 3, 3]
    assert forest.num_steps == 4
    third = 4 / 3
    np.testing.assert_allclose(forest.advantage, [-third, -third, third, -2, 2, 2], rtol=1e-6)
    assert (forest.behaviour_logprob * 1024).tolist() == [-2, -3, -4, -5, -6, -7]


def test_a_tree_above_the_budget_is_split_and_repeats_its_ancestors_as_context() -> None:
    forests = pack([HAND_TREE], [HAND_ADVANTAGES], token_budget=6)
    assert [forest.token_ids.tolist() for forest in forests] == [
        [0, 1, 2, 3, 6, 7],
        [0, 1, 2, 3, 5],
        [0, 1, 4],
    ]
    assert [forest.target.tolist() for forest in forests] == [[6, 7], [2, 3, 5], [4]]
    assert [forest.step.tolist() for forest in forests] == [[0, 0], [0, 0, 1], [0]]


@given(drawn=batches())
def test_what_the_edges_have_comes_back_to_their_tokens(
    drawn: tuple[list[Tree], list[np.ndarray], int],
) -> None:
    batch, advantages, budget = drawn
    forests = pack(batch, advantages, budget)
    values = [forest.target.astype(np.float32) for forest in forests]
    found = unpack(batch, forests, values)
    for tree, advantage, own in zip(batch, advantages, found, strict=True):
        is_trained = ~np.isnan(advantage).repeat(tree.lengths)
        np.testing.assert_array_equal(own, np.where(is_trained, tree.token_ids, NAN))


def test_two_trees_stand_level_by_level_in_one_forest() -> None:
    other = make_tree([-1, 0], lengths=[1, 1], prompt_length=1, first_token=20)
    (forest,) = pack([other, HAND_TREE], [np.array([NAN, 1.0]), HAND_ADVANTAGES], 11)
    assert forest.token_ids.tolist() == [0, 1, 20, 2, 3, 4, 21, 5, 6, 7, 22]
    assert forest.segment_depth.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert forest.segment_parent.tolist() == [-1, -1, 0, 0, 1, 2, 2, 4]
    assert forest.position_ids.tolist() == [0, 1, 0, 2, 3, 2, 1, 4, 4, 5, 2]


def test_trees_fill_forests_first_fit_decreasing() -> None:
    batch = [make_tree([-1], [length], prompt_length=1) for length in (2, 3, 4, 5)]
    forests = pack(batch, [np.ones(1)] * 4, token_budget=9)
    assert [len(forest.token_ids) for forest in forests] == [9, 9]


def test_nothing_trained_packs_into_no_forest() -> None:
    assert pack([], [], 10) == []
    assert pack([HAND_TREE, make_tree([])], [np.full(6, NAN), np.empty(0)], 1) == []


def test_a_path_above_the_budget_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"path of 6 tokens is above the token budget of 5.*raise"):
        pack([HAND_TREE], [HAND_ADVANTAGES], token_budget=5)


def test_a_path_above_the_budget_does_no_harm_when_nobody_trains_on_it() -> None:
    (forest,) = pack([HAND_TREE], [np.array([NAN, 1.0, NAN, NAN, NAN, NAN])], token_budget=3)
    assert forest.token_ids.tolist() == [0, 1, 4]


@pytest.mark.parametrize(("prompt_length", "lengths"), [(0, [1, 1]), (1, [0, 1]), (1, [1, 0])])
def test_an_empty_prompt_or_step_is_refused(prompt_length: int, lengths: list[int]) -> None:
    tree = make_tree([-1, 0], lengths, prompt_length)
    with pytest.raises(ValueError, match="is empty"):
        pack([tree], [np.array([NAN, 1.0])], token_budget=10)


def test_advantages_that_do_not_match_the_trees_are_refused() -> None:
    with pytest.raises(ValueError, match="5 advantages given for 6 steps"):
        pack([HAND_TREE], [HAND_ADVANTAGES[:5]], token_budget=10)
    with pytest.raises(ValueError, match="zip"):
        pack([HAND_TREE], [], token_budget=10)


def test_a_deep_chain_packs_into_one_row() -> None:
    tree = make_tree(range(-1, 299), [1] * 300, prompt_length=1)
    (forest,) = pack([tree], [np.ones(300)], token_budget=301)
    assert forest.position_ids.tolist() == list(range(301))
    assert forest.source.tolist() == list(range(300))


@given(batch=batches())
def test_every_trained_token_is_lossed_once_with_its_own_context_and_advantage(
    batch: tuple[list[Tree], list[np.ndarray], int],
) -> None:
    batch_trees, advantages, token_budget = batch
    forests = pack(batch_trees, advantages, token_budget)
    assert found_edges(forests) == expected_edges(batch_trees, advantages)


@given(batch=batches())
def test_a_forest_keeps_its_budget_and_its_layout(
    batch: tuple[list[Tree], list[np.ndarray], int],
) -> None:
    batch_trees, advantages, token_budget = batch
    for forest in pack(batch_trees, advantages, token_budget):
        assert len(forest.token_ids) <= token_budget
        assert (np.diff(forest.segment_depth) >= 0).all()
        ends = forest.segment_start + forest.segment_length
        assert [0, *ends] == [*forest.segment_start, len(forest.token_ids)]
        is_prompt = forest.segment_depth == 0
        assert (is_prompt == (forest.segment_parent == -1)).all()
        parent_depth = forest.segment_depth[forest.segment_parent[~is_prompt]]
        assert (parent_depth == forest.segment_depth[~is_prompt] - 1).all()
        assert sorted(set(forest.step.tolist())) == list(range(forest.num_steps))


@given(batch=batches())
def test_every_laid_out_segment_holds_its_path_and_leads_to_a_trained_step(
    batch: tuple[list[Tree], list[np.ndarray], int],
) -> None:
    batch_trees, advantages, token_budget = batch
    paths = {
        tuple(context(tree, index)) for tree in batch_trees for index in range(-1, len(tree.steps))
    }
    for forest in pack(batch_trees, advantages, token_budget):
        seen = {token for context in edge_contexts(forest) for token in context}
        seen |= set(forest.target.tolist())
        assert seen == set(forest.token_ids.tolist())
        for segment in range(len(forest.segment_start)):
            positions = segment_context(forest, segment)
            assert tuple(forest.token_ids[positions].tolist()) in paths
            assert forest.position_ids[positions].tolist() == list(range(len(positions)))


@given(batch=batches())
def test_a_batch_that_fits_is_one_forest_and_lays_each_token_out_once(
    batch: tuple[list[Tree], list[np.ndarray], int],
) -> None:
    batch_trees, advantages, _ = batch
    forests = pack(batch_trees, advantages, token_budget=10_000)
    assert len(forests) == any((~np.isnan(a)).any() for a in advantages)
    for forest in forests:
        assert len(set(forest.token_ids.tolist())) == len(forest.token_ids)


@given(tree=trees(), token_budget=st.integers(40, 80), data=st.data())
def test_the_order_of_siblings_does_not_change_what_is_trained(
    tree: Tree, token_budget: int, data: st.DataObject
) -> None:
    other, order = shuffled(tree, data.draw(st.permutations(range(len(tree.steps)))))
    advantages = np.where(np.arange(len(order)) % 3, np.arange(len(order)), NAN)
    edges = found_edges(pack([tree], [advantages], token_budget))
    assert edges == found_edges(pack([other], [advantages[order]], token_budget))


def test_the_paper_tree_splits_into_little_more_than_its_unique_tokens() -> None:
    tree = full_tree(branching=8, depth=3, step_length=4, prompt_length=5)
    forests = pack([tree], [np.ones(584)], token_budget=256)
    unique = 5 + 584 * 4
    repeated = sum(len(forest.token_ids) for forest in forests) - unique
    assert sum(len(forest.target) for forest in forests) == 584 * 4
    assert 0 < repeated <= (len(forests) - 1) * (5 + 2 * 4)
