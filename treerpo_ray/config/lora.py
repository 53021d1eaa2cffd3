"""LoRA: small matrices that are trained beside weights that stay (arXiv 2106.09685)."""

from dataclasses import dataclass, field

MOST_RANK = 512
"""Largest rank that vLLM serves."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters that are trained in place of the model's own weights, as PEFT has them."""

    rank: int = field(default=0, metadata={"at_least": 0})
    """Rank of the adapters, whose weights alone are trained, sent and kept in checkpoints; 0: all
    weights are. Adapters learn at some ten times the rate."""
    alpha: float = field(default=32.0, metadata={"above": 0})
    """What adapters add to a layer's output is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that have adapters, such as q_proj; none named: all but the
    head."""
