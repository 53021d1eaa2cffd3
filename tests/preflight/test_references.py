"""References: those that no text can be right by are told before anything starts."""

import json
from pathlib import Path

import pytest

from tests.support.project import PROJECT
from treerpo_ray.config import load
from treerpo_ray.config.data import PromptsConfig
from treerpo_ray.config.verifier import VerifierConfig
from treerpo_ray.driver.benchmarks import configure, load_benchmarks, look_at_benchmarks
from treerpo_ray.driver.plan import plan_lines
from treerpo_ray.preflight.inputs import preflight
from treerpo_ray.preflight.references import SAMPLE, look_at_references
from treerpo_ray.prompts.problems import Problem
from treerpo_ray.prompts.prompt_set import load_tokenizer

PROSE = "First we add both sides. Then what is left over is the number of ways that there are."
WORKED = r"We take 4 from 19, which leaves us with $\boxed{15}$. That is all there is to it."
MODEL = str(PROJECT / "treerpo_ray/quickstart/model")


def problems(*answers: str) -> list[Problem]:
    return [
        Problem(id=str(row), question=f"q{row}", answers=(answer,))
        for row, answer in enumerate(answers, start=1)
    ]


def test_references_that_are_no_answers_are_named_by_their_rows() -> None:
    found = look_at_references(
        {
            "prompts": (PromptsConfig(path="some.jsonl"), problems("7", PROSE, WORKED, "$$", "A")),
            "evaluate.data": (PromptsConfig(path="all.jsonl"), problems("7", WORKED)),
            "embedded": (PromptsConfig(path="quickstart:test"), problems(PROSE)),
        },
        VerifierConfig(),
    )
    assert list(found) == ["prompts", "evaluate.data"]
    assert found["evaluate.data"].no_answers == ()
    assert str(found["prompts"]) == (
        "some.jsonl: 2 of 5 references looked at are no answers, so that nothing is right: "
        "rows 2, 4"
    )


def test_a_data_set_without_any_answer_is_one_line_with_its_key() -> None:
    data = {"prompts": (PromptsConfig(path="rows.jsonl"), problems(*[PROSE] * 2 * SAMPLE))}
    with pytest.raises(ValueError, match=r"^prompts\.path=rows\.jsonl: 500 of 500") as caught:
        look_at_references(data, VerifierConfig())
    assert "rows 1, 3, 5" in str(caught.value) and "and 490 more" in str(caught.value)
    assert "prompts.answer_column" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("check", "answers", "no_answers"),
    [
        ("treerpo_ray.verifier.boxed_answer", ("7", PROSE), ("2",)),
        ("treerpo_ray.quickstart.countdown_answer", ("1 2=3", "3"), ("2",)),
        ("tests.support.answers.false_self_test", (PROSE, PROSE), ()),  # which cannot tell
    ],
)
def test_the_runs_own_verifier_is_asked(check, answers, no_answers) -> None:
    data = {"prompts": (PromptsConfig(path="rows.jsonl"), problems(*answers))}
    found = look_at_references(data, VerifierConfig(check=check))
    assert found["prompts"].no_answers == no_answers


def write(file: Path, *answers: str) -> str:
    rows = [{"question": f"{n}+1=?", "answer": answer} for n, answer in enumerate(answers)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_the_plan_and_the_benchmarks_tell_of_them(tmp_path) -> None:
    train = write(tmp_path / "train.jsonl", "1", PROSE, WORKED)
    held_out = write(tmp_path / "held_out.jsonl", WORKED, "3")
    config = load(
        [
            str(PROJECT / "conf/quickstart.yaml"),
            *(f"prompts.path={train}", f"evaluate.data.path={held_out}", f"run.root={tmp_path}"),
        ]
    )
    [line] = [line for line in plan_lines(config, preflight(config)) if "no answers" in line]
    assert line.startswith(f"no answer   {train}: 1 of 3 ") and line.endswith("rows 2")
    benchmark = [f"evaluate.benchmarks.gsm8k.path={train}", "evaluate.benchmarks.gsm8k.subset=null"]
    config = configure(MODEL, ["gsm8k"], benchmark)
    prompts = load_benchmarks(config, load_tokenizer(MODEL, False))
    assert [each.no_answers for each in look_at_benchmarks(config, prompts)] == [("2",)]
