import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.learning.trees import edge_contexts, make_tree, trees
from treerpo_ray.algo.loss import LossInputs, LossOutput, LossSums, k3, policy_loss
from treerpo_ray.algo.loss_config import LossConfig, Normalisation, Ratio
from treerpo_ray.algo.packing import Forest, pack
from treerpo_ray.algo.tree import Tree

PLAIN = LossConfig(importance_cap=None)
NUM_TOKENS_OF_VOCABULARY = 128
GSPO_CASES = [
    (1 + 3.9e-4, 1.0, False),
    (1 + 4.1e-4, 1.0, True),
    (1 + 4.1e-4, -1.0, False),
    (1 - 2.9e-4, -1.0, False),
    (1 - 3.1e-4, -1.0, True),
]
"""Geometric mean of a step's ratios, its advantage, and whether the clip cuts its gradient."""
BATCH = {"num_batch_tokens": 5, "num_batch_steps": 2, "max_answer_tokens": 8}


def inputs_of(
    *,
    ratio: list[float],
    advantages: list[float],
    mismatch: list[float] | None = None,
    to_reference: list[float] | None = None,
    step: list[int] | None = None,
) -> LossInputs:
    """Inputs with given ratios, old - behaviour and reference - policy log-probs; entropy 1."""
    old = torch.linspace(-2, -1, len(ratio), dtype=torch.float64)
    logprobs = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    reference = None
    if to_reference is not None:
        reference = logprobs.detach() + torch.tensor(to_reference, dtype=torch.float64)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        behaviour_logprobs=old - torch.tensor(mismatch or [0.0] * len(ratio), dtype=torch.float64),
        reference_logprobs=reference,
        entropy=torch.ones_like(old).requires_grad_(),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        step=torch.tensor(step or [0] * len(ratio)),
    )


def loss_of(inputs: LossInputs, config: LossConfig = PLAIN) -> LossOutput:
    """The loss of a batch that consists of `inputs` alone."""
    num_steps = int(inputs.step.max()) + 1
    return policy_loss(
        inputs,
        num_batch_tokens=len(inputs.step),
        num_batch_steps=num_steps,
        max_answer_tokens=8,
        config=config,
    )


def gradient(inputs: LossInputs, config: LossConfig = PLAIN) -> list[float]:
    (grad,) = torch.autograd.grad(loss_of(inputs, config).loss, inputs.logprobs)
    return grad.tolist()


def test_at_ratio_one_the_gradient_is_the_policy_gradient() -> None:
    inputs = inputs_of(ratio=[1, 1, 1, 1], advantages=[2, -1, 0, 0.5])
    assert gradient(inputs) == pytest.approx([-0.5, 0.25, 0, -0.125])
    assert loss_of(inputs).loss.item() == pytest.approx(-(2 - 1 + 0 + 0.5) / 4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        (1.5, 2.0, -2.4, 0.0),  # clipped above: nothing more to gain
        (0.5, 2.0, -1.0, -1.0),  # below, but the step is good: pull it up
        (1.5, -2.0, 3.0, 3.0),  # above, but the step is bad: push it down
        (0.5, -2.0, 1.6, 0.0),  # clipped below
    ],
)
def test_the_clip_cuts_the_gradient_on_its_own_side_only(
    ratio: float, advantage: float, loss: float, grad: float
) -> None:
    inputs = inputs_of(ratio=[ratio], advantages=[advantage])
    assert loss_of(inputs).loss.item() == pytest.approx(loss)
    assert gradient(inputs) == pytest.approx([grad])
    assert float(loss_of(inputs).sums.num_clipped) == (grad == 0.0)


def test_clip_higher_widens_the_upper_side_only() -> None:
    config = replace(PLAIN, clip_high=0.28)
    inputs = inputs_of(ratio=[1.27, 1.29, 0.79, 0.81], advantages=[1, 1, -1, -1])
    assert [g == 0 for g in gradient(inputs, config)] == [False, True, True, False]


def test_importance_weights_scale_the_policy_term_and_are_capped() -> None:
    inputs = inputs_of(
        ratio=[1, 1, 1], advantages=[1, 1, 1], mismatch=[math.log(1.5), math.log(3), math.log(0.5)]
    )
    capped = loss_of(inputs, replace(PLAIN, importance_cap=2.0))
    assert gradient(inputs, replace(PLAIN, importance_cap=2.0)) == pytest.approx(
        [-1.5 / 3, -2 / 3, -0.5 / 3]
    )
    assert capped.loss.item() == pytest.approx(-4 / 3)
    assert float(capped.sums.importance_weight) == pytest.approx(4)
    assert float(capped.sums.num_truncated) == 1
    off = loss_of(inputs)
    assert off.loss.item() == pytest.approx(-1)
    assert float(off.sums.importance_weight) == 3
    assert float(off.sums.num_truncated) == 0


