"""Evaluation report: means over benchmarks, and what may be compared with what."""

import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console

from tests.support.answers.evaluations import C, W, graded
from treerpo_ray.config import load
from treerpo_ray.config.data import DataConfig
from treerpo_ray.evaluate.evaluation import Evaluation, Graded, save_evaluation, save_samples
from treerpo_ray.evaluate.grading import summarise
from treerpo_ray.evaluate.report import (
    PAPER,
    Comparison,
    averaged,
    comparison,
    plain,
    read_samples,
    table,
    with_mean,
)
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Grade, Verdict

RIGHT, WRONG, HALF = (C, C), (W, W), (C, W)
UNITS = ("A minus B, points", "A minus B, tokens")


def evaluated(
    folder: str,
    name: str,
    *answers: tuple,
    length: int = 2,
    check: str = "treerpo_ray.verifier.math_answer",
    asked: dict[str, Any] | None = None,
    stop: tuple[str, ...] = (),
    **settings,
) -> Evaluation:
    """Writes an evaluation of problems with these verdicts; `settings` are of its section, `asked`
    of its data."""
    given = {"num_samples": len(answers[0]), "temperature": 0.6, "max_tokens": 99} | settings
    overrides = [f"evaluate.{key}={value}" for key, value in given.items()]
    config = load([f"verifier.check={check}", f"model.stop={list(stop)}", *overrides])
    found = [
        Graded(
            record=replace(graded(*verdicts, length=length), prompt_id=str(number), ticket=number),
            group=[int(verdict is C) for verdict in verdicts],
        )
        for number, verdicts in enumerate(answers)
    ]
    data = DataConfig(path=name, **(asked or {}))
    result = summarise(
        config, found, data=data, model="quickstart/model", step=0, version=0, seconds=0.0
    )
    save_evaluation(result, RunFolder(folder), name)
    save_samples(found, RunFolder(folder), name)
    return result


def drawn(shown: rich.console.Group, width: int = 300) -> str:
    text = io.StringIO()
    rich.console.Console(file=text, width=width).print(shown)
    return text.getvalue()


def test_the_mean_is_over_the_papers_benchmarks_if_they_are_there_and_says_so(
    tmp_path: Path,
) -> None:
    answers = {"gsm8k": [RIGHT], "aime24": [WRONG, WRONG, HALF, HALF], "minerva": [HALF, RIGHT]}
    answers |= {"math500": [RIGHT, RIGHT, HALF], "olympiadbench": [WRONG, RIGHT]}
    found = {name: evaluated(str(tmp_path), name, *each) for name, each in answers.items()}
    scores = with_mean({name: each.scores for name, each in found.items()})
    assert list(scores) == [*answers, "mean of math500, olympiadbench, minerva, aime24"]
    for name, evaluation in found.items():
        assert scores[name] == evaluation.scores
    mean = scores[f"mean of {', '.join(PAPER)}"]
    assert mean.keys() == found["gsm8k"].scores.keys()
    shares = [np.mean([[v is C for v in pair] for pair in answers[name]], axis=1) for name in PAPER]
    assert mean["pass@1"].value == pytest.approx(np.mean([each.mean() for each in shares]))
    assert mean["pass@1"].num_problems == 3 + 2 + 2 + 4
    arms = [found[name].scores["pass@1"] for name in PAPER]
    high = sum((arm.high - arm.value) ** 2 for arm in arms) ** 0.5 / 4
    assert mean["pass@1"].high == pytest.approx(mean["pass@1"].value + high)
    shown = drawn(
        table(
            scores,
            model="mine, its checkpoint of step 24",
            verifier="my.judge",
            sampling="2 answers a problem",
        ),
        width=80,
    )
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.splitlines()[:2] == [
        "mine, its checkpoint of step 24",
        "2 answers a problem, graded by my.judge",
    ]
    for name in answers:
        assert f"{name} ({len(answers[name])})" in shown
    assert "mean of" in shown and "(11)" in shown
    json.dumps(plain(scores), allow_nan=False)


def test_without_one_of_the_papers_the_mean_is_over_all_and_there_is_none_of_one() -> None:
    assert averaged(["gsm8k", "math500"]) == ("gsm8k", "math500")
    assert averaged(["gsm8k"]) == averaged([]) == ()


def less(found: Comparison, benchmark: str, score: str) -> float:
    return found.pairs[benchmark][score].difference.value


