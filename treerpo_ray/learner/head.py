"""Head: the projection to the vocabulary, seen through log-probabilities and entropies alone.

Logits are made in pieces, of which one is alive at a time, and made again in the backward pass:
what is kept are the inputs and two numbers a row. The forward pass takes some rows at a time over
the whole vocabulary, for their sums. The backward pass, which knows these, takes some columns at a
time over all rows: so each row of the weight's gradient is written once, by one product, where
pieces of rows would add a whole gradient each.

With x a row's logits as the weight gives them, T the temperature, z = scale x / T, or
cap tanh(scale x / cap) / T where the architecture has a cap, p = softmax(z) and H its entropy,

    d log p_t / d z_v = [v = t] - p_v
    d H / d z_v       = -p_v (log p_v + H)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Protocol, Self, cast

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

LOGIT_BUDGET = {"cpu": 2**25, "cuda": 2**27}
"""Logits (rows x columns) that are alive at a time, by type of device. On a GPU a piece of this
size is so large that its product takes longer than reading the weight does."""
ALIGNMENT = 128
"""Columns of a piece are a multiple of it where they are as many: tensor cores ask for it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """A plain projection with what some architectures do to its logits.

    `final_logit_softcapping` (Gemma), `logit_scale` (Cohere) and `logits_scaling` (Granite).
    """

    weight: Float[Tensor, "vocabulary hidden"]
    bias: Float[Tensor, " vocabulary"] | None
    scale: float
    cap: float | None
    logit_budget: int | None = None
    """Logits that are alive at a time; by default `LOGIT_BUDGET`."""
    kernels: "Kernels | None" = None
    """By default those of the device."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        logit_budget: int | None = None,
        kernels: "Kernels | None" = None,
    ) -> Self:
        """That of a causal model; its parameters are the model's own.

        Raises:
            ValueError: it is not a plain projection.
        """
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise ValueError(
                f"the head of {type(model).__name__} is a {type(head).__name__}, and log-probs are "
                "computed for plain projections (torch.nn.Linear): use another model"
            )
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        return cls(
            weight=head.weight,
            bias=head.bias,
            scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
            cap=getattr(config, "final_logit_softcapping", None) or None,
            logit_budget=logit_budget,
            kernels=kernels,
        )

    def score(
        self,
        hidden: Float[Tensor, "rows hidden"],
        row: Int64[Tensor, " edges"],
        target: Int64[Tensor, " edges"],
        temperature: float,
    ) -> tuple[Float32[Tensor, " edges"], Float32[Tensor, " edges"]]:
        """Log-probability of each edge's target and entropy of its row, in nats.

        Both are of softmax(logits / temperature) in float32, whatever the product is computed in:
        under autocast in its type, else in that of the weight.

        Args:
            hidden: The model's last hidden states.
            row: Of `hidden`, for each edge; a row may have any number of edges, in any order.
            target: Token of each edge.
            temperature: Of the distribution.
        """
        device = hidden.device.type
        is_cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else self.weight.dtype
        tempering = Tempering(
            slope=self.scale / temperature,
            bound=None if self.cap is None else self.cap / temperature,
        )
        budget = LOGIT_BUDGET[device] if self.logit_budget is None else self.logit_budget
        how = _How(
            tempering=tempering,
            dtype=dtype,
            budget=budget,
            kernels=self.kernels or kernels(device),
        )
        found = _Scores.apply(hidden, self.weight, self.bias, row, target, how)
        return cast(tuple[Tensor, Tensor], found)

    def pulls(
        self,
        hidden: Float[Tensor, "edges hidden"],
        target: Int64[Tensor, " edges"],
        temperature: float,
    ) -> Float32[Tensor, "edges hidden"]:
        """Gradient of each target's log-probability by the hidden state that predicts it; the
        head's own weights get none."""
        bias = None if self.bias is None else self.bias.detach()
        fixed = replace(self, weight=self.weight.detach(), bias=bias)
        with torch.enable_grad():
            states = hidden.detach().float().requires_grad_()
            row = torch.arange(len(target), device=target.device)
            logprobs, _ = fixed.score(states, row, target, temperature)
            [found] = torch.autograd.grad(logprobs.sum(), [states])
        return found


class Tempering(NamedTuple):
    """What makes the logits that are sampled from, z, of the products x."""

    slope: float
    """Factor of x."""
    bound: float | None
    """Of |z|, where the architecture has a cap."""


class _How(NamedTuple):
    """How `_Scores` computes."""

    tempering: Tempering
    dtype: torch.dtype
    """Of the product."""
    budget: int
    """Logits that are alive at a time."""
    kernels: "Kernels"


