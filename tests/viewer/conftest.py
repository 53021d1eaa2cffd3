"""Runs for the viewer's tests, and the browser that looks at them."""

from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.support.learning.records import some_training
from tests.support.saved_runs.paper_run import write_paper_run
from tests.support.saved_runs.small_run import (
    answers_to,
    save_trees,
    worked_record,
    write_small_run,
)
from tests.support.saved_runs.viewer import CHROMIUM, PROBLEMS, chromium, client_of, served
from treerpo_ray.run_folder.files import RunFolder


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[dev]'")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium (Debian's package)")
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = write_small_run(tmp_path_factory.mktemp("runs"))
    save_trees(folder, 20, [worked_record(5), worked_record(6)])
    run = RunFolder(folder)
    run.publish_table(*answers_to(PROBLEMS[:2], 0, [["#### 3", "#### 2"], ["#### 4"]]))
    run.publish_table(*answers_to(PROBLEMS[:2], 12, [["#### 2", "#### 2"], ["#### 5"]]))
    return folder


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """A run that was trained on what it saved, and that has fixed a mistake."""
    folder = write_small_run(tmp_path_factory.mktemp("fixed"))
    record = worked_record(5)
    save_trees(folder, 20, [replace(record, training=some_training(record.tree))])
    run = RunFolder(folder)
    run.publish_table(*answers_to(PROBLEMS[:2], 0, [["#### 3"] * 4, ["#### 4"] * 4]))
    run.publish_table(*answers_to(PROBLEMS[:2], 12, [["#### 2"] * 4, ["#### 4"] * 4]))
    return folder


@pytest.fixture(scope="module")
def addresses(small, fixed, tmp_path_factory):
    """Addresses of the page by run, each served once."""
    root = tmp_path_factory.mktemp("served")
    many = write_small_run(root, "many")
    save_trees(many, 30, [replace(worked_record(5), ticket=ticket) for ticket in range(250)])
    with ExitStack() as stack:
        places = {
            "small": small,
            "fixed": fixed,
            "many": many,
            "paper": write_paper_run(root),
        }
        yield {name: stack.enter_context(served(place)) for name, place in places.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_small_run(tmp_path_factory.mktemp("runs"))
    save_trees(folder, 20, [worked_record(5)])
    run = RunFolder(folder)
    run.publish_table(*answers_to(PROBLEMS, 0, [["#### 3", "#### 2"], ["#### 4"], ["#### 1"]]))
    run.publish_table(*answers_to(PROBLEMS[:2], 12, [["#### 2", "#### 2"], ["#### 5"]]))
    return folder


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return write_paper_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def ask(folder):
    client = client_of(folder)

    def ask(name, **query):
        return client.get(f"/api/{name}", params=query).json()

    return ask
