"""Settings of the loss; without torch, since every process of a run reads the configuration."""

from dataclasses import dataclass, field
from enum import StrEnum


class Normalisation(StrEnum):
    """What one token's loss is divided by."""

    TOKEN_MEAN = "token_mean"
    """Trained tokens of the batch: every token weighs the same (the authors' code, DAPO)."""
    SEQUENCE_MEAN = "sequence_mean"
    """Tokens of its step times trained steps of the batch: every step weighs the same
    (arXiv 2506.05183, eq. 5, as printed)."""
    CONSTANT = "constant"
    """Most tokens of an answer times trained steps of the batch: a sum over tokens, in which a
    long step weighs more (Dr.GRPO, arXiv 2503.20783)."""


class Ratio(StrEnum):
    """What the policy ratio is taken of."""

    TOKEN = "token"
    """Each token (PPO, GRPO)."""
    SEQUENCE = "sequence"
    """A step's own tokens, all with one ratio, the geometric mean of theirs, which is clipped as
    one (GSPO, arXiv 2507.18071; at depth 1 the step is the answer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Settings of the policy loss."""

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = field(default=0.0, metadata={"at_least": 0})
    """Weight of the k3 KL to the reference model; 0 needs no reference model."""
    entropy_coef: float = field(default=0.0, metadata={"at_least": 0})
    """Weight of the entropy bonus."""
    importance_cap: float | None = 2.0
    """Largest importance weight of learner against engine; None turns the weights off."""
    normalisation: Normalisation = Normalisation.TOKEN_MEAN
    """What one token's loss is divided by: token_mean, sequence_mean or constant."""
    ratio: Ratio = Ratio.TOKEN
    """What the policy ratio is taken of: each token, or the sequence of a step's tokens, whose
    ratio stays far closer to 1 and needs a clip range of some 1e-4."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"loss.clip_low must be in [0, 1] and loss.clip_high at least 0, not "
                f"{self.clip_low:g} and {self.clip_high:g}"
            )
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(
                f"loss.importance_cap is {self.importance_cap:g}: give a positive cap, or null "
                f"to turn importance weights off"
            )
