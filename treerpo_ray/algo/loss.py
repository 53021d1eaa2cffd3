"""Loss: clipped policy gradient with truncated importance weights.

With rho = exp(logprob - old logprob) of the token, or of its step's tokens in the geometric mean
(`Ratio`), A the advantage of the token's step, and the constant
w = min(exp(old logprob - behaviour logprob), importance_cap), or 1 without a cap, a token t has

    l_t = -w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
          + kl_coef k3(reference logprob - logprob) - entropy_coef entropy

(arXiv 2506.05183, eq. 5, with the signs of the authors' code; w is the truncated importance
weight between engine and learner). The loss of a batch is sum_t l_t / d_t with d_t

    TOKEN_MEAN      trained tokens of the batch
    SEQUENCE_MEAN   tokens of t's step * trained steps of the batch
    CONSTANT        tokens of the longest answer that the tree's shape allows * trained steps

A batch is what one optimizer step sees: all forests of all workers. Its counts go into the loss
of every forest, and no step is cut in two, so that the losses and gradients of the forests add
up, over workers too (sum, not mean), to those of the batch however it is packed.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from treerpo_ray.algo.loss_config import LossConfig, Normalisation, Ratio


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossSums:
    """What the loss saw, so summed over edges that the parts of a batch add up with `+`.

    `loss` and `policy_loss` are normalised by the whole batch's counts already; all others are
    plain sums over tokens, but `mismatch_max`, whose sum is the larger one.
    """

    loss: Float64[Tensor, ""]
    policy_loss: Float64[Tensor, ""]
    """The clipped term of the loss alone."""
    num_tokens: Float64[Tensor, ""]
    kl: Float64[Tensor, ""]
    """k3 of learner to reference, nats; 0 without a reference."""
    entropy: Float64[Tensor, ""]
    ratio: Float64[Tensor, ""]
    """The policy ratios."""
    num_clipped: Float64[Tensor, ""]
    """Tokens whose policy gradient is cut off by the clip."""
    mismatch: Float64[Tensor, ""]
    """|old logprob - behaviour logprob|: learner against engine, nats."""
    mismatch_kl: Float64[Tensor, ""]
    """k3 of engine to learner, nats."""
    importance_weight: Float64[Tensor, ""]
    """The weights as used, after the cap; 1 each where they are turned off."""
    num_truncated: Float64[Tensor, ""]
    """Tokens whose importance weight was cut down to the cap."""
    mismatch_max: Float64[Tensor, ""]

    def vector(self) -> Float64[Tensor, " fields"]:
        """All fields in order; one all-gather of it and `from_vector` add up all workers."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def from_vector(cls, vector: Float64[Tensor, " fields"]) -> "LossSums":
        """The inverse of `vector`."""
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, vector.unbind(), strict=True)))

    @classmethod
    def zeros(cls, device: torch.device) -> "LossSums":
        """The sums of no edges, to start adding from."""
        return cls.from_vector(torch.zeros(len(fields(cls)), dtype=torch.float64, device=device))

    def __add__(self, other: "LossSums") -> "LossSums":
        total = self.vector() + other.vector()
        total[-1] = torch.maximum(self.mismatch_max, other.mismatch_max)
        return self.from_vector(total)

    def metrics(self) -> dict[str, float]:
        """Means over tokens of the summed-up batch, by metric name; it holds a token or more."""
        sums = {field.name: float(getattr(self, field.name)) for field in fields(self)}
        num_tokens = sums["num_tokens"]
        return {
            "loss/total": sums["loss"],
            "loss/policy": sums["policy_loss"],
            "loss/kl": sums["kl"] / num_tokens,
            "loss/entropy": sums["entropy"] / num_tokens,
            "loss/ratio": sums["ratio"] / num_tokens,
            "loss/clip_share": sums["num_clipped"] / num_tokens,
            "mismatch/mean": sums["mismatch"] / num_tokens,
            "mismatch/max": sums["mismatch_max"],
            "mismatch/kl": sums["mismatch_kl"] / num_tokens,
            "importance/mean": sums["importance_weight"] / num_tokens,
            "importance/truncated_share": sums["num_truncated"] / num_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """The edges of one forest; log-probs are those of the targets, in nats.

    Gradients flow through `logprobs` and `entropy` only.
    """

    logprobs: Float[Tensor, " edges"]
    """Under the policy being trained."""
    old_logprobs: Float[Tensor, " edges"]
    """Under the learner's policy when the iteration began."""
    behaviour_logprobs: Float[Tensor, " edges"]
    """As recorded by the engine that sampled the tokens."""
    reference_logprobs: Float[Tensor, " edges"] | None
    """Under the reference model; None if there is none."""
    entropy: Float[Tensor, " edges"]
    """Entropy (nats) of the distribution that predicted each target."""
    advantages: Float[Tensor, " edges"]
    """Advantage of each target's step."""
    step: Int[Tensor, " edges"]
    """Number of each target's step, from 0; all trained tokens of a step are here."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossOutput:
    """What one forest adds to the loss of the batch, to call backward on, and what it saw."""

    loss: Float[Tensor, ""]
    sums: LossSums


def policy_loss(
    inputs: LossInputs,
    *,
    num_batch_tokens: int,
    num_batch_steps: int,
    max_answer_tokens: int,
    config: LossConfig,
) -> LossOutput:
    """One forest's share of the loss of a batch; the formula stands on top of this module.

    Args:
        inputs: The forest's edges; none at all is fine.
        num_batch_tokens: Trained tokens of the batch, over all forests and workers.
        num_batch_steps: Trained steps of the batch, over all forests and workers.
        max_answer_tokens: Tokens of the longest answer that the tree's shape allows.
        config: Clip range, coefficients and normalisation.

    Raises:
        ValueError: If kl_coef is not 0 and there are no reference log-probs.
    """
    mismatch = (inputs.old_logprobs - inputs.behaviour_logprobs).detach()
    cap = math.inf if config.importance_cap is None else config.importance_cap
    weight = torch.ones_like(mismatch) if cap == math.inf else mismatch.exp().clamp(max=cap)
    log_ratio = inputs.logprobs - inputs.old_logprobs.detach()
    if config.ratio is Ratio.SEQUENCE:
        log_ratio = _step_mean(log_ratio, inputs.step)
    ratio = log_ratio.exp()
    unclipped = ratio * inputs.advantages
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * inputs.advantages
    kl = _reference_kl(inputs, config.kl_coef)
    match config.normalisation:
        case Normalisation.TOKEN_MEAN:
            divisor = torch.full_like(inputs.step, num_batch_tokens)
        case Normalisation.SEQUENCE_MEAN:
            divisor = torch.bincount(inputs.step)[inputs.step] * num_batch_steps
        case Normalisation.CONSTANT:
            divisor = torch.full_like(inputs.step, max_answer_tokens * num_batch_steps)
    policy = -(weight * torch.minimum(unclipped, clipped) / divisor).sum()
    penalty = config.kl_coef * kl - config.entropy_coef * inputs.entropy
    loss = policy + (penalty / divisor).sum()
    sums = LossSums(
        loss=_total(loss),
        policy_loss=_total(policy),
        num_tokens=_total(torch.ones_like(mismatch)),
        kl=_total(kl),
        entropy=_total(inputs.entropy),
        ratio=_total(ratio),
        num_clipped=_total(clipped < unclipped),
        mismatch=_total(mismatch.abs()),
        mismatch_kl=_total(k3(mismatch)),
        importance_weight=_total(weight),
        num_truncated=_total(mismatch.exp() > cap),
        mismatch_max=mismatch.abs().max().double() if len(mismatch) else _total(mismatch),
    )
    return LossOutput(loss=loss, sums=sums)


def k3(x: Float[Tensor, " edges"]) -> Float[Tensor, " edges"]:
    """exp(x) - x - 1, never negative: the unbiased estimate of KL(p || q) in nats from a draw
    of p, where x = log q - log p (J. Schulman, "Approximating KL divergence", 2020)."""
    return torch.expm1(x) - x


def _reference_kl(inputs: LossInputs, kl_coef: float) -> Float[Tensor, " edges"]:
    if inputs.reference_logprobs is not None:
        return k3(inputs.reference_logprobs.detach() - inputs.logprobs)
    if kl_coef:
        raise ValueError("loss.kl_coef needs a reference model: name one, or set kl_coef to 0")
    return torch.zeros_like(inputs.logprobs)


def _step_mean(x: Float[Tensor, " edges"], step: Int[Tensor, " edges"]) -> Float[Tensor, " edges"]:
    """Mean of `x` over the tokens of each token's step."""
    count = torch.bincount(step)
    total = torch.zeros(len(count), dtype=x.dtype, device=x.device).index_add(0, step, x)
    return (total / count)[step]


def _total(x: Tensor) -> Float64[Tensor, ""]:
    return x.detach().sum(dtype=torch.float64)
