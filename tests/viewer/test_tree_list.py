"""The list of trees: what it tells, filters and finds."""

from tests.support.saved_runs.small_run import save_trees, worked_record, write_small_run
from tests.support.saved_runs.viewer import WIDE, Screen, served


def test_the_list_of_trees_tells_the_same_without_tokens(ask, folder):
    (line,) = ask("trees", step=20)
    assert line == {
        **{"step": 20, "ticket": 5, "prompt_id": "train-5", "question": "1+1=?", "answer": "2"},
        **{"value": 0.25, "se": 0.25, "num_steps": 6, "depth": 2},
        "num_tokens": sum(ask("tree", ref="20:5")["length"]),
        "groups": {"kept": 2, "pruned": 1, "errored": 0},
        "verdicts": {"correct": 1, "wrong": 3},
    }
    assert [line["ticket"] for line in ask("trees", step=11)] == [0, 1, 2, 3]
    assert ask("trees", step=999) == []
    for line in ask("trees", step=11):
        tree = ask("tree", ref=f"11:{line['ticket']}")
        assert (line["value"], line["se"]) == (tree["root_value"], tree["root_se"])
        assert line["groups"] == tree["groups"]


def test_answers_of_all_trees_are_searched_from_any_page_by_keyboard(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"])
        screen.search("#### 0")
        screen.wait("document.querySelectorAll('a.tree-row .found-text').length === 2")
        assert screen.texts(".told .note") == [
            "2 of 10 trees of 3 learner steps have “#### 0” in an answer"
        ]
        assert screen.texts(".found-text mark") == ["#### 0"] * 2
        assert screen.texts(".found-text")[0] == "2 answers: #### 0"
        assert not screen.page.locator("text=stop").is_visible()
        screen.page.keyboard.press("ArrowDown")
        screen.page.keyboard.press("Enter")
        screen.wait("document.querySelectorAll('.tree .found').length === 2")
        assert screen.chosen().startswith("leaf 4")
        screen.go("#trees?text=no+such")  # of the newest step, which is offered to be of all
        assert screen.texts(".told .note")[0].startswith("0 of 2 trees of learner step 20 have")
        screen.page.click("text=search all 3 steps")
        screen.wait("document.querySelector('.told').innerText.startsWith('0 of 10 trees')")
        screen.open(addresses["paper"] + "#trees?step=all&text=onerror")
        assert screen.page.locator(".found-text mark").count() == 2
        assert screen.page.locator("main script, main img").count() == 0
        assert screen.page.title() == "paper · treerpo_ray"


def test_a_search_of_many_steps_can_be_stopped_and_goes_on_where_it_was(browser, tmp_path):
    folder = write_small_run(tmp_path)
    for step in range(31, 41):
        save_trees(folder, step, [worked_record(step)])
    held = []
    with served(folder) as address, Screen(browser, WIDE) as screen:
        silent = "**/api/search?step=35*"  # its answer does not come
        screen.page.route(silent, lambda route: held.append(route))
        screen.open(address)
        screen.page.evaluate("location.hash = '#trees?step=all&text=%23%23'")
        screen.wait("document.querySelector('.told')?.innerText.includes('reading 5 more')")
        screen.page.click("text=stop")
        assert "7 of 7 trees of 7 learner steps" in screen.texts(".told .note")[0]
        assert "stopped before 5 more" in screen.texts(".told .note")[0]
        screen.page.unroute(silent)
        screen.page.select_option("[name=order]", "ticket")
        screen.wait("document.querySelector('.told').innerText.includes('of 12 learner steps')")


def test_the_list_is_filtered_by_all_that_is_asked(browser, addresses):
    def count(screen):
        return int(screen.texts(".note")[0].split()[0])

    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"] + "#trees?step=all")
        everything = count(screen)
        assert everything == 10
        found = {}
        for query in (
            *("q=train-6", "q=no-such", "min=0.3", "max=0.2", "se=0.24", "depth=3", "depth=2"),
            *("groups=kept", "groups=none", "verdict=correct", "verdict=cut_off", "step=20"),
        ):
            base = "#trees?" + ("" if query.startswith("step") else "step=all&")
            screen.go(base + query)
            found[query] = count(screen)
        assert found["q=train-6"] == found["step=20"] == 2 and found["depth=2"] == everything
        assert found["q=no-such"] == found["depth=3"] == found["verdict=cut_off"] == 0
        assert found["min=0.3"] + found["max=0.2"] <= everything - 2 and found["se=0.24"] >= 2
        assert found["groups=kept"] + found["groups=none"] == everything
        screen.page.fill("[name=q]", "train-6")
        screen.wait("document.querySelectorAll('a.tree-row').length === 1")
        screen.wait("location.hash.includes('q=train-6')")
        screen.page.keyboard.press("Escape")
        screen.page.keyboard.press("ArrowDown")
        screen.page.keyboard.press("Enter")
        screen.wait("location.hash === '#tree?ref=20:6'")
        screen.page.go_back()
        screen.wait("document.querySelectorAll('a.tree-row').length === 1")


def test_of_a_long_list_as_much_is_drawn_as_is_asked_for(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["many"] + "#trees")
        assert screen.texts(".note") == ["250 of 250 trees of learner step 30"]
        for shown in (100, 200, 250):
            assert screen.page.locator("a.tree-row").count() == shown
            if shown < 250:
                screen.page.click("text=show more")
        assert not screen.page.locator("text=show more").is_visible()
