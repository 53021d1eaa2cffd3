import contextlib
import io
import os
import subprocess
import sys

import pytest
import rich.console

from tests.support.project import PROJECT
from tests.support.saved_runs.fork_rows import measured_forks
from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.config import Config
from treerpo_ray.config.sections import GateConfig, LearnerConfig, RunConfig
from treerpo_ray.metrics.console import Console
from treerpo_ray.metrics.diagnosis import NOTHING_KEPT, RULES
from treerpo_ray.metrics.events import Event
from treerpo_ray.metrics.step_table import StepTable, duration, short

ROW = {
    "step": 2,
    "time": 1000.0,
    "reward/mean": 0.4125,
    "groups/kept": 12,
    "groups/kept_share": 0.63,
    "loss/total": -0.0123,
    "loss/kl": 0.0002,
    "mismatch/mean": 0.0011,
    "staleness/mean": 0.5,
    "tokens/per_s": 12341.2,
    "tokens/total": 250_400,
}
EVALUATION = {
    **{"step": 0, "eval/pass_at_1": 0.25, "eval/ci95_low": 0.2, "eval/ci95_high": 0.3},
    **{"eval/length": 40.25, "eval/num_problems": 400, "eval/num_samples": 4},
    **{"eval/temperature": 0.6, "eval/top_p": 1.0},
}
HEX = "9b6d8b209959ea0d2377f064fa87aa9da5430339f2e71b6f35807d2b"


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_of(num_steps=10, tokens=None, *, kl=0.1, staleness=1, threshold=0.1) -> Config:
    return Config(
        run=RunConfig(num_steps=num_steps, max_sampled_tokens=tokens),
        gate=GateConfig(max_staleness=staleness),
        loss=LossConfig(kl_coef=kl),
        learner=LearnerConfig(prune_threshold=threshold),
    )


def console(is_terminal=False, width=80, config=None, clock=None):
    text = io.StringIO()
    to = rich.console.Console(file=text, force_terminal=is_terminal, width=width, color_system=None)
    printer = Console(console=to, clock=clock or Clock())
    printer.expect_steps(StepTable.of(config or run_of()))
    return printer, text


def cells(line: str) -> str:
    return " ".join(line.split())


def test_a_step_is_one_line_under_its_titles():
    for is_terminal, width in ((False, 80), (True, 80), (True, 160)):
        clock = Clock()
        printer, text = console(is_terminal, width, clock=clock)
        clock.now = 65.0
        printer.print_step(ROW)
        clock.now = 125.0
        printer.print_step(ROW | {"step": 4, "time": 1060.0})
        titles, first, second = text.getvalue().splitlines()
        assert cells(titles) == "step reward kept loss kl mismatch stale tok/s tokens time left"
        assert cells(first) == ("2/10 0.412 63% -0.0123 0.0002 0.0011 0.50 12.3k 250k 1m05s -")
        assert cells(second) == ("4/10 0.412 63% -0.0123 0.0002 0.0011 0.50 12.3k 250k 2m05s 3m00s")
        assert len(titles) == len(first) == len(second) <= 80


def test_the_place_to_fork_that_needs_the_fewest_tokens_stands_below_its_step():
    printer, text = console()
    printer.print_step(ROW | measured_forks(1.2, 0.6))
    printer.print_step(ROW | {"step": 4, "time": 1060.0})
    assert text.getvalue().splitlines()[2].strip() == (
        "a tree of [1, 4] would need 0.60 ± 0.10 of the tokens of single answers (fork at depth 2, "
        "240 prefixes of 60 trees)"
    )
    assert len(text.getvalue().splitlines()) == 4


def test_the_widest_table_has_80_columns():
    printer, text = console(config=run_of(num_steps=1000))
    widest = {"step": 1000, "loss/total": -1.2345, "groups/kept_share": 1.0}
    printer.print_step(ROW | widest | {"tokens/total": 99_940_000, "tokens/per_s": 999_400})
    assert {len(line) for line in text.getvalue().splitlines()} <= set(range(81))


