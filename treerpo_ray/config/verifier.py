"""Verifier: what gives the rewards, and in which processes, as a section of its own."""

from dataclasses import dataclass, field

from treerpo_ray.config.sections import NOT_NEGATIVE, POSITIVE, SHARE
from treerpo_ray.user_code import with_checksum


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """The verifier: grades answers in killable processes."""

    check: str = "treerpo_ray.verifier.math_answer"
    """Module or file.py with `check_answer` and `SELF_TEST`; see `treerpo_ray/verifier/check.py`.
    A relative file is taken from the working folder of whoever starts the run."""
    checks: dict[str, float] = field(default_factory=dict)
    """Several checks by weight, in place of `check`, such as {my_reward.py: 0.8, my.style: 0.2}:
    the reward is their weighted mean. The first one tells which answers are the same; 0 leaves one
    out that a file before names."""
    num_workers: int = field(default=1, metadata=POSITIVE)
    """Processes of each scoring actor, for each check."""
    timeout_s: float = field(default=5.0, metadata=POSITIVE)
    """Time for one answer, or for one attempt of a check that is `async def`."""
    retries: int = field(default=2, metadata=NOT_NEGATIVE)
    """Times that a check that is `async def` is asked again where it fails, after 0.5 s, then 1."""
    concurrency: int = field(default=32, metadata=POSITIVE)
    """Answers that a process of a check that is `async def` has at hand at a time."""
    env: tuple[str, ...] = ()
    """Names of environment variables that the processes get, such as that of a judge's API key;
    without, they get none that may hold a secret. They must be set where answers are scored."""
    memory_mib: int = field(default=1024, metadata=POSITIVE)
    """Memory of one process."""
    max_error_share: float = field(default=0.1, metadata=SHARE)
    """Share of the last 1000 answers that may end without a verdict before the run stops."""
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 0.1})
    """Ray resources of the task that scores and streams trees, such as {CPU: 4, score_slot: 1}."""
    false_positive_rate: float = field(default=0.0, metadata=SHARE)
    """Share of wrong answers that training is told are right; to study noisy rewards. Partial
    credit stays as it is, here and below."""
    false_negative_rate: float = field(default=0.0, metadata=SHARE)
    """Share of right answers that training is told are wrong; to study noisy rewards."""
    sources: dict[str, str] = field(default_factory=dict)
    """Packed source of the files and modules named above; filled in when a run is started."""

    def __post_init__(self) -> None:
        for name, weight in self.checks.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(
                    f"verifier.checks: the weight {weight:g} of {name} must be at least 0"
                )
        if self.checks and not any(self.checks.values()):
            raise ValueError("verifier.checks: one of them must have a weight above 0")

    @property
    def weights(self) -> dict[str, float]:
        """Every check with its weight."""
        used = {name: weight for name, weight in self.checks.items() if weight}
        return used or {self.check: 1.0}  # none is named

    @property
    def main_check(self) -> str:
        """The check that tells which answers are the same and which references are any."""
        return next(iter(self.weights))

    @property
    def identity(self) -> str:
        """What gave the rewards, in words; files that differ have other checksums."""
        names = [with_checksum(name, self.sources) for name in self.weights]
        if self.weights == {self.check: 1.0}:
            return names[0]
        weights = self.weights.values()
        return " + ".join(f"{w:g} {name}" for name, w in zip(names, weights, strict=True))
