"""The user's own code is tried before a start; a mistake is one line and the user's traceback."""

import pickle
import re
from pathlib import Path

import pytest

from tests.support.user_files import CHECK, CREDIT
from treerpo_ray.config import load
from treerpo_ray.config.files import to_yaml
from treerpo_ray.errors import UserCodeError
from treerpo_ray.preflight.trial import TRUST, code_lines, try_checks, try_credit

BODY = "def check_answer(text, references):\n    return text in references\n"
TEST = 'SELF_TEST = [("a", ["a"], True)]\n'


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(*settings: str) -> tuple[str, str]:
    """What is said of a mistake: the line, and the traceback."""
    with pytest.raises(ValueError) as caught:
        config = load(list(settings))
        try_checks(config.verifier)
        try_credit(config.learner)
    line, _, trace = str(caught.value).partition("\n")
    assert "treerpo_ray/" not in trace
    return line, trace


def test_a_check_that_is_right_passes_and_says_whether_it_asks_for_rows(own_folder: Path) -> None:
    (own_folder / "my dir").mkdir()
    (own_folder / "my dir" / "my reward.py").write_text(CHECK)
    (own_folder / "json.py").write_text(BODY + TEST)  # clashes with a module of Python
    assert try_checks(load(["verifier.check=my dir/my reward.py"]).verifier) is True
    assert try_checks(load([f"verifier.check={own_folder}/json.py"]).verifier) is False
    both = "verifier.checks={json.py: 1, treerpo_ray.verifier.math_answer: 3}"
    assert try_checks(load([both]).verifier) is False
    assert try_checks(load([]).verifier) is False


def test_code_that_a_run_brings_along_is_shown_and_not_run_unasked(own_folder: Path) -> None:
    """But where the file here holds the same it is the user's own."""

    def lines(**trust: bool) -> list[str]:
        kept = load([str(own_folder / "config.yaml")]).verifier
        return code_lines(kept, "runs/theirs", trusts_run=trust.get("trusts_run", False))

    file, escape = own_folder / "mine.py", "# \x1b[2J\n"
    file.write_text(BODY + TEST + escape)
    (own_folder / "config.yaml").write_text(to_yaml(load(["verifier.check=mine.py"])))
    assert len(lines()) == 1
    assert re.fullmatch(rf"graded by mine\.py \([0-9a-f]{{8}}\), which is {file}", lines()[0])
    file.write_text(BODY + TEST)
    for there in ("unlike the file here", "not here"):
        with pytest.raises(UserCodeError, match=r"^runs/theirs is graded by code that it b") as no:
            lines()
        line, _, code = str(no.value).partition("\n")
        assert f"), {there}. If you trust" in line and TRUST in line
        assert code == (BODY + TEST + r"# \x1b[2J")
        [told] = lines(trusts_run=True)
        assert told.endswith("whose code runs/theirs brings along")
        file.unlink(missing_ok=True)
    assert code_lines(load([]).verifier, "any", trusts_run=False) == []
    [told] = code_lines(load(["verifier.check=json.tool"]).verifier, "any", trusts_run=False)
    assert told == "graded by the module json.tool, as it is installed here"


@pytest.mark.parametrize(
    ("text", "line", "trace"),
    [
        (BODY, "has no SELF_TEST, a list of", ""),
        (BODY + "SELF_TEST = []\n", "has a SELF_TEST that is no list of", ""),
        (BODY + 'SELF_TEST = [("a", ["a"])]\n', "which is neither (text, references, exp", ""),
        (BODY + 'SELF_TEST = [("a", "a", True)]\n', "references must be a list of texts", ""),
        (BODY + 'SELF_TEST = [("a", ["a"], 2)]\n', "returned 2 (int); it must be", ""),
        (
            BODY + 'SELF_TEST = [("b", ["a"], True)]\n',
            "'b' against ['a'] is wrong, should be",
            "",
        ),
        (TEST, "has no function check_answer", ""),
        ("def check_answer(answer): ...\n" + TEST, "answer is none of what it may ask for: t", ""),
        ("def check_answer(*all): ...\n" + TEST, "*all is none of what it may ask for: text", ""),
        ("def check_answer(text)\n", "SyntaxError: expected ':'", '  File "own.py", line 1\n'),
        ("import own_sibling\n", "(a file stands alone: what it imports", "No module named 'own_s"),
        ("import own\n", "No module named 'own' (a file stands alone", '"own.py", line 1, in <m'),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError", '"own.py", line 2, in f\n'),
        ("raise SystemExit(3)\n", "cannot be imported: SystemExit: 3", '"own.py", line 1, in <m'),
        (
            "def part(text):\n    return {}[text]\n"
            "def check_answer(text):\n    return part(text)\n" + TEST,
            "self-test of own.py: 'a' against ['a'] is errored, should be correct",
            '  File "own.py", line 2, in part\n    return {}[text]\n',
        ),
        ("def check_answer(text):\n    return 1.5\n" + TEST, "is errored", "returned 1.5 (float)"),
        ("def check_answer(text):\n    return text\n" + TEST, "is errored", "returned 'a' (str)"),
        ("import os\ndef check_answer(text):\n    os._exit(5)\n" + TEST, "is errored", "status 5"),
        (
            "import socket\ndef check_answer(text):\n    socket.socket()\n" + TEST,
            "runs without network",
            '  File "own.py", line 3, in check_answer\n',
        ),
        (
            "async def check_answer(text):\n    raise KeyError(text)\n" + TEST,
            "is errored",
            '  File "own.py", line 2, in check_answer\n',
        ),
    ],
)
def test_a_mistake_in_a_check_is_told_with_its_traceback(
    text: str, line: str, trace: str, own_folder: Path
) -> None:
    (own_folder / "own.py").write_text(text)
    found = told("verifier.check=own.py", "verifier.retries=0")
    assert line in found[0] and trace in found[1], found
    assert "own.py" in found[0] and ("Traceback" in found[1] or '"own.py"' in found[1]) == (
        '"own.py"' in trace or "named 'own_s" in trace
    )