def test_columns_that_cannot_move_are_left_out():
    cases = {
        "kl": run_of(kl=0.0),
        "stale": run_of(staleness=0),
        "kept": run_of(threshold=-1),
    }
    for title, config in cases.items():
        printer, text = console(config=config)
        printer.print_step(ROW)
        titles, line = text.getvalue().splitlines()
        assert title not in titles.split() and len(titles.split()) == len(line.split()) == 10


def test_the_time_left_has_evaluations_and_the_budget_of_tokens_in_it():
    printer, text = console()
    printer.expect_evaluation(30.0)
    printer.print_step(ROW)
    printer.print_step(ROW | {"step": 4, "time": 1100.0})  # 6 steps of 50 s, with an evaluation
    printer.print_step(ROW | {"step": 10, "time": 1200.0})
    assert [line.split()[-1] for line in text.getvalue().splitlines()] == [
        "left", "-", "5m30s", "30s"
    ]  # fmt: skip
    printer, text = console(config=run_of(tokens=400_000))
    printer.print_step(ROW | {"tokens/total": 100_000})
    # As many tokens again, so 4 steps more instead of 6.
    printer.print_step(ROW | {"step": 4, "time": 1040.0, "tokens/total": 200_000})
    assert text.getvalue().split()[-1] == "1m20s"


def test_numbers_stay_short():
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.6, 3599.4, 3600, 359_000)] == [
        "0.0s", "9.9s", "10s", "1m00s", "59m59s", "1h00m", "99h43m"
    ]  # fmt: skip
    for count in (0, 9, 999.4, 999.6, 9994, 9996, 99_949, 99_951, 999_499, 999_501, 5e12):
        shown = short(count)
        assert len(shown) <= 5
        unit = shown[-1] if shown[-1] in "kMBT" else ""
        value = float(shown.removesuffix(unit)) * 1000.0 ** " kMBT".index(unit or " ")
        assert value == pytest.approx(count, rel=0.006, abs=0.5)


def unhealthy(**fields):
    whole = {"step": 7, "metric": "mismatch/mean", "value": 0.25, "key": "health.max_mismatch"}
    whole |= {"limit": 0.1, "what": "they disagree", "remedy": "lower gate.max_staleness"}
    return Event(kind="unhealthy", fields=whole | fields)


def test_a_warning_says_what_is_wrong_by_how_much_and_what_to_change():
    printer, text = console()
    printer.print_event(unhealthy())
    printer.print_event(unhealthy(value=0.01, metric="loss/entropy", key="health.min_entropy"))
    printer.print_event(unhealthy(key="", what="nothing was kept", remedy="take other prompts"))
    assert text.getvalue().splitlines() == [
        "warning at step 7: they disagree: mismatch/mean is 0.25, above "
        "health.max_mismatch=0.1; lower gate.max_staleness",
        "warning at step 7: they disagree: loss/entropy is 0.01, below "
        "health.min_entropy=0.1; lower gate.max_staleness",
        "warning at step 7: nothing was kept; take other prompts",
    ]


def test_every_warning_fits_into_a_few_lines_of_80_columns_and_ends_with_a_remedy():
    for rule in (NOTHING_KEPT, *RULES):
        printer, text = console(is_terminal=True)
        key = f"health.{rule.key}" if rule.key else ""
        told = {"metric": rule.metric, "key": key, "what": rule.what, "remedy": rule.remedy}
        printer.print_event(unhealthy(**told))
        lines = text.getvalue().splitlines()
        assert len(lines) <= 5 and all(len(line) <= 80 for line in lines)
        assert " ".join(lines).endswith(rule.remedy)


def test_a_quiet_console_shows_warnings_alone():
    text = io.StringIO()
    to = rich.console.Console(file=text, width=200, color_system=None)
    printer = Console(console=to, is_quiet=True)
    printer.expect_steps(StepTable.of(run_of()))
    with printer.stage("starting Ray"):
        printer.note("prose")
    with printer.training():
        printer.print_step(ROW | EVALUATION)
    printer.print_plan(["data        1 problem"])
    printer.print_command("evaluate it", "python x")
    printer.print_event(Event(kind="engine_serving", fields={"engine": 0}))
    assert text.getvalue() == ""
    printer.print_event(Event(kind="engine_lost", fields={"engine": 0}))
    printer.print_event(unhealthy())
    printer.print_plan(["unusual     loss.kl_coef=9: usual are 0 to 0.2"])
    printer.warn("the log did not end well")
    assert [line.split(":")[0] for line in text.getvalue().splitlines()] == [
        "engine lost", "warning at step 7", "unusual     loss.kl_coef=9",
        "the log did not end well",
    ]  # fmt: skip


