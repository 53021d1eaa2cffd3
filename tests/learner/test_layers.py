"""What is done to each layer leaves its numbers as they are."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.learning.learner_runs import FREE, State, make_config, make_learner, mixed
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.learner.layers import layers_of


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of workers of its own that a sharded learner makes ends with the test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_compiled_layers_make_the_same_updates_and_one_program_serves_all_forests(
    shard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    """The compiler's front end alone: what it makes of the graphs is its own business."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    path = save_tiny_model(tmp_path, "qwen2")
    # A look at forks goes through the layers without gradients, for which they have a program more.
    settings = replace(FREE, gradient_checkpointing=True, fork_every=0)
    plain = make_learner(make_config(path, settings))
    compiled = make_learner(make_config(path, replace(settings, compile=True, shard=shard)))
    frames = []
    for k in range(2):
        for learner in (plain, compiled):
            learner.update(mixed(first=4 * k, version=k))
        ours, expected = State.of(compiled), State.of(plain)
        torch.testing.assert_close(ours.gradients, expected.gradients, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.parameters, expected.parameters, atol=1e-5, rtol=1e-5)
        frames.append(dict(counters["frames"]))
    assert frames[0]["ok"] > 0 and frames[0] == frames[1]


def test_a_model_without_layers_is_one_line() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=0))
    with pytest.raises(
        ValueError, match=r"^learner\.shard=true needs .* GPT2LMHeadModel does not: set learner\.sh"
    ):
        layers_of(model, "learner.shard")
