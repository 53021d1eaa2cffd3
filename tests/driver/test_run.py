"""A run: what is said of its folder before anything starts."""

import io

import pytest
import rich.console

from treerpo_ray.config import load
from treerpo_ray.driver.run import run
from treerpo_ray.driver.start import look_at_folder
from treerpo_ray.metrics.console import Console
from treerpo_ray.preflight.inputs import Inputs
from treerpo_ray.prompts.prompt_set import PromptSet


def make_console() -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    return Console(console=rich.console.Console(file=shown, width=120)), shown


def test_a_run_that_has_a_checkpoint_says_from_which_step_it_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://nowhere:10001")  # which is refused after that
    config = load([f"run.root={tmp_path}", "run.name=mine", "evaluate.data.path=''"])
    nothing = PromptSet(problems=(), token_ids=(), num_too_long=0)
    inputs = Inputs(prompts=nothing, held_out=None, delimiters=())
    for step in (None, 2, 14):
        if step is not None:
            folder = tmp_path / f"mine/checkpoints/step={step:06d}"
            folder.mkdir(parents=True)
            (folder / "files.json").write_text("{}")
        console, shown = make_console()
        with pytest.raises(ValueError, match="ray://"):
            run(config, inputs, look_at_folder(config), console)
        told = f"the run goes on from its checkpoint of learner step {step}"
        assert (told in shown.getvalue()) == (step is not None)