@pytest.mark.parametrize("variable", ["NO_COLOR", None])
def test_colours_are_left_out_where_the_environment_says_so(monkeypatch, variable):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if variable:
        monkeypatch.setenv(variable, "1")
    text = io.StringIO()
    printer = Console(console=rich.console.Console(file=text, force_terminal=True, width=80))
    printer.warn("prose")
    assert ("\x1b[33m" in text.getvalue()) == (variable is None)


def test_the_growth_of_trees_is_a_bar_on_a_terminal_and_nothing_elsewhere():
    printer, text = console(is_terminal=True)
    with printer.training():
        assert printer.is_live
        printer.show_growth(3, 0)
        printer.show_growth(3, 12)
        printer.print_step(ROW)
    assert "trees of step 3" in text.getvalue() and "12/128" in text.getvalue()
    assert not printer.is_live
    printer.show_growth(4, 1)
    assert "step 4" not in text.getvalue()
    plain, text = console()
    with plain.training():
        assert not plain.is_live
    assert text.getvalue() == ""


def test_what_libraries_print_into_a_log_stays_there_while_a_bar_is_shown():
    printer, text = console(is_terminal=True)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        with printer.training():
            print("(raylet) WARNING: on node 9b6d8b20")
        with printer.progress("evaluating", 4):
            print("and more", file=sys.stderr)
    assert log.getvalue().splitlines() == ["(raylet) WARNING: on node 9b6d8b20", "and more"]
    assert "raylet" not in text.getvalue() and "more" not in text.getvalue()


def test_the_bar_shows_the_stage_that_was_begun_until_it_ends():
    frames = []
    for has_ended in (False, True):
        printer, text = console(is_terminal=True)
        printer.begin_stage("starting 1 train worker(s)")
        with printer.training():
            if has_ended:
                printer.end_stage()
        frames.append(text.getvalue().replace("\r", "\n").splitlines())
    begun, ended = ([line for line in each if "0:00:00" in line][-1] for each in frames)
    assert "starting 1 train worker(s)" in begun and "0/" not in begun
    assert "training" in ended


def test_an_evaluation_says_how_it_was_sampled_where_that_is_new():
    printer, text = console()
    printer.print_step(EVALUATION)
    printer.print_step(EVALUATION | {"step": 6, "eval/num_samples": 1})
    printer.print_step(EVALUATION | {"step": 12, "eval/num_samples": 1})
    assert text.getvalue().splitlines() == [
        "step 0: Pass@1 25.0% (95 % interval 20.0% to 30.0%), 40.2 tokens an answer",
        "        400 problems, 4 answers each, temperature 0.6, top-p 1",
        "step 6: Pass@1 25.0% (95 % interval 20.0% to 30.0%), 40.2 tokens an answer",
        "        400 problems, 1 answer each, temperature 0.6, top-p 1",
        "step 12: Pass@1 25.0% (95 % interval 20.0% to 30.0%), 40.2 tokens an answer",
    ]


def test_ids_are_for_the_logs():
    printer, text = console()
    fields = {"engine": 0, "pid": 25236, "core": 25401, "node": HEX, "trees": 0, "seconds": 26}
    printer.print_event(Event(kind="engine_serving", fields=fields))
    reason = f"ActorDiedError: the actor died on node {HEX}, pid=25236: no memory"
    printer.print_event(Event(kind="engine_lost", fields={"engine": 0, "reason": reason}))
    where = "/cache/snapshots/0123456789abcdef0123/model is gone"
    printer.print_event(Event(kind="waiting", fields={"what": where, "seconds": 30}))
    printer.print_event(Event(kind="tree_moved", fields={"ticket": 3, "node": HEX}))
    assert text.getvalue().splitlines() == [
        "engine 0 serves, 26 s after its start",
        "engine lost: engine 0: ActorDiedError: the actor died on node: no memory",
        f"waiting for {where}, for 30 s so far",
        "tree moved: ticket 3",
    ]


