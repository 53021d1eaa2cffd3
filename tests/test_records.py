"""Records: a scored tree comes back from Arrow, Parquet and pickle as it was."""

import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.learning.records import empty_step, make_record, plain, records
from tests.support.learning.trees import make_step, make_tree
from treerpo_ray.algo.tree import ROOT, Tree
from treerpo_ray.records import SCHEMA, Training, TreeRecord, from_table, to_table, with_training
from treerpo_ray.verifier.verdict import Verdict


@given(drawn=st.lists(records(), max_size=3))
def test_trees_come_back_from_arrow_as_they_were(drawn: list[TreeRecord]) -> None:
    table = to_table(drawn)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table.num_rows == len(drawn)
    assert [plain(record) for record in from_table(table)] == [plain(record) for record in drawn]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(records(), max_size=3))
def test_trees_come_back_from_parquet_as_they_were(drawn: list[TreeRecord], tmp_path) -> None:
    pyarrow.parquet.write_table(to_table(drawn), tmp_path / "trees.parquet")
    back = from_table(pyarrow.parquet.read_table(tmp_path / "trees.parquet"))
    assert [plain(record) for record in back] == [plain(record) for record in drawn]


@settings(max_examples=20)
@given(record=records())
def test_a_tree_comes_back_from_pickle_as_it_was(record: TreeRecord) -> None:
    record.tree.children  # noqa: B018 - a cached property must not get in the way
    assert plain(pickle.loads(pickle.dumps(record))) == plain(record)


def test_a_slice_and_a_concatenation_of_tables_hold_their_own_trees() -> None:
    drawn = [replace(make_record(make_tree([ROOT] * n), ()), ticket=n) for n in (1, 2, 3)]
    table = pa.concat_tables([to_table(drawn[:2]), to_table(drawn[2:])])
    assert [plain(record) for record in from_table(table.slice(1))] == [
        plain(record) for record in drawn[1:]
    ]


def test_a_tree_without_steps_and_one_whose_every_step_is_empty_come_back() -> None:
    errors = Tree.from_steps(np.array([1], np.int32), (empty_step(ROOT), empty_step(ROOT)))
    drawn = [make_record(make_tree([]), ()), make_record(errors, (Verdict.ERRORED,) * 2)]
    back = from_table(to_table(drawn))
    assert [plain(record) for record in back] == [plain(record) for record in drawn]
    assert [len(record.tree.steps) for record in back] == [0, 2]


def test_logprobs_that_are_not_numbers_come_back_as_they_were() -> None:
    logprobs = np.array([np.nan, -np.inf, -0.1], np.float32)
    step = replace(make_step(ROOT, np.arange(3, dtype=np.int32)), logprobs=logprobs)
    tree = Tree.from_steps(np.array([1], np.int32), (step,))
    [back] = from_table(to_table([make_record(tree, ())]))
    np.testing.assert_array_equal(back.tree.steps[0].logprobs, logprobs)


def test_what_the_learner_made_of_a_tree_is_stored_where_it_was_trained_on() -> None:
    tree, nan = make_tree([ROOT, ROOT], lengths=[2, 1]), np.nan
    made = [
        Training(
            advantages=np.array([nan, 1 / 3]), logprobs=np.array([nan, nan, -0.25], np.float32)
        ),
        Training(advantages=np.full(2, nan), logprobs=np.full(3, nan, np.float32)),
    ]
    table = with_training(to_table([make_record(tree, ())] * 2), made)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table["advantage"].to_pylist() == [[None, 1 / 3], [None, None]]
    assert table["learner_logprobs"].to_pylist() == [[None, None, -0.25], [None] * 3]
    back = [*from_table(table), *from_table(table.slice(1))]
    for record, own in zip(back, [*made, made[1]], strict=True):
        np.testing.assert_array_equal(record.training.advantages, own.advantages, strict=True)
        np.testing.assert_array_equal(record.training.logprobs, own.logprobs, strict=True)