class _Context(Protocol):
    """What `_Scores` keeps for its backward pass."""

    how: _How
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Scores(torch.autograd.Function):
    """See `Head.score`."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row: Tensor,
        target: Tensor,
        how: _How,
    ) -> tuple[Tensor, Tensor]:
        """Pieces of rows, each over the whole vocabulary."""
        states, weights, biases = _cast(hidden, weight, bias, how.dtype)
        num_pieces = -(-len(hidden) * len(weight) // how.budget)
        of_target = torch.zeros(len(row), device=hidden.device)
        sums: list[tuple[Tensor, Tensor]] = []
        start = 0
        for piece in states.tensor_split(max(1, min(num_pieces, len(hidden)))):
            product = linear(piece, weights, biases)
            place, is_here = _within(row, start, len(piece))
            found = _temper(product[place, target], how.tempering)
            of_target = torch.where(is_here, found, of_target)
            sums.append(how.kernels.row_sums(product, how.tempering))
            start += len(piece)
        log_total, entropy = (torch.cat(parts) for parts in zip(*sums, strict=True))
        ctx.save_for_backward(hidden, weight, bias, row, target, log_total, entropy)
        ctx.how = how
        return of_target - log_total[row], entropy[row]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, by_logprob: Tensor, by_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Pieces of columns, each over all rows."""
        hidden, weight, bias, row, target, log_total, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        how = ctx.how
        states, weights, biases = _cast(hidden, weight, bias, how.dtype)
        of_rows = (
            log_total,
            entropy,
            torch.zeros_like(log_total).index_add_(0, row, by_logprob),
            torch.zeros_like(log_total).index_add_(0, row, by_entropy),
        )
        to_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        to_weight = torch.empty_like(weight) if needs_weight else None
        to_bias = torch.empty_like(bias) if needs_bias else None
        width = _width(len(hidden), how.budget)
        for start in range(0, len(weight), width):
            piece = slice(start, start + width)
            product = linear(states, weights[piece], None if biases is None else biases[piece])
            column, is_here = _within(target, start, product.shape[1])
            by_target = (row, column, torch.where(is_here, by_logprob, 0.0))
            of_product = how.kernels.gradient(product, how.tempering, of_rows, by_target)
            if to_weight is not None:
                to_weight[piece] = of_product.T @ states
            if to_bias is not None:
                to_bias[piece] = of_product.sum(0, dtype=torch.float32)
            if to_hidden is not None:
                to_hidden += of_product @ weights[piece]
        if to_hidden is not None:
            to_hidden = to_hidden.to(hidden.dtype)
        return to_hidden, to_weight, to_bias, None, None, None


def _cast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs in the type of the product; once a pass, not once a piece."""
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _within(index: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """`index` counted from `start`, 0 where it is not of the piece, and whether it is. Nothing is
    cut by it, which would have the host wait for a GPU."""
    place = index - start
    is_here = (place >= 0) & (place < length)
    return torch.where(is_here, place, 0), is_here


def _width(num_rows: int, budget: int) -> int:
    """Columns of a piece."""
    width = max(1, budget // max(1, num_rows))
    return width - width % ALIGNMENT if width > ALIGNMENT else width


# What is done to each piece: without matrices, so that a compiler fuses it whole ----------------


def _temper(product: Tensor, tempering: Tempering) -> Float32[Tensor, "..."]:
    """z of x, in x's own memory where that is float32."""
    z = product.float().mul_(tempering.slope)
    if tempering.bound is not None:
        z.div_(tempering.bound).tanh_().mul_(tempering.bound)
    return z


def row_sums(
    product: Float[Tensor, "rows vocabulary"], tempering: Tempering
) -> tuple[Float32[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """Logarithm of the sum of exp(z), and entropy, of each row; `product` is used up."""
    z = _temper(product, tempering)
    log_total = z.logsumexp(-1)
    log_p = z.sub_(log_total[:, None])
    return log_total, -log_p.exp().mul_(log_p).sum(-1)


def gradient(
    product: Float[Tensor, "rows columns"],
    tempering: Tempering,
    of_rows: tuple[Tensor, Tensor, Tensor, Tensor],
    by_target: tuple[Tensor, Tensor, Tensor],
) -> Float[Tensor, "rows columns"]:
    """Gradient of the products, in their type; `product` is used up.

    Args:
        product: Some columns of all rows.
        tempering: What makes their logits.
        of_rows: Of each row log_total and entropy, and the gradients of its edges' log-probs and
            entropies, summed up.
        by_target: Row, column and gradient of the log-prob of each edge.
    """
    log_total, entropy, by_logprob, by_entropy = (each[:, None] for each in of_rows)
    z = _temper(product, tempering)
    slope = None
    if tempering.bound is not None:
        slope = (z / tempering.bound).square_().neg_().add_(1)
    log_p = z.sub_(log_total)
    p = log_p.exp()
    found = log_p.add_(entropy).mul_(by_entropy).add_(by_logprob).mul_(p).neg_()
    del p  # before the cast, which makes one more
    row, column, value = by_target
    found.index_put_((row, column), value, accumulate=True)
    if slope is not None:
        found.mul_(slope)
    return found.mul_(tempering.slope).to(product.dtype)


class Kernels(NamedTuple):
    """The two functions above, as a type of device runs them."""

    row_sums: Callable[[Tensor, Tempering], tuple[Tensor, Tensor]]
    gradient: Callable[
        [
            Tensor,
            Tempering,
            tuple[Tensor, Tensor, Tensor, Tensor],
            tuple[Tensor, Tensor, Tensor],
        ],
        Tensor,
    ]


@cache
def kernels(device_type: str) -> Kernels:
    """Compiled on a GPU, where reading and writing logits is what they cost.

    Only there: on a CPU the compiler takes longer than a small run, and makes nothing faster that
    the products do not outweigh. So tests run what is not compiled, and have the compiler's front
    end trace both without a break; its Triton code needs a GPU to run.
    """
    made = Kernels(row_sums, gradient)
    if device_type != "cuda":
        return made
    return Kernels(
        row_sums=torch.compile(row_sums, dynamic=True),
        gradient=torch.compile(gradient, dynamic=True),
    )
