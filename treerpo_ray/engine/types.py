"""Engine totals: what the engines did between two rows of the metrics."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from treerpo_ray.metrics.run_log import Row


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
