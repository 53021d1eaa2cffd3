"""A stop string that begins before a step ends the step; test_engine has those within one."""

import numpy as np
import pytest

from treerpo_ray.algo.tree import ROOT, Step, StopReason
from treerpo_ray.engine._stop_strings import end_across_steps
from treerpo_ray.quickstart.tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()


def decode(ids: list[int]) -> str:
    return TOKENIZER.batch_decode([ids])[0]


def step(text: str, stop: StopReason = StopReason.BOUNDARY, num_discarded: int = 0) -> Step:
    ids = np.array(TOKENIZER.encode(text), np.int32)
    return Step(
        parent=ROOT,
        token_ids=ids,
        logprobs=-np.arange(len(ids), dtype=np.float32),
        versions=np.arange(len(ids), dtype=np.int32),
        stop=stop,
        num_discarded=num_discarded,
    )


@pytest.mark.parametrize(
    ("before", "sampled", "stop", "kept"),
    [
        ("so </ans", "wer> and on", ["</answer>"], "wer>"),
        ("so <", "/answer>", ["</answer>"], "/answer>"),
        ("5\n", "\nQ: 3", ["\n\n", "Q:"], "\n"),
        ("a", "bcbd", ["cd", "abc", "bc"], "bc"),  # the one that is complete first
        ("caf\u00e9 \u00e9"[:-1], "\u00e9\u00e9!", [" \u00e9\u00e9"], "\u00e9\u00e9"),
        ("so </ans", "er>", ["</answer>"], None),
        ("", "</answer> and on", ["</answer>"], None),  # vLLM's business
        ("so </ans", "wer>", [], None),
        ("x" * 500 + "</ans", "wer>" + "y" * 500, ["</answer>"], "wer>"),
    ],
)
def test_a_stop_string_that_begins_in_the_steps_before_ends_the_step(
    before: str, sampled: str, stop: list[str], kept: str | None
) -> None:
    given = step(sampled, num_discarded=3)
    found = end_across_steps(given, TOKENIZER.encode(before), stop, decode)
    if kept is None:
        assert found is given
        return
    assert decode(found.token_ids.tolist()) == kept
    size = len(TOKENIZER.encode(kept))
    assert found.token_ids.tolist() == given.token_ids[:size].tolist()
    assert found.logprobs.tolist() == given.logprobs[:size].tolist()
    assert found.versions.tolist() == list(range(size))
    assert found.stop is StopReason.END_OF_TEXT
    assert found.num_discarded == 3 + len(given.token_ids) - size


def test_a_character_of_several_tokens_is_completed_by_its_last_one() -> None:
    first, last = TOKENIZER.encode("\u00e9")
    given = step("\u00e9!")
    rest = Step(
        parent=ROOT,
        token_ids=given.token_ids[1:],
        logprobs=given.logprobs[1:],
        versions=given.versions[1:],
        stop=StopReason.BOUNDARY,
    )
    found = end_across_steps(rest, [first], ["\u00e9"], decode)
    assert found.token_ids.tolist() == [last]


def test_an_error_stays_one() -> None:
    failed = step("wer>", StopReason.ERROR)
    assert end_across_steps(failed, TOKENIZER.encode("</ans"), ["</answer>"], decode) is failed