def test_what_is_no_file_and_no_module_is_told_with_what_to_write(own_folder: Path) -> None:
    (own_folder / "own.py").write_text(BODY + TEST)
    (own_folder / "folder.py").mkdir()
    (own_folder / "text.txt").write_text("")
    (own_folder / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert told("verifier.check=gone.py")[0] == (
        f"verifier.check=gone.py: no such file ({own_folder}/gone.py)"
    )
    for name, words in (
        ("own", "no such module; for the file here write own.py"),
        ("email", "email has no function check_answer(text, references)"),
        ("folder.py", "is a folder"),
        ("./text.txt", "must end in .py"),
        ("binary.py", "cannot be read"),
    ):
        assert words in told(f"verifier.check={name}")[0]
    assert "verifier.checks=gone.py: no such file" in told("verifier.checks={gone.py: 1}")[0]
    assert "must be at least 0" in told("verifier.checks={own.py: -1}")[0]
    assert (
        "verifier.env names NO_SUCH_KEY"
        in told("verifier.check=own.py", "verifier.env=[NO_SUCH_KEY]")[0]
    )


def test_a_form_and_a_rule_are_tried_on_a_small_tree(own_folder: Path) -> None:
    (own_folder / "own.py").write_text(
        CREDIT
        + "def narrow(values):\n    return values[0]\n"
        + "def mixed(values):\n    return values - values.mean(-1)\n"
        + "def log(values):\n    return np.where(values < 1, np.nan, values)\n"
        + "def typo(tree, values):\n    return values.step\n"
        + "def five(a, b, c, d, e):\n    return a\n"
        + "def one(groups):\n    return 1.0\n"
        + "def right(values):\n    return values * 0\n"
        + "def right_error(tree, values):\n    return values\n"
    )
    for name in ("scaled", "over_leaves", "over_baseline"):
        try_credit(
            load([f"learner.advantage=own.py:{name}", "learner.prune=own.py:spread"]).learner
        )
    for setting, words in (
        ("advantage=own.py:narrow", "returned (2,), must be (1, 2)"),
        ("advantage=own.py:mixed", "operands could not be broadcast together"),
        ("advantage=own.py:log", "no finite number for every step"),
        ("advantage=own.py:typo", "AttributeError: 'Values' object has no attribute 'step'"),
        ("advantage=own.py:five", "has 5 parameters; a form is called with (values), (tree,"),
        ("advantage=own.py:right", "right_error has other parameters"),
        ("advantage=own.py:gone", "own.py has no function gone; it has scaled, over_baseline"),
        ("advantage=own.py", "is none of BERNOULLI, BERNOULLI_STD"),
        ("advantage=own:scaled", "no such module; for the file here write own.py"),
        ("prune=own.py:one", "must return one number for each of 1 groups, not 1.0"),
        ("prune=own.py:over_leaves", "has 2 parameters; a rule has (groups)"),
        ("prune=gone.py:spread", "no such file"),
    ):
        line, trace = told(f"learner.{setting}")
        assert words in line and setting.split("=")[0] in line, (setting, line)
        assert ('"own.py", line' in trace) == ("typo" in setting or "mixed" in setting)


def test_errors_of_the_users_code_cross_processes() -> None:

    error = pickle.loads(pickle.dumps(UserCodeError("one line", "Traceback")))
    assert (error.message, error.trace, str(error)) == (
        "one line",
        "Traceback",
        "one line\nTraceback",
    )
