"""Both ways to attend in a forest are one; a GPU's call is made as torch takes it."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tests.support.learning.forests import lay_out, random_tree
from tests.support.learning.plain_varlen import PLAIN, plain_varlen
from treerpo_ray.learner.forest_layout import BUCKET_COST, FLASH, ForestLayout

CPU = torch.device("cpu")


def layout_of(seed: int) -> ForestLayout:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, num_children=3, max_depth=3) for _ in range(2)]
    return ForestLayout.from_forest(lay_out(trees), CPU)


def states_of(layout: ForestLayout, heads: int, kv_heads: int) -> list[Tensor]:
    """Queries, keys and values in double precision, whose gradients are asked for."""
    made = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            layout.num_tokens, count, 8, generator=made, dtype=torch.float64
        ).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_one_call_over_all_paths_has_the_outputs_and_gradients_of_buckets(
    heads: int, kv_heads: int
) -> None:
    for seed in range(3):
        layout = layout_of(seed)
        found = []
        for kernel in (None, PLAIN):
            states = states_of(layout, heads, kv_heads)
            output = replace(layout, kernel=kernel).attend(*states, 0.3)
            output.square().sum().backward()
            found.append([output, *(state.grad for state in states)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_queries_of_a_call_are_the_forest_in_order_and_keys_its_paths() -> None:
    layout = layout_of(0)
    paths = layout.varlen
    assert paths.query_ends.tolist() == [0, *layout.lengths.cumsum().tolist()]
    for number, path in enumerate(layout.paths):
        start, end = paths.key_ends[number : number + 2].tolist()
        assert paths.key_index[start:end].tolist() == path.tolist()
        own = range(*paths.query_ends[number : number + 2].tolist())
        assert path[len(path) - len(own) :].tolist() == list(own)


def test_the_call_is_one_that_torch_takes() -> None:
    """No CPU computes it: names and causality, as the plain one has them, are all there is."""
    asked = inspect.signature(plain_varlen).parameters
    known = inspect.signature(varlen_attn).parameters
    assert set(asked) <= set(known)
    assert {name: asked[name].kind for name in asked} == {name: known[name].kind for name in asked}
    positional = [name for name in asked if asked[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert list(known)[: len(positional)] == positional
    text = " ".join((varlen_attn.__doc__ or "").split())
    assert "(-1, 0) for causal attention" in text and "Grouped Query Attention" in text


def test_the_call_is_for_half_precision_on_a_gpu_and_buckets_are_for_the_rest() -> None:
    assert FLASH.attend is varlen_attn
    for dtype in (torch.float32, torch.bfloat16):
        states = torch.zeros(1, 1, 64, dtype=dtype)
        assert not FLASH.takes(states, states)
    layout = layout_of(0)
    layout.attend(*states_of(layout, 2, 1), None)
    assert "buckets" in vars(layout) and "varlen" not in vars(layout)
    assert BUCKET_COST["cuda"] > BUCKET_COST["cpu"]


def test_what_autocast_computes_in_is_known_to_both() -> None:
    layout = layout_of(0)
    states = [state.detach().float() for state in states_of(layout, 2, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [replace(layout, kernel=k).attend(*states, None) for k in (None, PLAIN)]
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    torch.testing.assert_close(*outputs, atol=2e-2, rtol=2e-2)