def test_gradients_flow_through_logprobs_and_entropy_alone() -> None:
    inputs = inputs_of(ratio=[1.1, 0.9], advantages=[1, -1], to_reference=[0.1, -0.1])
    constants = [inputs.old_logprobs, inputs.behaviour_logprobs, inputs.reference_logprobs]
    for constant in constants:
        assert constant is not None
        constant.requires_grad_()
    config = LossConfig(kl_coef=0.1, entropy_coef=0.1)
    torch.autograd.backward(loss_of(inputs, config).loss)
    assert inputs.logprobs.grad is not None
    assert inputs.entropy.grad is not None
    assert all(constant is not None and constant.grad is None for constant in constants)


def test_the_kl_term_has_the_value_and_gradient_of_k3() -> None:
    """d k3(reference - logprob) / d logprob = 1 - exp(reference - logprob)."""
    inputs = inputs_of(ratio=[1, 1], advantages=[0, 0], to_reference=[1.0, -1.0])
    config = replace(PLAIN, kl_coef=0.5)
    expected = 0.5 * ((math.e - 2) + 1 / math.e) / 2
    assert loss_of(inputs, config).loss.item() == pytest.approx(expected)
    assert gradient(inputs, config) == pytest.approx(
        [0.5 * (1 - math.e) / 2, 0.5 * (1 - 1 / math.e) / 2]
    )
    assert loss_of(inputs, PLAIN).loss.item() == 0  # measured, but not part of the loss
    assert float(loss_of(inputs, PLAIN).sums.kl) == pytest.approx(math.e - 2 + 1 / math.e)


def test_the_entropy_term_rewards_entropy() -> None:
    inputs = inputs_of(ratio=[1, 1], advantages=[0, 0])
    output = loss_of(inputs, replace(PLAIN, entropy_coef=0.3))
    torch.autograd.backward(output.loss)
    assert output.loss.item() == pytest.approx(-0.3)
    assert inputs.entropy.grad is not None
    assert inputs.entropy.grad.tolist() == pytest.approx([-0.15, -0.15])


def test_normalisations_by_hand() -> None:
    """Step 0 has one token of loss -6, step 1 three of loss -2."""
    inputs = inputs_of(ratio=[1] * 4, advantages=[6, 2, 2, 2], step=[0, 1, 1, 1])
    token_mean = replace(PLAIN, normalisation=Normalisation.TOKEN_MEAN)
    sequence_mean = replace(PLAIN, normalisation=Normalisation.SEQUENCE_MEAN)
    assert loss_of(inputs, token_mean).loss.item() == pytest.approx(-(6 + 2 + 2 + 2) / 4)
    assert loss_of(inputs, sequence_mean).loss.item() == pytest.approx(-(6 + 2) / 2)
    assert gradient(inputs, sequence_mean) == pytest.approx([-3, -1 / 3, -1 / 3, -1 / 3])
    constant = replace(PLAIN, normalisation=Normalisation.CONSTANT)  # 8 tokens, 2 steps
    assert loss_of(inputs, constant).loss.item() == pytest.approx(-(6 + 2 + 2 + 2) / (8 * 2))


def test_the_ratio_of_a_sequence_is_the_geometric_mean_over_the_tokens_of_its_step() -> None:
    """Step 0 has ratios 2 and 1/2, mean 1; step 1 has 1.1 alone; step 2 has 4, 2 and 1, mean 2."""
    inputs = inputs_of(
        ratio=[2, 0.5, 1.1, 4, 2, 1], advantages=[3, 3, -1, 1, 1, 1], step=[0, 0, 1, 2, 2, 2]
    )
    config = replace(PLAIN, ratio=Ratio.SEQUENCE, normalisation=Normalisation.SEQUENCE_MEAN)
    output = loss_of(inputs, config)
    assert output.loss.item() == pytest.approx(-(3 - 1.1 + 1.2) / 3)
    assert float(output.sums.ratio) == pytest.approx(1 + 1 + 1.1 + 2 + 2 + 2)
    assert float(output.sums.num_clipped) == 3, "a step is clipped with all its tokens"
    # Of exp(mean of n) each token has 1/n of the gradient: GSPO's sum over n tokens of s A / n.
    assert gradient(inputs, config) == pytest.approx([-3 / 2 / 3, -3 / 2 / 3, 1.1 / 3, 0, 0, 0])


