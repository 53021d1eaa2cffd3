"""The learner's reference: one plain row for each trained step, advantages by hand."""

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from treerpo_ray.algo.loss_config import Normalisation
from treerpo_ray.config import Config
from treerpo_ray.records import TreeRecord

REWARDS = {"correct": 1.0, "wrong": 0.0, "cut_off": 0.0}


def plain_model(path: str | Path) -> PreTrainedModel:
    """The model itself, without tree attention."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


def row(
    model: PreTrainedModel, record: TreeRecord, index: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each token of a step, from a plain forward of its whole path."""
    tokens = [*record.tree.prompt_ids.tolist(), *record.tree.path_token_ids(index)]
    count = len(record.tree.steps[index].token_ids)
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    logprobs = (logits[-count - 1 : -1] / temperature).log_softmax(-1)
    return logprobs[range(count), tokens[-count:]], -(logprobs.exp() * logprobs).sum(-1)


def bernoulli_by_hand(record: TreeRecord, threshold: float) -> dict[int, float]:
    """Advantage of each trained step by arXiv 2506.05183, eq. 1-4."""
    steps = record.tree.steps
    values = [math.nan] * len(steps)
    for leaf, verdict in zip(record.tree.leaves, record.verdicts, strict=True):
        values[leaf] = REWARDS.get(verdict, math.nan)
    groups = {p: [i for i, s in enumerate(steps) if s.parent == p] for p in range(-1, len(steps))}
    advantages: dict[int, float] = {}
    for parent in sorted((p for p in groups if groups[p]), reverse=True):
        group = [values[i] for i in groups[parent]]
        mean = sum(group) / len(group)
        if parent >= 0:
            values[parent] = mean
        if max(group) - min(group) > threshold and not math.isnan(mean):
            advantages |= {i: (values[i] - mean) / (mean * (1 - mean)) for i in groups[parent]}
    return advantages


def row_gradients(
    model: PreTrainedModel, records: list[TreeRecord], config: Config
) -> dict[str, Tensor]:
    """Gradients at ratio 1 of the loss in eq. 5, one row for each trained step."""
    loss = config.loss
    trained = [
        (record, index, advantage)
        for record in records
        for index, advantage in bernoulli_by_hand(record, config.learner.prune_threshold).items()
    ]
    num_tokens = sum(len(record.tree.steps[index].token_ids) for record, index, _ in trained)
    model.zero_grad()
    for record, index, advantage in trained:
        logprobs, entropy = row(model, record, index, config.tree.temperature)
        behaviour = torch.from_numpy(record.tree.steps[index].logprobs)
        weight = (logprobs.detach() - behaviour).exp().clamp(max=loss.importance_cap)
        tokens = -weight * advantage * logprobs - loss.entropy_coef * entropy
        if loss.normalisation is Normalisation.TOKEN_MEAN:
            (tokens.sum() / num_tokens).backward()
        elif loss.normalisation is Normalisation.SEQUENCE_MEAN:
            (tokens.mean() / len(trained)).backward()
        else:
            (tokens.sum() / config.shape.max_answer_tokens / len(trained)).backward()
    return gradients(model)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradient of every parameter that has one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
