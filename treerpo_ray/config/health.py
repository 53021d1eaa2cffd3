"""Health: what of a run is out of the ordinary enough to be told of, as a section of its own."""

from dataclasses import dataclass, field

from treerpo_ray.config.sections import POSITIVE, POSITIVE_SHARE, SHARE


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Limits of a healthy run; beyond one there is a warning that says what to change, no more.

    What is compared is the mean of the newest `window` learner steps that have the metric. null: no
    such warning.
    """

    window: int = field(default=3, metadata=POSITIVE)
    """Learner steps that are averaged."""
    max_mismatch: float | None = field(default=0.1, metadata=POSITIVE)
    """Of `mismatch/mean`, in nats a token: what engine and learner differ by on the same token."""
    max_mismatch_growth: float | None = field(default=4.0, metadata=POSITIVE)
    """Of `mismatch/mean` over its mean in the first `window` steps, or over a tenth of
    `max_mismatch` if that is more."""
    max_truncated_share: float | None = field(default=0.1, metadata=SHARE)
    """Of `importance/truncated_share`: tokens whose weight `loss.importance_cap` cuts down."""
    max_clip_share: float | None = field(default=0.3, metadata=SHARE)
    """Of `loss/clip_share`: tokens that the clip range keeps from being learned from."""
    max_ratio_drift: float | None = field(default=0.1, metadata=POSITIVE)
    """Of the distance of `loss/ratio` to 1: the mean policy ratio of all tokens."""
    max_kl: float | None = field(default=1.0, metadata=POSITIVE)
    """Of `loss/kl`, in nats a token, to the model that the run started from."""
    min_entropy: float | None = field(default=0.01, metadata=POSITIVE)
    """Of `loss/entropy`, in nats a token, while `reward/mean` is at most 0.9."""
    max_grad_norm: float | None = field(default=100.0, metadata=POSITIVE)
    """Of `learner/grad_norm` before it is clipped, in units of `learner.clip_grad_norm`."""
    min_kept_share: float | None = field(default=0.05, metadata=POSITIVE_SHARE)
    """Of `groups/kept_share`: step groups that are trained."""
    min_trained_share: float | None = field(default=0.02, metadata=POSITIVE_SHARE)
    """Of `tokens/trained_share`: sampled tokens that are trained."""
    max_duplicate_share: float | None = field(default=0.98, metadata=SHARE)
    """Of `groups/duplicate_share`: later siblings with the very tokens of an earlier one."""
    max_cut_off_share: float | None = field(default=0.5, metadata=SHARE)
    """Of `length/cut_off_share`: answers that end before they have a result."""
    max_calibration_error: float | None = field(default=0.4, metadata=SHARE)
    """Of `values/calibration_error`: what the mean of some siblings is off the next one."""
    max_error_share: float | None = field(default=0.02, metadata=SHARE)
    """Of `verdict/error_share`: answers that the verifier has no verdict on. At
    `verifier.max_error_share` the run stops."""
    max_staleness_share: float | None = field(default=0.95, metadata=POSITIVE_SHARE)
    """Of `staleness/mean` in units of `gate.max_staleness`, where that is above 1 and the learner
    never waits."""
    min_prefix_hit_rate: float | None = field(default=0.1, metadata=POSITIVE_SHARE)
    """Of `engine/prefix_hit_rate`: prompt tokens that the prefix cache holds."""
    max_idle_engines: float | None = field(default=0.7, metadata=SHARE)
    """Of `idle/engines_share`: time in which an engine has no request."""
