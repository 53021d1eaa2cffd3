import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console

from treerpo_ray.metrics.console import Console

REPOSITORY = Path(__file__).parents[2]
ROW = {
    "step": 2,
    "time": 1000.0,
    "reward/mean": 0.4125,
    "groups/kept": 12,
    "groups/kept_share": 0.63,
    "loss/total": -0.0123,
    "staleness/mean": 0.5,
    "tokens/per_s": 12341.2,
}


def console(is_terminal=False):
    text = io.StringIO()
    return Console(10, rich.console.Console(file=text, force_terminal=is_terminal, width=80)), text


def test_a_step_is_one_line_under_its_titles_with_the_time_left():
    printer, text = console()
    printer.print_step(ROW)
    printer.print_step(ROW | {"step": 4, "time": 1060.0})
    titles, first, second = text.getvalue().splitlines()
    assert " ".join(titles.split()) == "step reward kept loss kl mismatch stale tokens/s left"
    assert " ".join(first.split()) == "2/10 0.412 63% -0.0123 - - 0.50 12,341 -"
    assert " ".join(second.split()) == "4/10 0.412 63% -0.0123 - - 0.50 12,341 3m00s"
    assert len(titles) == len(first) == len(second) <= 80


def test_a_step_without_an_update_says_so():
    printer, text = console()
    printer.print_step(ROW | {"groups/kept": 0})
    assert text.getvalue().splitlines()[-1] == (
        "step 2: no step group was kept, so there was no update"
    )


def test_an_evaluation_is_a_sentence():
    printer, text = console()
    printer.print_step(
        {"step": 0, "eval/pass_at_1": 0.25, "eval/ci95_low": 0.2, "eval/ci95_high": 0.3}
        | {"eval/length": 40.25, "eval/num_problems": 400, "eval/num_samples": 4}
        | {"eval/temperature": 0.6, "eval/top_p": 1.0}
    )
    assert " ".join(text.getvalue().split()) == (
        "step 0: Pass@1 25.0% (95 % interval 20.0% to 30.0%), 40.2 tokens an answer; "
        "400 problems, 4 answers each, temperature 0.6, top-p 1"
    )


def test_text_is_printed_as_it_is_and_without_control_characters_outside_a_terminal():
    printer, text = console()
    printer.note("the prompt [bold]x[/bold] has [0] " + 100 * "a")
    with printer.progress("evaluation [x]", 8) as advance:
        for _ in range(8):
            advance(1)
    lines = text.getvalue().splitlines()
    assert lines[0] == "the prompt [bold]x[/bold] has [0] " + 100 * "a"
    assert lines[1:-1] == ["evaluation [x] ..."] + [f"evaluation [x]: {n}/8" for n in (2, 4, 6)]
    assert lines[-1] == "evaluation [x]: done in 0s"
    assert "\x1b" not in text.getvalue()


@pytest.mark.parametrize("total", [4, None])
def test_progress_on_a_terminal_ends_in_one_plain_line(total):
    printer, text = console(is_terminal=True)
    with printer.progress("model load", total) as advance:
        advance(1)
    assert "model load" in text.getvalue()
    assert text.getvalue().endswith("model load: done in 0s\n")


def test_stdout_stays_free(capsys):
    printer = Console(10)
    printer.note("hello")
    printer.print_step(ROW)
    assert capsys.readouterr().out == ""


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path):
    """In a process of its own, whose standard error is a pipe that nobody reads."""
    code = (
        "from treerpo_ray.metrics.console import Console\n"
        "console = Console(9)\n"
        "for step in range(9):\n"
        "    console.note('line ' * 20000)\n"
        "print('still here')\n"
    )
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stderr=written,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    )
    os.close(written)
    assert done.stdout == "still here\n"
