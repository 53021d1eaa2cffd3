"""Saved trees come back as they were, and are used only where the bound of staleness allows it."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.learning.records import plain, tree_of
from treerpo_ray.config import Config, load
from treerpo_ray.prompts.mixture import one_set
from treerpo_ray.records import TreeRecord, to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.search.gate import Gate


@cache
def config_of(*overrides: str) -> Config:
    return load(["gate.trees_per_step=2", *overrides])


def used(trees: list[TreeRecord], step: int, version: int, staleness: int) -> list[int]:
    config = config_of(f"gate.max_staleness={staleness}")
    found = saved_trees.usable(trees, step=step, version=version, gate=config.gate)
    return [tree.ticket for tree in found]


@pytest.mark.parametrize("num_trees", [0, 3])
def test_trees_come_back_as_they_were(tmp_path: Path, num_trees: int) -> None:
    trees = [replace(tree_of(n, n, n + 1), finished_at_s=n % 2) for n in range(num_trees)]
    saved_trees.write(tmp_path, trees, config_of().tree)
    found = saved_trees.read(tmp_path, config_of("gate.max_staleness=3", "run.num_steps=7").tree)
    assert [plain(tree) for tree in found] == [plain(tree) for tree in trees]


@pytest.mark.parametrize("change", ["tree.temperature=0.5", "tree.step_tokens=[9,9,9]"])
def test_trees_of_another_shape_or_temperature_are_not_read(tmp_path: Path, change: str) -> None:
    saved_trees.write(tmp_path, [tree_of(0, 0)], config_of().tree)
    assert saved_trees.read(tmp_path, config_of(change).tree) == []


def test_a_tree_of_a_version_that_the_learner_has_lost_is_not_used() -> None:
    assert used([tree_of(4, 2), tree_of(5, 1, 3)], step=2, version=2, staleness=1) == [4]


def test_of_two_trees_of_a_ticket_the_last_one_that_can_be_used_is() -> None:
    saved, grown = tree_of(4, 2), tree_of(4, 2, 2)
    config = config_of("gate.max_staleness=1")
    for trees in ([saved, grown], [saved, grown, tree_of(4, 2, 3)]):
        assert saved_trees.usable(trees, step=2, version=2, gate=config.gate) == [grown]


def test_a_tree_of_a_step_that_is_done_is_not_used() -> None:
    assert used([tree_of(3, 2), tree_of(4, 2)], step=2, version=2, staleness=1) == [4]


def test_a_tree_that_would_be_staler_than_allowed_when_it_is_consumed_is_not_used() -> None:
    # Learner step 3 is made at version 3, step 4 at version 4.
    trees = [tree_of(4, 1), tree_of(6, 2), tree_of(7, 1, 2), tree_of(8, 2)]
    assert used(trees, step=2, version=2, staleness=1) == [4, 6]
    assert used(trees, step=2, version=2, staleness=2) == [4, 6, 7, 8]
    assert used(trees, step=2, version=2, staleness=0) == []


@settings(max_examples=30)
@given(staleness=st.integers(0, 3), data=st.data())
def test_every_tree_that_the_gate_admitted_can_be_used_if_each_step_is_an_update_or_not(
    staleness: int, data: st.DataObject
) -> None:
    """A tree is sampled at the earliest when the gate lets its ticket out."""
    gate = Gate(
        mixture=one_set(9),
        trees_per_step=2,
        max_staleness=staleness,
        num_steps=9,
        seed=0,
        num_children=(2,),
    )
    versions, trees = [0], []
    for step in range(9):
        gate.steps_done = step
        while gate.issued < gate.limit:
            trees.append(tree_of(gate.issued, versions[-1]))
            gate.issued += 1
        due = [tree.ticket for tree in trees if tree.ticket >= step * 2]
        assert used(trees, step=step, version=versions[-1], staleness=staleness) == due
        versions.append(versions[-1] + data.draw(st.integers(0, 1)))


def test_a_checkpoint_without_trees_or_with_those_of_another_schema_gives_none(
    tmp_path: Path,
) -> None:
    config = config_of()
    assert saved_trees.read(tmp_path, config.tree) == []
    saved_trees.write(tmp_path, [tree_of(0, 1)], config.tree)
    table = pq.read_table(tmp_path / saved_trees.FILE)
    metadata = table.schema.metadata | {b"treerpo_schema": b"0"}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / saved_trees.FILE)
    assert saved_trees.read(tmp_path, config.tree) == []


def test_a_saved_tree_is_found_among_the_files_of_a_step_the_last_of_its_ticket(
    tmp_path: Path,
) -> None:
    folder = RunFolder(str(tmp_path))
    trees = [replace(tree_of(n % 3, n), finished_at_s=float(n)) for n in range(6)]
    folder.publish_table(saved_trees.name(7, 0), to_table(trees[3:]))
    folder.publish_table(saved_trees.name(7, 1), to_table(trees[:3]))
    for ticket in range(3):
        found = saved_trees.saved_tree(folder, 7, ticket)
        assert found is not None and plain(found) == plain(trees[3 + ticket])
    assert saved_trees.saved_tree(folder, 7, 3) is None
    assert saved_trees.saved_tree(folder, 8, 0) is None
    table = to_table(trees).replace_schema_metadata({"treerpo_schema": "0"})
    folder.publish_table(saved_trees.name(7, 2), table)
    with pytest.raises(ValueError, match="written with schema 0, this reads"):
        saved_trees.saved_tree(folder, 7, 0)
