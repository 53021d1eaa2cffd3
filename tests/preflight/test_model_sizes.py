"""What a model takes by its sizes: counted by hand, and measured."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests.support.learning.learner_runs import make_config, make_learner
from tests.support.learning.tiny_models import save_tiny_model
from tests.support.learning.trees import full_tree
from tests.support.project import PROJECT
from treerpo_ray.algo.packing import pack
from treerpo_ray.config import load
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.preflight.machine import GIB
from treerpo_ray.preflight.memory import MemoryPlan
from treerpo_ray.preflight.model_sizes import ModelSizes, keys_and_pairs, most_tokens


def test_keys_and_pairs_of_a_tree_are_those_counted_by_hand() -> None:
    """A prompt of 10 tokens, 2 steps of 5 and 4 of 4: 36 tokens, on paths of 10, 15 and 19."""
    shape = ["tree.num_children=[2, 2]", "tree.step_tokens=[5, 4]", "prompts.max_prompt_tokens=10"]
    keys, pairs = keys_and_pairs(load(shape))
    assert keys == pytest.approx((10 + 2 * 15 + 4 * 19) / 36)
    assert pairs == pytest.approx((10 * 10 + 10 * 15 + 16 * 19) / 36)


def test_of_a_shape_that_adapts_the_sizes_are_those_of_the_largest_that_may_come() -> None:
    """A prompt of 10 tokens, a step of 5 and 16 of 4 make 79; of [1, 2] there are 23."""
    adaptive = [
        *(str(PROJECT / "conf/methods/adaptive.yaml"), "tree.num_children=[1, 2]"),
        *("tree.step_tokens=[5, 4]", "prompts.max_prompt_tokens=10", "gate.trees_per_step=3"),
    ]
    config = load(adaptive)
    keys, pairs = keys_and_pairs(config)
    assert keys == pytest.approx((10 + 15 + 16 * 19) / 79)
    assert pairs == pytest.approx((10 * 10 + 5 * 15 + 64 * 19) / 79)
    assert most_tokens(config) == 3 * 79
    assert most_tokens(load([*adaptive, "tree.adaptive=false"])) == 3 * 23


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
"""Each token of the tree is another, of 1,024."""


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of workers of its own that a sharded learner makes ends with the test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("vocabulary", "lora"),
    [(1100, LoraConfig()), (8000, LoraConfig()), (1100, LoraConfig(rank=4))],
    ids=["layers", "head", "adapters"],
)
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_the_estimate_of_activations_is_what_an_update_takes(
    dtype: str,
    checkpointing: bool,
    vocabulary: int,
    lora: LoraConfig,
    shard: bool,
    tmp_path: Path,
    alone: None,
) -> None:
    """On a CPU: a GPU keeps the same tensors, but for those inside of its attention kernels. Most
    is taken by the layers, or by the logits of the head."""
    path = save_tiny_model(tmp_path, "qwen2", **SIZES | {"vocab_size": vocabulary})
    settings = LearnerConfig(gradient_checkpointing=checkpointing, token_budget=10**6, shard=shard)
    config = make_config(path, settings)
    shape = replace(config.tree, num_children=(4, 4), step_tokens=(48, 48))
    config = replace(
        config,
        model=replace(config.model, dtype=dtype),
        prompts=replace(config.prompts, max_prompt_tokens=64),
        tree=shape,
        gate=replace(config.gate, trees_per_step=1),
        learner=settings,
        lora=lora,
    )
    tree = full_tree(4, 2, step_length=48, prompt_length=64)
    forests = pack([tree], [np.tile([1.0, -1.0], len(tree) // 2)], 10**6)
    learner = make_learner(config)
    learner.optimizer.steps([forests], 0.0)  # gradients and moments are there from then on
    gc.collect()  # what goes in the middle would count against what comes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        learner.optimizer.steps([forests], 0.0)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    adapted = sum(weight.numel() for weight in learner.policy.trained) if lora.rank else 0
    sizes = replace(ModelSizes.of(learner.policy.model.config), num_adapted=adapted)
    count = learner.policy.model.num_parameters() - adapted
    parts = MemoryPlan.of(config, count, sizes).worker
    passing = ("activations", "copies in bfloat16", "gathered")
    planned = sum(parts.get(part, 0.0) for part in passing) * GIB
    assert 1.0 < planned / peak < (1.35 if shard else 1.15)
