"""The console that a command line asks for, and what programs read of it."""

import io
import json
import math

import pytest

from treerpo_ray.metrics.events import Event
from treerpo_ray.metrics.output import JsonConsole, console_for


def test_the_options_choose_the_console_and_the_rest_is_left() -> None:
    console, rest = console_for(["--json", "conf/quickstart.yaml"])
    assert isinstance(console, JsonConsole) and rest == ["conf/quickstart.yaml"]
    console, rest = console_for(["conf/quickstart.yaml", "--quiet"])
    assert not isinstance(console, JsonConsole) and rest == ["conf/quickstart.yaml"]
    with pytest.raises(ValueError, match="--quiet and --json exclude each other"):
        console_for(["--quiet", "--json"])


def test_all_that_a_run_shows_is_an_object_a_line() -> None:
    text, now = io.StringIO(), 0.0
    console = JsonConsole(file=text, clock=lambda: now)
    with console.stage("starting Ray"):
        now = 6.5
    console.print_plan(["data        1 problem"])
    console.begin_stage("starting 1 train worker(s)")
    now = 20.0
    console.print_event(Event(kind="learner_started", fields={"pid": 7}))
    console.print_step({"step": 1, "reward/mean": math.nan, "loss/total": math.inf})
    with console.progress("evaluating", 4) as advance:
        advance(3)
    console.note("prose [x]\nof two lines")
    console.warn("careful")
    console.print_command("evaluate it", "python x")
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    assert all(line.pop("time") > 1e9 for line in lines)
    worker = "starting 1 train worker(s)"
    assert lines == [
        {"kind": "stage", "stage": "starting Ray", "state": "begun"},
        {"kind": "stage", "stage": "starting Ray", "state": "done", "seconds": 6.5},
        {"kind": "plan", "text": "data        1 problem"},
        {"kind": "stage", "stage": worker, "state": "begun"},
        {"kind": "stage", "stage": worker, "state": "done", "seconds": 13.5},
        {"kind": "event", "event": "learner_started", "pid": 7},
        {"kind": "step", "step": 1, "reward/mean": None, "loss/total": None},
        {"kind": "stage", "stage": "evaluating", "state": "begun"},
        {"kind": "progress", "stage": "evaluating", "done": 3, "total": 4},
        {"kind": "stage", "stage": "evaluating", "state": "done", "seconds": 0.0},
        {"kind": "note", "text": "prose [x]\nof two lines"},
        {"kind": "warning", "text": "careful"},
        {"kind": "command", "purpose": "evaluate it", "command": "python x"},
    ]
