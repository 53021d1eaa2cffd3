"""Sampling: how engines are asked for tokens, and what they count; no engine is needed for it."""

from dataclasses import dataclass


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
