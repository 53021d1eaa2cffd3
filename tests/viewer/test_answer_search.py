"""The search in the answers of all trees."""

from dataclasses import replace

from tests.support.saved_runs.small_run import save_trees, worked_record, write_small_run
from tests.support.saved_runs.viewer import WIDE, Screen
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.search import AFTER, BEFORE


def test_a_search_finds_the_answers_of_all_trees_that_have_a_text(ask, tmp_path):
    (found,) = ask("search", step=20, text="#### 0")
    assert found == {
        **{"ticket": 5, "num_answers": 2, "leaf": 4},
        "passage": {"before": "", "text": "#### 0", "after": ""},
    }
    assert ask("search", step=20, text="#### 9") == ask("search", step=999, text="#### 0") == []
    folder = write_small_run(tmp_path)
    long = replace(
        worked_record(7), leaf_texts=("x", "so " * 90 + "IT IS.*" + " end" * 90, "x", "y")
    )
    save_trees(folder, 21, [long, worked_record(5, finished_at_s=1.0)])
    save_trees(folder, 21, [replace(worked_record(5), leaf_texts=("it is.*",) * 4)])
    (found,) = RunReader(folder).search(21, "it is.*")  # ticket 5 was done once more
    assert (found.ticket, found.num_answers, found.leaf) == (7, 1, 2)
    passage = found.passage
    assert (len(passage.before), passage.text, len(passage.after)) == (BEFORE, "IT IS.*", AFTER)
    assert passage.before.endswith("so so ") and passage.after.startswith(" end end")


def test_a_search_finds_the_answers_of_evaluations_that_have_a_text(ask):
    (found,) = ask("search_answers", step=0, text="#### 2")
    assert found == {
        **{"step": 0, "problem": "test-0", "question": "1+1=?", "reference": "2", "total": 2},
        **{"num_answers": 1, "leaf": 1, "verdict": "correct"},
        "passage": {"before": "", "text": "#### 2", "after": ""},
    }
    all_found = ask("search_answers", step=0, text="####")
    assert [own["problem"] for own in all_found] == ["test-0", "test-1", "only-once"]
    assert ask("holding", ref="e0:test-0", text="#### 2") == [1]  # the leaf of the tree shown
    assert ask("search_answers", step=6, text="#### 2") == []


def test_answers_of_evaluations_stand_below_the_trees_that_were_found(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"])
        screen.search("#### 2")
        screen.wait("document.querySelectorAll('a.answer-row').length === 2")
        assert screen.texts(".evaluated .note") == [
            "2 held-out problems of the evaluations at learner steps 12, 0 have it in an answer"
        ]
        newest, first = screen.texts("a.answer-row")
        assert newest.startswith("step 12") and "2 of 2 answers, the first right: #### 2" in newest
        assert first.startswith("step 0") and "1 of 2 answers, the first right: #### 2" in first
        screen.page.locator("a.answer-row").nth(1).click()
        screen.wait("document.querySelectorAll('.tree .found').length === 1")
        assert screen.chosen().startswith("leaf 1")
