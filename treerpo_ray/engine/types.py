"""Types of the engine: what engines are started for, how they sample, and what they have done."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from treerpo_ray.config import Config
from treerpo_ray.config.sections import EngineConfig, ModelConfig
from treerpo_ray.metrics.run_log import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What engines are started for; it holds as long as they run."""

    model: ModelConfig
    engine: EngineConfig
    max_tokens: int
    """Of the longest prompt with its answer."""
    seed: int
    """Of vLLM itself; each request has its own."""
    probe_tolerance: float
    """Nats a token that an engine may be off the learner."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """Of a run."""
        return cls(
            model=config.model,
            engine=config.engine,
            max_tokens=config.max_model_tokens,
            seed=config.run.seed,
            probe_tolerance=config.sync.probe_tolerance,
        )

    def can_serve(self, other: "EngineSetup") -> bool:
        """Whether engines that were started for this can serve a run that asks for `other`."""
        mine, theirs = ((each.model, each.engine, each.probe_tolerance) for each in (self, other))
        return mine == theirs and self.max_tokens >= other.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    top_p: float = 1.0
    """Tokens come from the smallest set that has this probability; recorded log-probabilities
    are those within it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine has done since it started."""

    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the prefix cache held."""
    num_sampled_tokens: int
    cpu_s: float
    """CPU time of the engine's processes on the actor's machine."""
    version: int
    """Version of the weights that vLLM serves."""


class EngineTotals:
    """What had been done at the last row; the engines themselves only count up."""

    def __init__(self) -> None:
        self.asked = self.cached = 0
        self.cpu_s = 0.0

    def since_last(self, stats: Sequence[EngineStats]) -> Row:
        """What the engines did since the last call, with this process's CPU time, and serve now.

        The totals start anew with an engine that was replaced; that step's shares are zero.
        """
        asked = sum(engine.num_prompt_tokens for engine in stats)
        cached = sum(engine.num_cached_tokens for engine in stats)
        cpu_s = time.process_time() + sum(engine.cpu_s for engine in stats)
        since = asked - self.asked, cached - self.cached, cpu_s - self.cpu_s
        self.asked, self.cached, self.cpu_s = asked, cached, cpu_s
        is_whole = since[0] >= 0
        versions = [engine.version for engine in stats]
        return {
            "engine/prefix_hit_rate": since[1] / max(since[0], 1) if is_whole else 0.0,
            "time/cpu_s": since[2] if is_whole else 0.0,
            "engine/oldest_version": min(versions, default=math.nan),
            "engine/newest_version": max(versions, default=math.nan),
        }
