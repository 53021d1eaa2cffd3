"""Sketches of gradients: products as of plain gradients of single answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.learning.learner_runs import FREE, make_config, make_learner, make_record
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.algo.loss_config import LossConfig, Normalisation
from treerpo_ray.algo.tree import Tree
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.learner.policy import Policy
from treerpo_ray.study.step_gradients import Sketch, step_gradients

WHOLE = 2**20
"""More numbers than the models have: nothing is added up."""


def plain_gradient(policy: Policy, temperature: float, tree: Tree, step: int) -> np.ndarray:
    """Of log p of a step, from a plain causal pass over the path to it."""
    ids = torch.tensor([[*tree.prompt_ids, *tree.path_token_ids(step)]])
    own = ids[0, -int(tree.lengths[step]) :]
    output = policy.model.base_model(
        input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], layout=None, use_cache=False
    )
    logits = policy.model.lm_head(output.last_hidden_state[0]) / temperature
    logprobs = logits.log_softmax(-1)[-len(own) - 1 : -1].gather(1, own[:, None])
    found = torch.autograd.grad(logprobs.sum(), policy.trained, allow_unused=True)
    pairs = zip(policy.trained, found, strict=True)
    parts = [torch.zeros_like(weight) if each is None else each for weight, each in pairs]
    return torch.cat([each.flatten() for each in parts]).double().numpy()


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize("normalisation", [Normalisation.CONSTANT, Normalisation.SEQUENCE_MEAN])
def test_products_are_those_of_plain_gradients_by_all_that_is_trained(
    tmp_path: Path, normalisation: Normalisation, is_adapted: bool
) -> None:
    config = make_config(save_tiny_model(tmp_path, "qwen2"), FREE, LossConfig())
    if is_adapted:
        config = replace(config, lora=LoraConfig(rank=4, alpha=8))
    learner = make_learner(config)
    trees = [make_record(3, "cwcwc").tree, make_record(4, "c", parents=(-1,)).tree]
    found = step_gradients(
        learner.optimizer,
        trees,
        seed=1,
        token_budget=int(trees[0].path_lengths.max() + len(trees[0].prompt_ids)),
        normalisation=normalisation,
        width=WHOLE,
    )
    assert [each.shape for each in found] == [(len(tree), WHOLE) for tree in trees]
    sketches = np.concatenate(found).astype(np.float64)
    plain = np.stack(
        [
            plain_gradient(learner.policy, config.tree.temperature, tree, step)
            / (tree.lengths[step] if normalisation is Normalisation.SEQUENCE_MEAN else 1)
            for tree in trees
            for step in range(len(tree))
        ]
    )
    products = plain @ plain.T
    scale = np.sqrt(np.outer(products.diagonal(), products.diagonal()))
    np.testing.assert_allclose(sketches @ sketches.T / scale, products / scale, atol=1e-5)
    assert all(weight.grad is None for weight in learner.policy.trained), "nothing is left behind"


def test_narrow_sketches_keep_products_in_the_mean_and_are_off_by_no_more_than_is_said() -> None:
    shapes, width, count = [(40, 5), (7,), (30, 11), (3, 3)], 32, 2000
    torch.manual_seed(0)
    one: list[Tensor | None] = [torch.randn(shape) for shape in shapes]
    other: list[Tensor | None] = [
        torch.randn(shape) + 0.5 * own for shape, own in zip(shapes, one, strict=True)
    ]
    other[1] = None  # a parameter that this step does not go through
    parameters = [torch.zeros(shape) for shape in shapes]
    products = []
    for seed in range(count):
        sketch = Sketch(parameters, seed=seed, width=width)
        assert sketch.of(one).shape == (width,)
        products.append(float(sketch.of(one) @ sketch.of(other)))
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    exact = sum(float((a * b).sum()) for a, b in pairs)
    squares = [
        sum(float((each**2).sum()) for each in gradients if each is not None)
        for gradients in (one, other)
    ]
    lengths = squares[0] * squares[1]
    assert np.var(products) < 2 * lengths / width
    assert np.mean(products) == pytest.approx(exact, abs=4 * np.sqrt(2 * lengths / width / count))


def test_sketches_as_wide_as_all_parameters_keep_products_to_rounding() -> None:
    parameters = [torch.zeros(9, 7), torch.zeros(5)]
    torch.manual_seed(1)
    one, other = ([torch.randn(9, 7), torch.randn(5)] for _ in range(2))
    sketch = Sketch(parameters, seed=0, width=68)
    exact = sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))
    assert float(sketch.of(one) @ sketch.of(other)) == pytest.approx(exact, rel=1e-5)