@pytest.mark.parametrize(("mean", "advantage", "is_clipped"), GSPO_CASES)
def test_the_published_clip_range_of_gspo_cuts_whole_steps(
    mean: float, advantage: float, is_clipped: bool
) -> None:
    config = replace(PLAIN, ratio=Ratio.SEQUENCE, clip_low=3e-4, clip_high=4e-4)
    inputs = inputs_of(ratio=[1.5 * mean, mean / 1.5], advantages=[advantage] * 2)
    assert [g == 0 for g in gradient(inputs, config)] == [is_clipped] * 2


def test_kl_without_a_reference_model_says_what_to_do() -> None:
    inputs = inputs_of(ratio=[1], advantages=[1])
    with pytest.raises(
        ValueError, match=r"loss\.kl_coef needs a reference model.*set kl_coef to 0"
    ):
        loss_of(inputs, LossConfig(kl_coef=0.001))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (lambda: LossConfig(clip_low=-0.1), "clip_low"),
        (lambda: LossConfig(clip_low=1.5), "clip_low"),
        (lambda: LossConfig(clip_high=-0.1), "clip_high"),
        (lambda: LossConfig(importance_cap=0.0), "importance_cap"),
    ],
)
def test_impossible_settings_are_refused_by_name(config: Callable[[], object], key: str) -> None:
    with pytest.raises(ValueError, match=f"loss.{key}"):
        config()


def test_a_forest_without_edges_adds_nothing_and_can_be_backpropagated() -> None:
    empty = torch.empty(0)
    logprobs = torch.empty(0, requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=empty,
        behaviour_logprobs=empty,
        reference_logprobs=None,
        entropy=empty,
        advantages=empty,
        step=torch.empty(0, dtype=torch.int64),
    )
    for normalisation in Normalisation:
        config = LossConfig(normalisation=normalisation)
        output = policy_loss(inputs, **BATCH, config=config)
        torch.autograd.backward(output.loss)
        assert output.sums.vector().tolist() == [0.0] * len(fields(LossSums))


def test_metrics_of_two_forests_by_hand() -> None:
    config = LossConfig(importance_cap=2.0)
    first = inputs_of(ratio=[1.0, 1.5], advantages=[1, 1], mismatch=[0.0, -math.log(2)])
    second = inputs_of(ratio=[1.5], advantages=[-2], mismatch=[math.log(4)])
    sums = [
        policy_loss(part, **(BATCH | {"num_batch_tokens": 3}), config=config).sums
        for part in (first, second)
    ]
    metrics = (sums[0] + sums[1]).metrics()
    loss = (-1 - 0.5 * 1.2 + 2 * 3) / 3
    log2 = math.log(2)
    assert metrics == pytest.approx(
        {
            "loss/total": loss,
            "loss/policy": loss,
            "loss/kl": 0.0,
            "loss/entropy": 1.0,
            "loss/ratio": 4 / 3,
            "loss/clip_share": 1 / 3,
            "mismatch/mean": log2,
            "mismatch/max": 2 * log2,
            "mismatch/kl": ((0.5 + log2 - 1) + (4 - 2 * log2 - 1)) / 3,
            "importance/mean": (1 + 0.5 + 2) / 3,
            "importance/truncated_share": 1 / 3,
        }
    )


def test_sums_travel_as_one_vector() -> None:
    sums = loss_of(inputs_of(ratio=[1.3], advantages=[2], mismatch=[0.5])).sums
    again = LossSums.from_vector(sums.vector())
    assert again.metrics() == sums.metrics()


def test_adding_to_no_sums_changes_nothing() -> None:
    sums = loss_of(inputs_of(ratio=[1.3], advantages=[2], mismatch=[0.5])).sums
    assert (LossSums.zeros(torch.device("cpu")) + sums).metrics() == sums.metrics()


@pytest.mark.parametrize(("x", "value"), [(0, 0), (1, math.e - 2), (-1, 1 / math.e)])
def test_k3_by_hand(x: float, value: float) -> None:
    assert float(k3(torch.tensor([x], dtype=torch.float64))) == pytest.approx(value)


@given(st.lists(st.floats(-20, 20, width=32), min_size=1))
def test_k3_is_never_negative(x: list[float]) -> None:
    assert (k3(torch.tensor(x)) >= 0).all()


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=6))
def test_k3_has_the_kl_divergence_as_its_mean(logits: list[tuple[float, float]]) -> None:
    p, q = torch.tensor(logits, dtype=torch.float64).log_softmax(0).unbind(1)
    mean = (p.exp() * k3(q - p)).sum()
    torch.testing.assert_close(mean, (p.exp() * (p - q)).sum(), rtol=1e-9, atol=1e-12)


