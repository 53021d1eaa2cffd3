"""Tree stream: a share holds whole trees and gives them back."""

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.algo.trees import make_tree
from tests.test_records import make_record, plain, records
from treerpo_ray.algo.tree import ROOT
from treerpo_ray.records import SCHEMA, TreeRecord, from_table
from treerpo_ray.tree_stream import from_share, to_share


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
