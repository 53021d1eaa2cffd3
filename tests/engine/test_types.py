"""What engines are counted to have done, whichever come and go."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Phi3Config, Qwen2Config

from treerpo_ray.config import Config, load
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.engine.types import EngineSetup, EngineStats, EngineTotals


def stats(
    start: str,
    asked: int,
    cached: int,
    cpu_s: float,
    version: int = 1,
    busy_s: float = 0.0,
    total_s: float = 0.0,
    sampled: int = 0,
) -> EngineStats:
    return EngineStats(
        start=start,
        num_requests=0,
        num_prompt_tokens=asked,
        num_cached_tokens=cached,
        num_sampled_tokens=sampled,
        cpu_s=cpu_s,
        version=version,
        busy_s=busy_s,
        total_s=total_s,
    )


def test_the_idle_share_is_of_the_time_that_each_engine_was_there() -> None:
    totals = EngineTotals(stats=[stats("a", 0, 0, 0, busy_s=3, total_s=10)])
    assert "idle/engines_share" not in totals.since_last([])
    new = stats("b", 0, 0, 0, busy_s=1, total_s=2)
    row = totals.since_last([stats("a", 0, 0, 0, busy_s=6, total_s=16), new])
    assert row["idle/engines_share"] == 1 - (3 + 1) / (6 + 2)


def test_tokens_a_second_are_those_of_the_engines_over_the_time_between_two_rows() -> None:
    times = iter([100.0, 104.0, 114.0])
    totals = EngineTotals(stats=[stats("a", 0, 0, 0, sampled=1000)], clock=lambda: next(times))
    assert totals.since_last([stats("a", 0, 0, 0, sampled=1400)])["tokens/per_s"] == 100
    new = stats("b", 0, 0, 0, sampled=50)
    assert totals.since_last([stats("a", 0, 0, 0, sampled=1500), new])["tokens/per_s"] == 15


def test_each_engine_counts_from_the_last_row_or_from_its_own_start() -> None:
    totals = EngineTotals(stats=[stats("a", 100, 50, 10), stats("b", 100, 50, 10)])
    row = totals.since_last([stats("a", 200, 140, 15), stats("b", 100, 50, 11, version=0)])
    assert row["engine/prefix_hit_rate"] == 90 / 100
    assert row["time/cpu_s"] == pytest.approx(6, abs=1)
    assert (row["engine/oldest_version"], row["engine/newest_version"]) == (0, 1)
    # b was replaced by c; what it had done is neither taken off nor counted again.
    row = totals.since_last([stats("a", 210, 140, 16), stats("c", 30, 10, 2)])
    assert row["engine/prefix_hit_rate"] == 10 / 40
    assert row["time/cpu_s"] == pytest.approx(3, abs=1)
    # One that answers late, or not at all in a row, goes on where it was.
    assert "engine/prefix_hit_rate" not in totals.since_last([stats("c", 30, 10, 2)])
    row = totals.since_last([stats("a", 310, 215, 20), stats("c", 30, 10, 2)])
    assert row["engine/prefix_hit_rate"] == 75 / 100
    assert row["time/cpu_s"] == pytest.approx(4, abs=1)


def setup(answer_tokens: int, model: Path) -> EngineSetup:
    """Of a run whose prompts and answers have up to 100 tokens and those of the answer."""
    config: Config = load(
        [
            *("prompts.max_prompt_tokens=100", "tree.num_children=[2]"),
            *(f"tree.step_tokens=[{answer_tokens}]", f"model.path={model}"),
        ]
    )
    return EngineSetup.of(config)


@pytest.mark.parametrize(
    ("config", "served"),
    [
        (Qwen2Config(), [27, 28, 300]),
        # An engine takes its factors by its room, from 128 tokens and the one that is sampled on.
        (
            Phi3Config(
                original_max_position_embeddings=128,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 128,
                    **{f"{kind}_factor": [1.0] * 48 for kind in ("short", "long")},
                },
            ),
            [28, 300],
        ),
    ],
    ids=["any length", "longrope"],
)
def test_engines_serve_shorter_runs_unless_these_were_computed_otherwise(
    config, served, tmp_path
) -> None:
    config.save_pretrained(tmp_path)
    engines = setup(300, tmp_path)
    assert [n for n in (27, 28, 300, 301) if engines.can_serve(setup(n, tmp_path))] == served
    assert setup(27, tmp_path).can_serve(setup(20, tmp_path))
    adapted = replace(setup(300, tmp_path), lora=LoraConfig(rank=8))
    assert adapted.can_serve(adapted) and not adapted.can_serve(engines)
