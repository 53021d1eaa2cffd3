"""The README: its examples work as they stand, and it stays short enough to be read."""

import re
from pathlib import Path

import pytest

from tests.support.project import PROJECT
from treerpo_ray.config import load
from treerpo_ray.preflight.trial import try_checks, try_credit

README = (PROJECT / "README.md").read_text()
REWARD, CREDIT = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_readme_is_at_most_170_lines_and_12000_characters() -> None:
    assert README.count("\n") <= 170 and len(README) <= 12_000


def test_the_example_of_a_reward_passes_its_own_test_and_asks_for_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_reward.py").write_text(REWARD)
    assert try_checks(load(["verifier.check=my_reward.py"]).verifier)
    weighed = load(["verifier.checks={my_reward.py: 0.8, treerpo_ray.verifier.math_answer: 0.2}"])
    assert try_checks(weighed.verifier)


def test_the_example_of_a_reward_for_code_passes_its_own_test() -> None:
    assert try_checks(load([f"verifier.check={PROJECT}/conf/rewards/unit_tests.py"]).verifier)


def test_the_example_of_credit_is_a_form_and_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("form.py").write_text(CREDIT)
    try_credit(load(["learner.advantage=form.py:mine", "learner.prune=form.py:rule"]).learner)


def test_every_file_and_folder_that_the_readme_links_to_is_there() -> None:
    named = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(named) > 3
    for path in named:
        assert path.startswith("http") or (PROJECT / path).exists(), path