def test_events_are_wrapped_for_a_terminal_but_for_tracebacks():
    printer, text = console(is_terminal=True)
    trace = "File x, line 1\n    " + "long " * 40 + "\nValueError: no"
    printer.print_event(Event(kind="check_failed", fields={"reason": trace}))
    printer.print_event(Event(kind="engine_lost", fields={"engine": 0, "reason": "word " * 40}))
    lines = text.getvalue().splitlines()
    assert "\n".join(lines[:3]) == f"check failed: {trace}"
    assert len(lines) > 5 and all(len(line) <= 80 for line in lines[3:])


def test_a_stage_ends_with_what_it_waits_for_and_says_how_long_it_took():
    clock = Clock()
    printer, text = console(clock=clock)
    with printer.stage("starting Ray"):
        clock.now = 6.7
    printer.begin_stage("starting 1 train worker(s)")
    clock.now += 60
    printer.begin_stage("starting 1 train worker(s)")  # the first one was lost
    clock.now += 13
    printer.print_event(Event(kind="learner_started", fields={"step": 0, "pid": 7}))
    printer.end_stage()  # there is none any more
    assert text.getvalue().splitlines() == [
        "starting Ray ...", "starting Ray: done in 6.7s",
        "starting 1 train worker(s) ...",
        "starting 1 train worker(s) ...", "starting 1 train worker(s): done in 13s",
        "learner started: step 0",
    ]  # fmt: skip


def test_a_stage_that_fails_is_not_said_to_be_done():
    printer, text = console()
    with pytest.raises(ValueError), printer.stage("starting Ray"):
        raise ValueError
    assert "done" not in text.getvalue()


def test_prose_is_wrapped_for_a_terminal_and_commands_are_not():
    words = "word " * 40
    for is_terminal in (True, False):
        printer, text = console(is_terminal)
        printer.note(words)
        printer.print_plan([f"data        {words}"])
        printer.print_command("evaluate it", f"python {words}".strip())
        lines = text.getvalue().splitlines()
        assert lines[-2:] == ["evaluate it:", f"python {words}".strip()]
        prose = lines[:-2]
        if is_terminal:
            assert all(len(line) <= 80 for line in prose) and len(prose) > 4
            assert [line[:12].strip() for line in prose[3:]] == ["data", "", "", ""]
        else:
            assert len(prose) == 2


def test_text_is_printed_as_it_is_and_without_control_characters_outside_a_terminal():
    printer, text = console()
    printer.note("the prompt [bold]x[/bold] has :train: [0] " + 100 * "a")
    with printer.progress("evaluation [x]", 8) as advance:
        for _ in range(8):
            advance(1)
    lines = text.getvalue().splitlines()
    assert lines[0] == "the prompt [bold]x[/bold] has :train: [0] " + 100 * "a"
    assert lines[1:-1] == ["evaluation [x] ..."] + [f"evaluation [x]: {n}/8" for n in (2, 4, 6)]
    assert lines[-1] == "evaluation [x]: done in 0.0s"
    assert "\x1b" not in text.getvalue()


@pytest.mark.parametrize("total", [4, None])
def test_progress_on_a_terminal_ends_in_one_plain_line(total):
    printer, text = console(is_terminal=True)
    with printer.progress("model load", total) as advance:
        advance(1)
    assert "model load" in text.getvalue()
    assert text.getvalue().endswith("model load: done in 0.0s\n")


def test_stdout_stays_free(capsys):
    printer = Console()
    printer.expect_steps(StepTable.of(run_of()))
    printer.note("hello")
    printer.print_step(ROW)
    assert capsys.readouterr().out == ""


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path):
    """In a process of its own, whose standard error is a pipe that nobody reads."""
    code = (
        "from treerpo_ray.metrics.console import Console\n"
        "console = Console()\n"
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
        cwd=PROJECT,
        text=True,
    )
    os.close(written)
    assert done.stdout == "still here\n"
