"""One job at a time writes a run folder, and a job that was killed keeps no other from it."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import rich.console

from treerpo_ray.config import load
from treerpo_ray.driver.run import run
from treerpo_ray.driver.start import look_at_folder
from treerpo_ray.metrics.console import Console
from treerpo_ray.preflight.inputs import Inputs
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.lock import FILE, only_writer

HOLDER = """
import sys, time
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.lock import only_writer
with only_writer(RunFolder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
NOTHING = Inputs(
    prompts=PromptSet(problems=(), token_ids=(), num_too_long=0), held_out=None, delimiters=()
)


def test_a_second_job_is_refused_before_anything_starts_and_names_the_folder(
    tmp_path: Path,
) -> None:
    config = load([f"run.root={tmp_path}", "run.name=shared"])
    console = Console(console=rich.console.Console(file=io.StringIO()))
    earlier = look_at_folder(config)
    was_started = ray.is_initialized()  # by tests that ran before
    told = f"^another job writes {tmp_path}/shared; wait for it or choose another run.name$"
    with only_writer(RunFolder(config.folder)):
        with pytest.raises(ValueError, match=told):
            look_at_folder(config)  # before data and model are looked at
        with pytest.raises(ValueError, match=told):
            run(config, NOTHING, earlier, console)
    assert ray.is_initialized() == was_started
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [FILE]


def test_the_lock_of_a_job_that_was_killed_or_has_ended_blocks_nobody(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match="another job writes"),
        only_writer(RunFolder(str(tmp_path))),
    ):
        pass
    holder.kill()
    holder.communicate()
    for _ in range(2):
        with only_writer(RunFolder(str(tmp_path))):
            pass
    assert (tmp_path / FILE).exists()


def test_other_folders_and_object_stores_are_not_locked(tmp_path: Path) -> None:
    for first, second in (("a", "b"), ("memory://bucket/run", "memory://bucket/run")):
        places = (place if "://" in place else str(tmp_path / place) for place in (first, second))
        one, other = map(RunFolder, places)
        with only_writer(one), only_writer(other):
            pass
