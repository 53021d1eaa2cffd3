"""The search in the answers of all trees."""

from dataclasses import replace

from tests.support.small_run import save_trees, worked_record, write_small_run
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.search import AFTER, BEFORE


def test_a_search_finds_the_answers_of_all_trees_that_have_a_text(ask, tmp_path):
    (found,) = ask("search", step=20, text="#### 0")
    assert found == {
        **{"ticket": 5, "num_answers": 2, "leaf": 4},
        **{"before": "", "text": "#### 0", "after": ""},
    }
    assert ask("search", step=20, text="#### 9") == ask("search", step=999, text="#### 0") == []
    folder = write_small_run(tmp_path)
    long = replace(
        worked_record(7), leaf_texts=("x", "so " * 90 + "IT IS.*" + " end" * 90, "x", "y")
    )
    save_trees(folder, 21, [long, worked_record(5, finished_at_s=1.0)])
    save_trees(folder, 21, [replace(worked_record(5), leaf_texts=("it is.*",) * 4)])
    (found,) = RunReader(folder).search(21, "it is.*")  # ticket 5 was done once more
    assert (found.ticket, found.num_answers, found.leaf, found.text) == (7, 1, 2, "IT IS.*")
    assert (len(found.before), len(found.after)) == (BEFORE, AFTER)
    assert found.before.endswith("so so ") and found.after.startswith(" end end")
