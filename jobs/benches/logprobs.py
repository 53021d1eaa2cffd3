"""Log-probs: from hidden states to log-probs, entropies and gradients, without logits and with."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from jobs.benches.sides import ROUNDS, Row, compared, cpu_seconds
from treerpo_ray.config import Config
from treerpo_ray.learner.head import LOGIT_BUDGET, Head
from treerpo_ray.preflight.machine import GIB

VOCABULARY, HIDDEN, ROWS = 151_936, 64, 256
"""The vocabulary of Qwen2.5, and so many rows that all their logits fit the memory of a laptop: one
copy in float32 is 0.14 GiB."""
TEMPERATURE = 0.6

Scores = tuple[Tensor, Tensor]


def bench_logprobs(config: Config) -> list[Row]:
    """CPU time, and peak of what PyTorch allocates on top of the inputs, of both passes.

    One other side makes all logits at once; the other makes as many at a time as ours, and again in
    the backward pass, by PyTorch's own checkpoints.

    Raises:
        AssertionError: log-probs, entropies or gradients of the sides differ.
    """
    torch.set_num_threads(config.learner.cpu_threads)
    torch.manual_seed(0)
    weight = (torch.randn(VOCABULARY, HIDDEN) / 4).requires_grad_()
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    target = torch.randint(VOCABULARY, (ROWS,))
    head = Head(weight=weight, bias=None, scale=1.0, cap=None)
    leaves = [hidden, weight]

    def both_passes(score: Callable[[], Scores]) -> list[Tensor]:
        logprobs, entropy = score()
        loss = (logprobs.exp() - 0.01 * entropy).mean()
        return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]

    ours = partial(
        both_passes, partial(head.score, hidden, torch.arange(ROWS), target, TEMPERATURE)
    )
    others = {
        "all logits at once": partial(both_passes, partial(of_logits, hidden, weight, target)),
        "pieces, checkpointed": partial(both_passes, partial(of_pieces, hidden, weight, target)),
    }
    for other in others.values():
        for mine, theirs in zip(ours(), other(), strict=True):
            # Sums over so large a vocabulary leave 2e-5 of PyTorch's own entropy to rounding.
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=2e-5)
    name = f"logprobs: {ROWS} rows, vocabulary of {VOCABULARY:,}"
    # Memory is the same in each round.
    costs = {"CPU time": (cpu_seconds, "s", ROUNDS), "peak memory": (peak_gib, "GiB", 1)}
    return [
        compared(
            f"{name} ({what})",
            ("no logits kept", partial(cost, ours)),
            (other, partial(cost, way)),
            unit,
            rounds,
        )
        for what, (cost, unit, rounds) in costs.items()
        for other, way in others.items()
    ]


def of_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Scores:
    """The plain way."""
    logprobs = (linear(hidden, weight) / TEMPERATURE).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, target[:, None])[:, 0], entropy


def of_pieces(hidden: Tensor, weight: Tensor, target: Tensor) -> Scores:
    """The plain way for some rows at a time, each computed again in the backward pass."""
    num_pieces = -(-len(hidden) * len(weight) // LOGIT_BUDGET["cpu"])
    parts = [
        checkpoint(of_logits, rows, weight, own, use_reentrant=False)
        for rows, own in zip(
            hidden.tensor_split(num_pieces), target.tensor_split(num_pieces), strict=True
        )
    ]
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def peak_gib(work: Callable[[], object]) -> float:
    """The most that is allocated at a time while `work` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results = profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / GIB
