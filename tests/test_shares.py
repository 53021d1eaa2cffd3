"""Shares: one holds whole trees and gives them back."""

from dataclasses import replace

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.records import make_record, plain, records
from tests.support.trees import make_tree
from treerpo_ray.algo.tree import ROOT
from treerpo_ray.config import load
from treerpo_ray.records import SCHEMA, TreeRecord, from_table
from treerpo_ray.tree_stream import Shares, from_share, has_signal, to_share
from treerpo_ray.verifier.verdict import Verdict


@settings(max_examples=30)
@given(st.lists(records(), min_size=1, max_size=4))
def test_a_share_is_one_row_and_gives_its_trees_back(drawn: list[TreeRecord]) -> None:
    share = to_share(drawn)
    assert share.num_rows == 1
    table = from_share(share)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert [plain(record) for record in from_table(table)] == [plain(record) for record in drawn]


def test_of_shares_that_arrow_put_together_each_gives_its_own_trees() -> None:
    drawn = [make_record(make_tree([ROOT] * n), ()) for n in (1, 3)]
    both = pa.concat_tables([to_share([record]) for record in drawn])
    for index, record in enumerate(drawn):
        (found,) = from_table(from_share(both.slice(index, 1)))
        assert plain(found) == plain(record)


def tree_of(ticket: int, *verdicts: Verdict) -> TreeRecord:
    return replace(make_record(make_tree([ROOT] * len(verdicts)), verdicts), ticket=ticket)


def given_out(shares: Shares, *tickets: int) -> list[list[int]]:
    for ticket in tickets:
        shares.add(tree_of(ticket, Verdict.WRONG))
    return [[tree.ticket for tree in share] for share in shares.complete()]


def test_shares_come_in_the_order_of_their_learner_steps() -> None:
    shares = Shares(load(["gate.trees_per_step=4"]), size=2, first=8)
    assert given_out(shares, 9, 8) == [[9, 8]]
    # A redrawn tree is awaited, although the next step is complete.
    assert given_out(shares, 11, 14, 12, 13, 15) == []
    assert given_out(shares, 10) == [[11, 10], [14, 12], [13, 15]]
    assert given_out(shares, 16, 17, 18, 19) == [[16, 17], [18, 19]]


def test_a_step_none_of_whose_trees_has_come_holds_the_next_one_back() -> None:
    shares = Shares(load(["gate.trees_per_step=2"]), size=2, first=1)
    assert given_out(shares, 2, 3) == []
    assert given_out(shares, 0, 1) == [[0, 1], [2, 3]]


def test_a_tree_has_a_signal_if_any_group_is_kept() -> None:
    config = load([])
    right, wrong, errored = Verdict.CORRECT, Verdict.WRONG, Verdict.ERRORED
    assert has_signal(tree_of(0, right, wrong), config.learner)
    assert not has_signal(tree_of(0, right, right), config.learner)
    assert not has_signal(tree_of(0, right, wrong, errored), config.learner)