def test_a_file_of_an_earlier_version_has_no_column_of_it_and_is_read() -> None:
    record = make_record(make_tree([ROOT]), ())
    table = to_table([record]).drop_columns(["advantage", "learner_logprobs"])
    [back] = from_table(table)
    assert plain(back) == plain(record) and back.training is None


@pytest.mark.parametrize("metadata", [None, {"treerpo_schema": "3"}, {"treerpo_schema": "5"}])
def test_a_table_of_another_schema_version_is_refused(metadata: dict[str, str] | None) -> None:
    table = to_table([]).replace_schema_metadata(metadata)
    found = "0" if metadata is None else metadata["treerpo_schema"]
    told = rf"^trees were written with schema {'[?]' if metadata is None else found}, this reads 4$"
    with pytest.raises(ValueError, match=told):
        from_table(table)


def test_a_scored_row_tells_values_with_their_errors_and_one_without_verdicts_does_not() -> None:
    """Below step 0 are 1 and 0, so s^2 / N = 1/4; step 1 is a leaf of value 1.

    The prompt's values are 1/2 and 1: S^2 = 1/16, and a child's variance is (e^2 / 2 + S^2) / 2.
    """
    tree = make_tree([ROOT, ROOT, 0, 0])
    verdicts = (Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG)
    scored, bare = to_table([make_record(tree, verdicts), make_record(tree, ())]).to_pylist()
    assert (scored["root_value"], scored["root_se"]) == (0.75, 0.25)
    assert scored["value"] == [0.5, 1.0, 1.0, 0.0]
    assert scored["value_se"] == [0.5, 0.0, 0.0, 0.0]
    expected = [(3 / 32) ** 0.5, (1 / 32) ** 0.5, 8**-0.5, 8**-0.5]
    assert scored["difference_se"] == pytest.approx(expected)
    estimates = ("root_value", "root_se", "value", "value_se", "difference_se")
    assert [bare[name] for name in estimates] == [None] * 5


def test_rewards_stand_at_the_leaves_and_an_errored_or_timed_out_leaf_has_none() -> None:
    tree = make_tree([ROOT, ROOT, 0, 0, 0, 0, 0])
    verdicts = (
        *(Verdict.CORRECT, Verdict.WRONG, Verdict.UNANSWERED),
        *(Verdict.CUT_OFF, Verdict.TIMED_OUT, Verdict.ERRORED),
    )
    rewards = make_record(tree, verdicts).rewards
    nan = np.nan
    np.testing.assert_array_equal(rewards, [nan, 1, 0, 0, 0, nan, nan])


def test_partial_credit_comes_back_to_the_last_digit_and_is_backed_up() -> None:
    """Below step 0 are 1/4 and 0, so its value is 1/8; the prompt has the mean of it and 1."""
    tree = make_tree([ROOT, ROOT, 0, 0])
    record = make_record(tree, (Verdict.CORRECT, Verdict.PARTIAL, Verdict.WRONG))
    assert record.leaf_rewards == (1.0, 0.25, 0.0)
    [row] = to_table([record]).to_pylist()
    assert row["verdict"] == ["correct", "partial", "wrong"]
    assert row["value"] == [0.125, 1.0, 0.25, 0.0] and row["root_value"] == 0.5625
    lost = make_record(tree, (Verdict.ERRORED, Verdict.PARTIAL, Verdict.PARTIAL))
    [back] = from_table(to_table([lost]))
    np.testing.assert_array_equal(back.leaf_rewards, [np.nan, 0.25, 0.1])
    assert replace(record, row='{"a": 1}').graded([]).row == '{"a": 1}'


def test_a_tree_that_is_not_scored_has_no_rewards_to_give() -> None:
    with pytest.raises(ValueError, match="0 verdicts for 1 leaves"):
        make_record(make_tree([ROOT]), ()).rewards  # noqa: B018 - a property