class ToyModel(torch.nn.Module):
    """Predicts from a weighted mean of what was seen; exact and cheap for any context."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = (NUM_TOKENS_OF_VOCABULARY, 4)
        weights = torch.randn(2, *size, generator=generator, dtype=torch.float64)
        self.embedding, self.head = (torch.nn.Parameter(w) for w in weights)

    def forward(self, seen: list[int]) -> Tensor:
        position = torch.arange(1, len(seen) + 1, dtype=torch.float64)
        state = (self.embedding[seen] * position[:, None]).sum(0) / position.sum()
        return (self.head @ torch.tanh(state)).log_softmax(0)


def batch_inputs(model: ToyModel, forests: list[Forest]) -> list[LossInputs]:
    """What a forward pass of each forest gives; old, behaviour and reference are off by a bit."""
    found = []
    for forest in forests:
        logits = torch.stack([model(seen) for seen in edge_contexts(forest)])
        target = torch.from_numpy(forest.target).long()
        logprobs = logits.gather(1, target[:, None])[:, 0]
        off = torch.sin(target.double())
        found.append(
            LossInputs(
                logprobs=logprobs,
                old_logprobs=logprobs.detach() + 0.3 * off,
                behaviour_logprobs=torch.from_numpy(forest.behaviour_logprob).double() - 4,
                reference_logprobs=logprobs.detach() - 0.2 * off,
                entropy=-(logits.exp() * logits).sum(1),
                advantages=torch.from_numpy(forest.advantage).double(),
                step=torch.from_numpy(forest.step).long(),
            )
        )
    return found


def batch_loss(
    model: ToyModel, forests: list[Forest], inputs: list[LossInputs], config: LossConfig
) -> tuple[Tensor, LossSums, list[Tensor]]:
    """Loss, sums and gradients of a batch."""
    outputs = [
        policy_loss(
            own,
            num_batch_tokens=sum(len(forest.target) for forest in forests),
            num_batch_steps=sum(forest.num_steps for forest in forests),
            max_answer_tokens=8,
            config=config,
        )
        for own in inputs
    ]
    loss = torch.stack([output.loss for output in outputs]).sum()
    sums = outputs[0].sums
    for output in outputs[1:]:
        sums = sums + output.sums
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return loss, sums, list(gradients)


@given(tree=trees(max_groups=4, max_children=3), data=st.data())
def test_loss_gradients_and_metrics_do_not_depend_on_how_the_batch_is_packed(
    tree: Tree, data: st.DataObject
) -> None:
    """One forest, small forests, and one row for each step, as the authors train, agree, with each
    normalisation and ratio."""
    other = make_tree([-1, -1, 1], [2, 1, 3], prompt_length=2, first_token=90)
    batch = [tree, other]
    is_trained = data.draw(
        st.lists(st.booleans(), min_size=len(tree.steps), max_size=len(tree.steps))
    )
    advantages = [
        np.where(is_trained, np.arange(len(is_trained)) - 2.5, np.nan),
        np.array([1.0, -1.0, 2.0]),
    ]
    rows = [
        np.where(np.arange(len(a)) == step, a, np.nan)
        for a in advantages
        for step in np.flatnonzero(~np.isnan(a))
    ]
    row_trees = [
        t for t, a in zip(batch, advantages, strict=True) for _ in range((~np.isnan(a)).sum())
    ]
    ways = [
        pack(batch, advantages, token_budget=10_000),
        pack(batch, advantages, token_budget=30),
        [pack([t], [row], 10_000)[0] for t, row in zip(row_trees, rows, strict=True)],
    ]
    model = ToyModel()
    passed = [(forests, batch_inputs(model, forests)) for forests in ways]
    for normalisation, ratio in itertools.product(Normalisation, Ratio):
        config = LossConfig(kl_coef=0.1, entropy_coef=0.1, normalisation=normalisation, ratio=ratio)
        (loss, sums, gradients), *others = (batch_loss(model, *way, config) for way in passed)
        for other_loss, other_sums, other_gradients in others:
            torch.testing.assert_close(other_loss, loss, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(other_gradients, gradients, rtol=1e-11, atol=1e-12)
            assert other_sums.metrics() == pytest.approx(sums.metrics(), rel=1e-11, abs=1e-12)
