"""A packed forest has the loss and every gradient of one plain row a trained step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.learning.forests import TestTree, lay_out, random_tree, row_logits, uniform_tree
from tests.support.learning.plain_varlen import PLAIN
from tests.support.learning.tiny_models import TIED, save_tiny_model
from treerpo_ray.learner.forest_layout import FLASH, ForestLayout, VarlenKernel
from treerpo_ray.learner.policy import ForestTensors, Policy, load_policy
from treerpo_ray.learner.tree_attention import tree_attention

CPU = torch.device("cpu")
TEMPERATURE = 0.6


@pytest.fixture(scope="module", params=list(TIED))
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return save_tiny_model(folder, request.param)


def load(path: str, *, gradient_checkpointing: bool = False) -> Policy:
    return load_policy(
        path, dtype=torch.float32, device=CPU, gradient_checkpointing=gradient_checkpointing
    )


def load_plain(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


def ragged_trees(seed: int = 0, num_trees: int = 3) -> list[TestTree]:
    rng = np.random.default_rng(seed)
    return [random_tree(rng, num_children=3, max_depth=3) for _ in range(num_trees)]


def edge_loss(logprobs: Tensor, entropy: Tensor, forest: ForestTensors) -> Tensor:
    """Summed over edges, so that losses of several forests add up; not linear in either input."""
    ratio = (logprobs - forest.behaviour_logprob).clamp(max=2).exp()
    return (ratio * forest.advantage - 0.1 * entropy.square()).sum() / 100


def packed_loss(
    policy: Policy,
    trees: list[TestTree],
    bucket_cost: int | None = None,
    kernel: VarlenKernel | None = FLASH,
) -> Tensor:
    packed = lay_out(trees)
    layout = ForestLayout.from_forest(packed, CPU, bucket_cost)
    layout = replace(layout, kernel=kernel)
    forest = replace(ForestTensors.from_forest(packed, CPU), layout=layout)
    return edge_loss(*policy.edge_logprobs(forest, TEMPERATURE), forest)


def row_loss(model: PreTrainedModel, trees: list[TestTree]) -> Tensor:
    forest = ForestTensors.from_forest(lay_out(trees), CPU)
    logprobs = (row_logits(model, trees) / TEMPERATURE).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return edge_loss(logprobs[range(len(logprobs)), forest.target], entropy, forest)


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)
        assert parameter.grad.abs().max() > 1e-4, f"{name}: the test would not see a difference"


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(
    ("bucket_cost", "kernel"), [(0, None), (None, None), (None, PLAIN)], ids=["0", "cpu", "varlen"]
)
def test_loss_and_every_gradient_of_a_forest_equal_those_of_rows(
    model_path: str,
    bucket_cost: int | None,
    kernel: VarlenKernel | None,
    gradient_checkpointing: bool,
) -> None:
    trees = ragged_trees()
    assert any(len(segment.tokens) == 1 for tree in trees for segment in tree if segment.edges)
    policy = load(model_path, gradient_checkpointing=gradient_checkpointing)
    reference = load_plain(model_path)

    loss, expected = packed_loss(policy, trees, bucket_cost, kernel), row_loss(reference, trees)
    loss.backward()
    expected.backward()

    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(policy.model, reference)


def test_gradient_checkpointing_recomputes_each_layer(model_path: str) -> None:
    policy = load(model_path, gradient_checkpointing=True)
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    policy.model.base_model.layers[0].mlp.register_forward_pre_hook(count)
    loss = packed_loss(policy, ragged_trees(num_trees=1))
    assert num_calls == 1
    loss.backward()
    assert num_calls == 2
    assert not policy.model.training, "dropout must stay off"


def test_trees_split_over_several_forests_add_up_to_the_rows_of_whole_trees(
    model_path: str,
) -> None:
    trees = ragged_trees(num_trees=2)
    policy, reference = load(model_path), load_plain(model_path)
    losses = []
    for part in range(3):  # every third trained step, with all its ancestors as context
        kept = [
            [
                segment if index % 3 == part else replace(segment, edges=[])
                for index, segment in enumerate(tree)
            ]
            for tree in trees
        ]
        losses.append(packed_loss(policy, kept))
        losses[-1].backward()
    expected = row_loss(reference, trees)
    expected.backward()

    torch.testing.assert_close(sum(losses), expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(policy.model, reference)


def test_logprobs_do_not_depend_on_the_order_of_trees(model_path: str) -> None:
    policy = load(model_path)
    trees = ragged_trees(seed=1, num_trees=4)
    sums = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        forest = lay_out([trees[index] for index in order])
        tensors = ForestTensors.from_forest(forest, CPU)
        logprobs, _ = policy.edge_logprobs(tensors, TEMPERATURE)
        # An edge is known by its advantage, a random number of its own.
        sums.append(dict(zip(forest.advantage.tolist(), logprobs.tolist(), strict=True)))
    assert sums[0].keys() == sums[1].keys()
    for advantage, logprob in sums[0].items():
        assert sums[1][advantage] == pytest.approx(logprob, abs=1e-5)


def test_a_step_does_not_see_its_siblings(model_path: str) -> None:
    policy = load(model_path)
    tree = uniform_tree(np.random.default_rng(0), prompt=5, step=4, num_children=2, depth=1)
    changed = [tree[0], tree[1], replace(tree[2], tokens=[7, 7, 7, 7])]
    logprobs = [
        policy.edge_logprobs(ForestTensors.from_forest(lay_out([t]), CPU), 1.0)[0]
        for t in (tree, changed)
    ]
    torch.testing.assert_close(logprobs[0][:4], logprobs[1][:4])
    assert (logprobs[0][4:] - logprobs[1][4:]).abs().min() > 1e-3


def test_a_level_of_equal_segments_is_one_bucket_without_padding() -> None:
    rng = np.random.default_rng(0)
    trees = [uniform_tree(rng, prompt=30, step=23, num_children=6, depth=2) for _ in range(24)]
    layout = ForestLayout.from_forest(lay_out(trees), CPU)
    assert [
        (b.num_segments, b.num_queries, b.num_segments, b.num_keys) for b in layout.buckets.members
    ] == [
        (24, 30, 24, 30),
        (24 * 6, 23, 24 * 6, 53),
        (24 * 36, 23, 24 * 36, 76),
    ]
    assert all(bucket.mask.shape[0] == 1 for bucket in layout.buckets.members)
    assert layout.longest_path == 30 + 2 * 23


def test_a_bucket_more_is_made_only_where_it_saves_more_padding_than_it_costs() -> None:
    rng = np.random.default_rng(0)
    prompts = [uniform_tree(rng, prompt=n, step=1, num_children=1, depth=0) for n in (10, 40, 41)]
    forest = lay_out(prompts)
    # One bucket has 3·41² pairs; {10}, {40, 41} has 10² + 2·41²; three have 10² + 40² + 41².
    for cost, members in [
        (0, [1, 1, 1]),
        (2 * 41**2 - 40**2 - 41**2 - 1, [1, 1, 1]),
        (2 * 41**2 - 40**2 - 41**2 + 1, [1, 2]),
        (41**2 - 10**2 - 1, [1, 2]),
        (41**2 - 10**2 + 1, [3]),
    ]:
        layout = ForestLayout.from_forest(forest, CPU, cost)
        assert [bucket.num_segments for bucket in layout.buckets.members] == members


def test_a_path_longer_than_the_sliding_window_is_refused_and_a_shorter_one_is_exact(
    tmp_path: Path,
) -> None:
    tree = uniform_tree(np.random.default_rng(0), prompt=6, step=5, num_children=2, depth=2)
    wide = save_tiny_model(tmp_path / "wide", "mistral", sliding_window=16)
    loss = packed_loss(load(wide), [tree])
    torch.testing.assert_close(loss, row_loss(load_plain(wide), [tree]), atol=1e-5, rtol=1e-5)
    narrow = load(save_tiny_model(tmp_path / "narrow", "mistral", sliding_window=15))
    with pytest.raises(ValueError, match=r"path of 16 tokens is longer than .* window of 15"):
        packed_loss(narrow, [tree])


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [("dropout", 0.1, "dropout"), ("softcap", 50.0, "softcap"), ("s_aux", torch.ones(2), "sinks")],
)
def test_parts_of_attention_that_would_be_left_out_are_refused(
    argument: str, value: float | Tensor, message: str
) -> None:
    states = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        tree_attention(nn.Module(), states, states, states, None, **{argument: value})


def test_an_input_that_does_not_fit_the_layout_is_refused() -> None:
    tree = uniform_tree(np.random.default_rng(0), prompt=4, step=3, num_children=2, depth=1)
    layout = ForestLayout.from_forest(lay_out([tree]), CPU)
    short, two_rows = torch.ones(1, 2, 9, 4), torch.ones(2, 2, 10, 4)
    with pytest.raises(ValueError, match="layout is for 10 tokens, the input has 9"):
        tree_attention(nn.Module(), short, short, short, None, layout=layout)
    with pytest.raises(ValueError, match="one row of tokens"):
        tree_attention(nn.Module(), two_rows, two_rows, two_rows, None, layout=layout)
    with pytest.raises(ValueError, match="no cache"):
        tree_attention(nn.Module(), short[:, :, -1:], short, short, None)
