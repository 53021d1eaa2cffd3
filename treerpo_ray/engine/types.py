"""Types of the engine: what engines are started for, how they sample and are called, and what they
have done."""

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import ray

from treerpo_ray.actor import actor_method, actor_stream
from treerpo_ray.algo.search import SiblingGroup, TreeShape
from treerpo_ray.config import Config
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import EngineConfig, ModelConfig
from treerpo_ray.metrics.rows import Row
from treerpo_ray.prompts.prompt_set import resolve_model_path
from treerpo_ray.weights.manifest import Manifest
from treerpo_ray.weights.source import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What engines are started for; it holds as long as they run."""

    model: ModelConfig
    engine: EngineConfig
    lora: LoraConfig
    """Adapters that versions consist of, if its rank is above 0."""
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
            lora=config.lora,
            max_tokens=config.max_model_tokens,
            seed=config.run.seed,
            probe_tolerance=config.sync.probe_tolerance,
        )

    def can_serve(self, other: "EngineSetup") -> bool:
        """Whether engines that were started for this can serve a run that asks for `other`."""
        mine, theirs = (
            (each.model, each.engine, each.lora, each.probe_tolerance) for each in (self, other)
        )
        if mine != theirs or self.max_tokens < other.max_tokens:
            return False
        if self.max_tokens == other.max_tokens:
            return True
        start = _long_rope_start(self.model)
        return start is None or (self.max_tokens >= start) == (other.max_tokens >= start)


def _long_rope_start(model: ModelConfig) -> int | None:
    """Tokens from which on engines of a model compute with LongRoPE's factors for long texts, which
    they are started with; None if it has no such factors."""
    from transformers import AutoConfig  # for runs that share engines alone

    path = resolve_model_path(model.path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    rope = config.get_text_config().rope_parameters or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    starts = [
        each["original_max_position_embeddings"]
        for each in kinds
        if each.get("rope_type") == "longrope" and "original_max_position_embeddings" in each
    ]
    return min(starts, default=None)


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

    start: str
    """Which start of which engine it is; no other has the same."""
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the prefix cache held."""
    num_sampled_tokens: int
    cpu_s: float
    """CPU time of the engine's processes on the actor's machine."""
    busy_s: float
    """Time with a request under way, whether it is computed or waits for weights."""
    total_s: float
    """Time since it could sample."""
    version: int
    """Version of the weights that vLLM serves."""


class EngineApi(Protocol):
    """Actor of `Engine`."""

    @actor_method
    def node(self) -> str:
        """See `Engine`, as for all that follow."""

    @actor_method
    def start(self) -> tuple[int, int]: ...

    @actor_stream
    def grow(
        self,
        prompt_ids: list[int],
        shape: TreeShape,
        sampling: Sampling,
        seed: int,
        held: list[SiblingGroup],
    ) -> AsyncIterator[SiblingGroup]: ...

    @actor_method
    def load(self, manifest: Manifest, place: Place) -> None: ...

    @actor_method
    def sleep(self) -> None: ...

    @actor_method
    def probe(self, token_ids: list[int]) -> list[float]: ...

    @actor_method
    def stats(self) -> EngineStats: ...

    @actor_method
    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineActor:
    """An engine's actor, and how it or a tree on it is ended from outside."""

    api: EngineApi
    kill: Callable[[], None]
    """End its process at once; whoever waits for it gets a RayError."""
    cancel: Callable[[ray.ObjectRefGenerator], None] = ray.cancel
    """Give up a tree that it grows."""


class EngineTotals:
    """What each start of an engine had done at the last row; engines themselves only count up.

    Args:
        stats: Those of the engines that are there; what they have done already counts for no row.
        clock: Seconds since any time.
    """

    def __init__(
        self, *, stats: Sequence[EngineStats], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._looked_at = clock, clock()
        self._cpu_s = time.process_time()
        self._last = {engine.start: engine for engine in stats}

    def since_last(self, stats: Sequence[EngineStats]) -> Row:
        """What the engines did since the last row, with this process's CPU time, and serve now.

        `tokens/per_s` is what they sampled, for trees and evaluations, over the time since then.

        Engines that finished no request, or were not there, have no rate and no share. One that has
        come since counts from its start; of one that has gone, what it did
        after the last row is not known.
        """
        asked = cached = sampled = 0
        busy_s = total_s = 0.0
        now_s = time.process_time()
        cpu_s, self._cpu_s = now_s - self._cpu_s, now_s
        looked_at, self._looked_at = self._looked_at, self._clock()
        seconds = max(self._looked_at - looked_at, 1e-9)
        for engine in stats:
            last = self._last.get(engine.start)
            asked += engine.num_prompt_tokens - (last.num_prompt_tokens if last else 0)
            cached += engine.num_cached_tokens - (last.num_cached_tokens if last else 0)
            sampled += engine.num_sampled_tokens - (last.num_sampled_tokens if last else 0)
            cpu_s += engine.cpu_s - (last.cpu_s if last else 0.0)
            busy_s += engine.busy_s - (last.busy_s if last else 0.0)
            total_s += engine.total_s - (last.total_s if last else 0.0)
            self._last[engine.start] = engine
        versions = [engine.version for engine in stats]
        return {
            **({"engine/prefix_hit_rate": cached / asked} if asked else {}),
            **({"idle/engines_share": 1 - busy_s / total_s} if total_s else {}),
            "time/cpu_s": cpu_s,
            "tokens/per_s": sampled / seconds,
            "engine/oldest_version": min(versions, default=math.nan),
            "engine/newest_version": max(versions, default=math.nan),
        }