def test_two_evaluations_by_hand_with_their_means_and_comparison(tmp_path: Path) -> None:
    ours, theirs = f"{tmp_path}/ours", f"{tmp_path}/theirs"
    evaluated(ours, "one", RIGHT, HALF, RIGHT, length=5)
    evaluated(theirs, "one", WRONG, RIGHT, length=2)
    evaluated(ours, "two", HALF, length=3)
    evaluated(theirs, "two", WRONG, length=9)
    found = comparison(ours, f"file://{theirs}")
    names = ["one", "two", "mean of one, two"]
    assert list(found.pairs) == names
    passed = [found.pairs[name]["pass@1"] for name in names]
    assert [pair.ours.value for pair in passed] == [0.75, 0.5, 0.625]  # two problems of three
    assert [pair.theirs.value for pair in passed] == [0.5, 0, 0.25]
    assert [pair.difference.value for pair in passed] == [0.25, 0.5, 0.375]
    assert [less(found, name, "median_length") for name in names] == [3, -6, -1.5]
    assert less(found, "one", "pass@2") == 0.5
    assert less(found, "one", "maj@2") == 0.25  # a tie is half a majority
    fields = json.loads(json.dumps(found.fields, allow_nan=False))
    assert (fields["A"], fields["B"], fields["num_samples"]) == ("ours", "theirs", 2)
    assert fields["scores"]["two"]["pass@1"]["A-B"]["value"] == 0.5
    shown = drawn(found.tables)
    assert shown.startswith("A: ours\nB: theirs\n")
    assert "one: the 2 of 3 problems that both have, 2 answers a problem, temperature 0.6" in shown
    lines = shown.splitlines()
    shares, lengths = ([line for line in lines if line.endswith(end)] for end in UNITS)
    assert len(shares) == len(lengths) == 3
    cells = next(line for line in lines if line.startswith("pass@1"))
    assert re.findall(r"\S+ (?=\[)", cells) == ["75.0 ", "50.0 ", "+25.0 "]
    cells = next(line for line in lines if line.startswith("median_length"))
    assert re.findall(r"\S+ (?=\[)", cells) == ["5.0 ", "2.0 ", "+3.0 "]


