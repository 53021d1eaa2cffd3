"""Workload of the first GPU run: a model, trees and forests, in real sizes or tiny ones."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from jobs.benches.random_trees import random_tree, scored_record
from treerpo_ray.algo.packing import Forest
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config import Config, load
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.policy import Policy, load_policy
from treerpo_ray.records import TreeRecord

PROJECT = Path(__file__).resolve().parents[2]


class Tell(Protocol):
    """Adds to what a part has found, and writes it down at once."""

    def __call__(self, **results: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is."""

    device: torch.device
    layers: int
    few_layers: int
    """Of a second model, on which is held together what does not depend on their number."""
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    children: tuple[int, ...]
    """Of the trees that the learner is given."""
    step_tokens: int
    token_budget: int
    new_shapes: int
    """Shapes of attention that are met for the first time."""
    engine_trees: int
    gpu: tuple[str, ...]
    """Arguments of `jobs/train.py` for this hardware."""
    small: tuple[str, ...]
    """Further ones for a run that is over soon."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


REAL = Sizes(  # Qwen2.5-Math-1.5B
    device=torch.device("cuda"),
    layers=28,
    few_layers=4,
    hidden=1536,
    intermediate=8960,
    heads=12,
    kv_heads=2,
    vocabulary=151_936,
    children=(4, 4, 4),
    step_tokens=384,
    token_budget=24_576,
    new_shapes=20,
    engine_trees=8,
    gpu=(str(PROJECT / "conf/hardware/one_gpu.yaml"),),
    small=("prompts.num_problems=64",),
)
REHEARSAL = Sizes(
    device=torch.device("cpu"),
    layers=2,
    few_layers=1,
    hidden=128,
    intermediate=352,
    heads=4,
    kv_heads=2,
    vocabulary=258,
    children=(2, 2),
    step_tokens=8,
    token_budget=64,
    new_shapes=3,
    engine_trees=1,
    gpu=("engine.kv_cache_gib=0.25", "model.dtype=float32", "sync.probe_tolerance=0.1"),
    small=(
        *("prompts.num_problems=8", "engine.max_num_seqs=64", "metrics.wandb_project=null"),
        "sync.transport=nccl",  # on CPUs that is gloo
    ),
)


def recipe(sizes: Sizes, folder: Path, model: str = "model") -> Config:
    """The recipe's learner and engine for a model of the part `model`, on one GPU or the CPU."""
    file = str(PROJECT / "conf/treerpo_qwen2.5_math_1.5b.yaml")
    config = load([file, *sizes.gpu, f"model.path={folder}/{model}"])
    lengths = (sizes.step_tokens,) * len(sizes.children)
    config = replace(
        config,
        prompts=replace(config.prompts, max_prompt_tokens=sizes.step_tokens),
        tree=replace(config.tree, num_children=sizes.children, step_tokens=lengths),
        learner=replace(config.learner, token_budget=sizes.token_budget),
    )
    if sizes is REAL:
        return config
    return replace(
        config,
        learner=replace(config.learner, resources={"CPU": 1}),
        engine=replace(config.engine, resources={"CPU": 1}, max_num_seqs=8),
    )


def made_policy(sizes: Sizes, folder: Path) -> Policy:
    """The policy of the model that the part `model` made."""
    return load_policy(
        str(folder / "model"),
        dtype=torch.float32,
        device=sizes.device,
        gradient_checkpointing=True,
    )


def make_learner(
    config: Config,
    sizes: Sizes,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    shard: bool = False,
    compiled: bool = False,
    offload: bool = False,
    checkpoint: Path | None = None,
) -> Learner:
    """A learner with one optimizer step a batch, which trains every tree."""
    settings = replace(
        config.learner,
        minibatches=1,
        prune_threshold=-1.0,
        shard=shard,
        compile=compiled,
        offload=offload,
    )
    return Learner(
        model=replace(config.model, dtype=dtype),
        learner=settings,
        loss=config.loss,
        tree=config.tree,
        gate=replace(config.gate, max_staleness=1000),
        max_tokens=config.max_model_tokens,
        device=sizes.device,
        checkpoint=checkpoint,
    )


def random_record(ticket: int, sizes: Sizes) -> TreeRecord:
    """A tree as large as it may be, half of whose answers are right."""
    shape = TreeShape(
        num_children=sizes.children, step_tokens=(sizes.step_tokens,) * len(sizes.children)
    )
    rng, tokens = np.random.default_rng(ticket), range(3, sizes.vocabulary)
    tree = random_tree(shape, sizes.step_tokens, rng, tokens=tokens, logprob=-10.0)
    return scored_record(ticket, tree, [bool(leaf % 2) for leaf in tree.leaves])


def forest_of(prompt: int, steps: list[int]) -> Forest:
    """A prompt with steps after it, each token of which is trained."""
    lengths = [prompt, *steps]
    starts = np.cumsum([0, *lengths[:-1]])
    own = [np.arange(prompt, prompt + length) for length in steps]
    source = [np.concatenate([[prompt - 1], np.arange(s, s + n - 1)]) for s, n in
              zip(starts[1:], steps, strict=True)]  # fmt: skip
    tokens = (np.arange(sum(lengths)) % 200 + 3).astype(np.int32)
    edges = sum(steps)
    return Forest(
        token_ids=tokens,
        position_ids=np.concatenate([np.arange(prompt), *own], dtype=np.int32),
        segment_start=starts,
        segment_length=np.array(lengths),
        segment_parent=np.array([-1, *[0] * len(steps)]),
        segment_depth=np.array([0, *[1] * len(steps)]),
        source=np.concatenate(source, dtype=np.int32),
        target=tokens[prompt:],
        advantage=np.zeros(edges, np.float32),
        behaviour_logprob=np.zeros(edges, np.float32),
        step=np.repeat(np.arange(len(steps), dtype=np.int32), steps),
        origin=np.arange(len(steps)),
    )
