"""Learner: the policy's forward and backward pass, packed against rows."""

from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from jobs.benches.random_trees import random_tree
from jobs.benches.sides import Row, compared, seconds
from treerpo_ray.algo.packing import pack
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.algo.tree import Tree
from treerpo_ray.config import Config


def bench_learner(config: Config) -> list[Row]:
    """Forward and backward over the same trained steps: packed forest against a row a step."""
    from transformers import AutoModelForCausalLM

    from treerpo_ray.learner.policy import ForestTensors, load_policy

    torch.set_num_threads(config.learner.cpu_threads)
    rng = np.random.default_rng(0)
    policy = load_policy(
        config.model.path,
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    plain = AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="sdpa")

    def packed(trees: list[Tree], advantages: list[np.ndarray]) -> None:
        policy.model.zero_grad()
        for forest in pack(trees, advantages, config.learner.token_budget):
            tensors = ForestTensors.from_forest(forest, torch.device("cpu"))
            logprobs, _ = policy.edge_logprobs(tensors, 1.0)
            (-(logprobs * tensors.advantage).sum()).backward()

    def rows(trees: list[Tree], advantages: list[np.ndarray]) -> None:
        plain.zero_grad()
        paths = [
            (torch.tensor([*t.prompt_ids.tolist(), *t.path_token_ids(i)]), len(s.token_ids), a[i])
            for t, a in zip(trees, advantages, strict=True)
            for i, s in enumerate(t.steps)
        ]
        paths.sort(key=lambda path: len(path[0]))
        size = max(1, config.learner.token_budget // len(paths[-1][0]))
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            ids = pad_sequence([path for path, _, _ in batch], batch_first=True)
            mask = pad_sequence([torch.ones_like(path) for path, _, _ in batch], batch_first=True)
            logits = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            loss = logprobs.new_zeros(())
            for row, (path, count, advantage) in zip(logprobs, batch, strict=True):
                loss = loss - advantage * row[len(path) - 1 - count : len(path) - 1].sum()
            loss.backward()

    found = []
    for name, num_children, step_tokens in (
        ("quickstart trees, 4x4 of 23 tokens", (4, 4), (23, 23)),
        ("4x4x4 of 23 tokens", (4, 4, 4), (23, 23, 23)),
    ):
        shape = TreeShape(num_children=num_children, step_tokens=step_tokens)
        trees = [random_tree(shape, 24, rng) for _ in range(4)]
        advantages = [rng.normal(size=len(tree.steps)) for tree in trees]
        found.append(
            compared(
                f"learner: {name}",
                ("packed forest", partial(seconds, partial(packed, trees, advantages))),
                ("one row a step", partial(seconds, partial(rows, trees, advantages))),
            )
        )
    return found