def test_an_evaluation_less_itself_is_nothing_but_shares_may_be_so_by_chance(
    tmp_path: Path,
) -> None:
    evaluated(f"{tmp_path}", "one", RIGHT, HALF, RIGHT, length=5)
    itself = comparison(str(tmp_path), f"{tmp_path}/eval/one.json").pairs["one"]
    assert all(pair.difference.value == 0 for pair in itself.values())
    lengths = itself["length"].difference
    assert lengths.low == lengths.high == 0
    assert itself["pass@2"].difference.low < 0 < itself["pass@2"].difference.high


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": 1.0}, "evaluate.temperature is 0.6 in .* and 1.0 in "),
        (
            {"asked": {"prompt_template": "{question}!"}},
            "prompt_template is '' in .* and '{question}!' in ",
        ),
        (
            {"asked": {"chat_template_args": {"a": 1}}},
            "chat_template_args is {} in .* and {'a': 1} in ",
        ),
        ({"stop": ("x",)}, r"model.stop is \[\] in .* and \['x'\] in "),
        ({"asked": {"system_prompt": "Think."}}, "system_prompt is '' in .* and 'Think.' in "),
        ({"top_p": 0.95}, "evaluate.top_p is 1.0 in .* and 0.95 in "),
        ({"max_tokens": 100}, "evaluate.max_tokens is 99 in .* and 100 in "),
        (
            {"check": "treerpo_ray.verifier.boxed_answer"},
            r"verifier.check is 'treerpo_ray.verifier.math_answer' in .* "
            "and 'treerpo_ray.verifier.boxed_answer' in ",
        ),
    ],
)
def test_what_was_sampled_or_graded_in_another_way_is_not_compared(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    evaluated(f"{tmp_path}/ours", "one", RIGHT, HALF)
    evaluated(f"{tmp_path}/theirs", "one", RIGHT, HALF, **settings)
    with pytest.raises(ValueError, match=told) as caught:
        comparison(f"{tmp_path}/ours", f"{tmp_path}/theirs")
    assert "\n" not in str(caught.value)


def test_other_numbers_of_samples_are_not_compared_even_if_they_are_not_recorded(
    tmp_path: Path,
) -> None:
    evaluated(f"{tmp_path}/ours", "one", (C, W, W, W))
    evaluated(f"{tmp_path}/theirs", "one", HALF)
    with pytest.raises(ValueError, match=r"evaluate.num_samples is 4 in .* and 2 in "):
        comparison(f"{tmp_path}/ours", f"{tmp_path}/theirs")
    (tmp_path / "ours/eval/one.json").unlink()
    with pytest.raises(ValueError, match=r"have \[2, 4\] samples of a problem"):
        comparison(f"{tmp_path}/ours", f"{tmp_path}/theirs")


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("max_tokens", "evaluate.max_tokens"),
        ("verifier", "verifier.check"),
        ("system_prompt", "system_prompt"),
    ],
)
def test_what_an_older_evaluation_did_not_record_is_told(
    field: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated(f"{tmp_path}/ours", "one", RIGHT, HALF)
    evaluated(f"{tmp_path}/theirs", "one", RIGHT, HALF)
    path = tmp_path / "theirs/eval/one.json"
    fields = json.loads(path.read_text())
    del fields[field]
    path.write_text(json.dumps(fields))
    assert getattr(Evaluation.from_fields(fields), field) is None
    with caplog.at_level(logging.WARNING):
        comparison(f"{tmp_path}/ours", f"{tmp_path}/theirs")
    [record] = caplog.records
    assert record.getMessage().startswith(f"{key} is not recorded of both ")


def test_an_older_evaluation_had_neither_template_nor_stop_strings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, stop in (("ours", ()), ("theirs", ()), ("others", ("x",))):
        evaluated(f"{tmp_path}/{name}", "one", RIGHT, HALF, stop=stop)
    path = tmp_path / "ours/eval/one.json"
    fields = json.loads(path.read_text())
    for field in ("prompt_template", "chat_template_args", "stop"):
        del fields[field]
    path.write_text(json.dumps(fields))
    with caplog.at_level(logging.WARNING):
        comparison(f"{tmp_path}/ours", f"{tmp_path}/theirs")
    assert not caplog.records
    with pytest.raises(ValueError, match=r"model\.stop is \[\] in "):
        comparison(f"{tmp_path}/ours", f"{tmp_path}/others")


def test_a_place_may_be_in_the_home_folder_or_on_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    evaluated(f"{tmp_path}/mine", "one", RIGHT)
    evaluated(f"memory:/{tmp_path}/other", "one", WRONG)
    assert less(comparison("~/mine", f"memory:/{tmp_path}/other"), "one", "pass@1") == 1
    with pytest.raises(ValueError, match=r"^~/none: there is no such run or evaluation$"):
        comparison("~/none", "~/mine")


def test_runs_are_compared_by_their_names_and_the_steps_are_said_in_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, steps in (("quickstart-dapo", (0, 9)), ("quickstart", (0, 36))):
        for step in steps:
            evaluated(f"{tmp_path}/treerpo_runs/{name}", f"step={step:06d}", RIGHT, HALF)
    found = comparison("quickstart-dapo", "quickstart")
    lines = drawn(found.tables, width=80).splitlines()
    assert lines[:2] == ["A: quickstart-dapo (step 9)", "B: quickstart (step 36)"]
    assert any(
        re.search(r"^pass@1 +75\.0 \[.*\] +75\.0 \[.*\] +\+0\.0 \[.*\]", line) for line in lines
    )
    earlier = f"{tmp_path}/treerpo_runs/quickstart/eval/step=000000.json"
    names = comparison("quickstart", earlier).names
    assert names == ("quickstart (step 36)", f"{earlier} (step 0)")
    with pytest.raises(ValueError, match="treerpo_runs/other: there is no such run"):
        comparison("other", "quickstart")


def test_partial_credit_is_kept_with_the_samples_and_in_their_mean(tmp_path: Path) -> None:
    """Rewards 1 and 1/2, then 0 and none: the mean of 3/4 and 0, of which 1/2 and 0 are whole."""
    half, lost = Grade(Verdict.PARTIAL, 0.5), Grade.without_reward(Verdict.ERRORED)
    right, wrong = Grade(C, 1.0), Grade(W, 0.0)
    found = [
        Graded(record=replace(graded(C, C).graded(grades), prompt_id=str(n)), group=[0, 1])
        for n, grades in enumerate([[right, half], [wrong, lost]])
    ]
    result = summarise(
        load(["evaluate.num_samples=2", "verifier.check=my.judge"]),
        found,
        data=DataConfig(path="own"),
        model="m",
        step=3,
        version=0,
        seconds=0.0,
    )
    assert (result.reward, result.mean_reward, result.pass_at_1) == (0.375, 0.375, 0.25)
    assert (result.row()["eval/reward"], result.verifier) == (0.375, "my.judge")
    folder = RunFolder(str(tmp_path))
    save_evaluation(result, folder, "own")
    save_samples(found, folder, "own")
    first, second = read_samples(f"{tmp_path}/eval/own.parquet").values()
    assert first.reward is not None and first.reward.tolist() == [1.0, 0.5]
    assert first.is_correct.tolist() == [1.0, 0.0] and second.reward is None
    same = comparison(f"{tmp_path}/eval/own.json", f"{tmp_path}/eval/own.parquet")
    assert less(same, "own", "reward") == 0 and "reward" in drawn(same.tables)
    shown = table(
        {"own": result.scores}, model="own", verifier="my.judge", sampling=result.sampling
    )
    assert "37.5" in drawn(shown)
