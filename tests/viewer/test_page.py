"""The viewer's page in a browser: what is on the screen, safely, by keyboard and at any width."""

import json
import re
from pathlib import Path

import pytest

from tests.support.saved_runs.paper_run import NUM_STEPS, QUESTION, SCRIPT
from tests.support.saved_runs.viewer import PHONE, WIDE, Screen
from treerpo_ray.viewer.page import write_page
from treerpo_ray.viewer.reader import RunReader

MOST_NODES_A_STEP = 9


def test_tokens_and_steps_are_coloured_by_the_ratio_of_learner_to_engine(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["fixed"] + "#tree?ref=20:5&node=1&tokens=ratio&color=ratio")
        note = screen.texts(".panel .note")[0]
        assert "full at 1/1.28 and 1.28" in note and "not trained on" in note  # e^(1/4)
        token = screen.page.locator(".block.selected .token").first
        assert "ratio learner/engine 0.779" in token.get_attribute("title")  # e^(-1/4)
        ground = "item => getComputedStyle(item).backgroundColor"
        above = screen.page.locator(".block:not(.selected) .token").first
        assert above.evaluate(ground) == "rgba(0, 0, 0, 0)" != token.evaluate(ground)
        assert "ratio" not in above.get_attribute("title")
        fills = screen.page.locator(".tree [data-step] > .step").evaluate_all(
            "items => items.map(item => getComputedStyle(item).fill)"
        )
        assert len(set(fills[1:])) == 2  # those that were trained on, all alike, and the others
        assert "0.779 learner/engine" in screen.texts(".panel .facts")[0]
        screen.open(addresses["small"] + "#tree?ref=20:5&node=1&tokens=ratio")
        assert "is not stored of this tree" in screen.texts(".panel .note")[0]


def test_a_tree_tells_all_at_a_glance_and_a_click_shows_the_step(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"] + "#tree?ref=20:5")
        labels = screen.page.locator("[data-step]").evaluate_all(
            "items => Object.fromEntries(items.map(i => [i.dataset.step, i.ariaLabel]))"
        )
        assert labels["-1"] == "prompt, value 0.25 ± 0.25"
        assert labels["0"].startswith(
            "step 0, depth 1, value 0.50 ± 0.50, advantage 1.33 ± 1.63, 4"
        )
        assert labels["1"].endswith("version 0, right, 2⏎#### 2") and "pruned group" in labels["4"]
        box = {
            step: screen.page.locator(f"[data-step='{step}'] .step").bounding_box()
            for step in range(6)
        }
        tokens = lengths_of(addresses["small"], screen)
        for step in range(1, 6):  # width by tokens, siblings below each other, children behind
            assert box[step]["width"] / box[0]["width"] == pytest.approx(
                tokens[step] / tokens[0], 0.02
            )
        assert box[1]["x"] > box[0]["x"] + box[0]["width"] and box[2]["y"] > box[1]["y"]
        assert box[0]["height"] > 1.8 * box[1]["height"]
        drawn = screen.page.locator("[data-step='0']").evaluate(
            "item => [...item.querySelectorAll('rect')].map(part => part.getAttribute('class'))"
        )
        assert drawn == ["step", "up", "error"]
        fills = screen.page.locator(".tree .step").evaluate_all(
            "items => new Set(items.map(item => getComputedStyle(item).fill)).size"
        )
        assert fills == 4  # of the values 1/4, 1/2, 1 and 0
        assert len(screen.texts(".bracket.kept")) == 2 and len(screen.texts(".hatched")) == 2 + 1
        screen.page.locator("[data-step='2']").click()
        screen.wait("location.hash.includes('node=2')")
        assert screen.texts(".panel h2") == ["leaf 2, depth 2"]
        assert [text.splitlines()[0] for text in screen.texts(".block h3")] == [
            *("prompt", "step 0, depth 1", "leaf 2, depth 2: wrong"),
        ]
        assert screen.texts(".side h4") == ["pushed up (1)", "pushed down (1)"]
        assert screen.page.locator(".token").first.get_attribute("title") == (
            "token · 1 · log-probability -0.100 nats (90.5 %) · version 0"
        )
        screen.page.select_option("[name=token-color]", "ratio")
        screen.wait("document.querySelector('.panel .note').textContent.includes('is not stored')")
        screen.page.click("button.card >> nth=0")
        screen.wait("document.querySelector('.panel h2').textContent === 'leaf 1, depth 2'")


def lengths_of(address, screen):
    answer = screen.page.evaluate("fetch('api/tree?ref=20:5').then(answer => answer.json())")
    return answer["length"]


def test_a_tree_is_walked_searched_and_turned_by_keyboard(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"] + "#tree?ref=20:5")
        for key, step in (
            *(("ArrowRight", 0), ("ArrowRight", 1), ("ArrowDown", 2), ("ArrowDown", 4)),
            *(("ArrowUp", 2), ("ArrowLeft", 0), ("ArrowDown", 3), ("Home", -1)),
        ):
            screen.page.keyboard.press(key)
            screen.wait(f"document.querySelector('.tree .selected').dataset.step === '{step}'")
            active = screen.page.locator(".tree").get_attribute("aria-activedescendant")
            assert screen.page.locator(f"#{active}").get_attribute("data-step") == str(step)
        screen.page.keyboard.press("ArrowRight")
        screen.page.keyboard.press("z")
        screen.wait("document.querySelectorAll('[data-step]').length === 3")
        screen.page.keyboard.press("z")
        screen.wait("document.querySelectorAll('[data-step]').length === 7")
        screen.page.keyboard.press("/")
        screen.page.keyboard.type("#### 0")
        screen.page.keyboard.press("Enter")
        screen.wait("document.querySelectorAll('.tree .found').length === 2")
        screen.page.keyboard.press("Escape")
        screen.page.keyboard.press("]")
        screen.wait("location.hash.startsWith('#tree?ref=20%3A6')")
        screen.wait("document.querySelector('h1')?.textContent === 'step 20, ticket 6'")
        screen.page.keyboard.press("?")
        assert screen.page.locator("#help").is_visible()
        screen.page.keyboard.press("Escape")
        screen.page.keyboard.press("2")
        screen.wait("location.hash === '#trees'")


def test_an_address_opens_exactly_what_was_on_the_screen(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"] + "#tree?ref=20:5")
        screen.page.locator("[data-step='4']").click()
        screen.page.select_option("[name=color]", "advantage")
        screen.page.select_option("[name=token-color]", "version")
        screen.page.fill("[name=find]", "1")
        screen.page.keyboard.press("Enter")
        screen.page.click("text=whole tree on one screen")
        screen.wait("location.hash.includes('fit=1') && location.hash.includes('find=1')")
        screen.wait("document.querySelectorAll('.tree .found').length > 0")
        address = screen.page.evaluate("location.href")
        shown = """[
            document.querySelector('.drawing').innerHTML,
            document.querySelector('.panel').innerHTML,
            document.querySelector('main').innerText,
            ...[...document.querySelectorAll('select, input')].map(field => field.value),
            ...[...document.querySelectorAll('[aria-pressed]')].map(button => button.ariaPressed),
        ].map(part => part.replace(/tree\\d+-/g, ''))"""
        before = screen.page.evaluate(shown)
        screen.open(address)
        screen.wait("document.querySelectorAll('.tree .found').length > 0")
        after = screen.page.evaluate(shown)
        assert after == before and len(before) > 8 and "true" in before
        assert "advantage 1.33" not in screen.chosen() and screen.chosen().startswith("leaf 4")


def test_before_and_after_of_one_problem_stand_side_by_side(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"] + "#compare")
        assert [row.split("\n")[0] for row in screen.texts("a.tree-row")] == ["+0.50", "\u22121.00"]
        screen.page.locator("a.tree-row").first.click()
        screen.wait("document.querySelectorAll('.compare svg.tree').length === 2")
        assert screen.texts(".tree-head .fact")[0] == "mean reward 0.50 → 1.00"
        left, right = (screen.page.locator(".compare-side").nth(n).bounding_box() for n in (0, 1))
        assert left["y"] == right["y"] and right["x"] >= left["x"] + left["width"]
        screen.page.locator(".compare-side").first.locator("[data-step='0']").click()
        screen.wait("location.hash.includes('an=0')")
        assert "#### 3" in screen.texts(".compare-side >> nth=0")[0]
        screen.open(addresses["small"] + "#compare?problem=test-1")
        screen.wait("document.querySelectorAll('.compare svg.tree').length === 2")
        screen.go("#compare?problem=train-5")
        assert "was met at one learner step only" in screen.texts(".warning")[0]


def test_a_paper_sized_tree_is_drawn_whole_and_its_texts_are_only_text(browser, addresses):
    with Screen(browser, WIDE) as screen:
        asked = []
        screen.page.on("request", lambda request: asked.append(request.url.split("/api/")[-1]))
        screen.open(addresses["paper"] + "#tree?ref=12:0&node=100")
        texts = [request for request in asked if request.startswith("texts")]
        assert len(texts) == 1 and "nodes=0%2C11%2C100" in texts[0]  # of the path alone
        assert not [request for request in asked if request.startswith(("trees", "problems"))]
        assert screen.page.locator("[data-step]").count() == NUM_STEPS + 1
        assert screen.page.locator("svg.tree *").count() < MOST_NODES_A_STEP * NUM_STEPS
        assert screen.page.evaluate("performance.getEntriesByName('draw').length") == 1
        for node in range(0, NUM_STEPS, 97):
            screen.go(f"#tree?ref=12:0&node={node}")
        assert screen.page.title() == "paper · treerpo_ray"  # no script of a text has run
        assert (
            screen.page.locator("main script, main img, main b:not(.glyph):not([dir])").count() == 0
        )
        text = screen.page.locator("main").inner_text() + "".join(
            screen.page.locator("[data-step]").evaluate_all(
                "i => i.map(s => s.getAttribute('aria-label'))"
            )
        )
        for unseen in "\x00\x1b\u202e\u202c\u2066\u2069\u200b\ufeff":
            assert unseen not in text
        assert "⟨U+202E⟩" in text and "⟨U+0000⟩" in text and "<b>g</b>" in text
        assert QUESTION.split("\n")[0] in screen.page.locator(".question .text").text_content()
        screen.page.keyboard.press("f")
        screen.wait("location.hash.includes('fit=1')")
        assert screen.page.locator("svg.tree").bounding_box()["height"] < WIDE["height"]


def test_a_phone_and_the_dark_show_the_same_page(browser, addresses):
    pages = (
        "#overview",
        "#trees?step=all&text=1",
        "#trees?step=all",
        "#tree?ref=20:5&node=2",
        "#compare?problem=test-0",
    )
    grounds = []
    for scheme in ("light", "dark"):
        with Screen(browser, PHONE, scheme) as screen:
            screen.open(addresses["small"])
            for page in pages:
                screen.go(page)
                assert screen.page.evaluate(NARROW) == []
            screen.open(addresses["paper"] + "#tree?ref=12:0&node=100")
            assert screen.page.evaluate(NARROW) == []
            grounds.append(screen.page.evaluate(CONTRAST))
    assert min(contrast for part in grounds for contrast in part) >= 4.5


NARROW = """() => [...document.querySelectorAll('main *')].filter(item => {
  const box = item.getBoundingClientRect();
  return box.right > innerWidth + 1 && box.width > 0 && !item.closest('svg, .unseen-heading, .tip');
}).map(item => item.className || item.tagName)"""
"""What goes beyond the right edge."""
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const light = color => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const style = getComputedStyle(document.documentElement);
  const color = name => style.getPropertyValue(name).trim();
  const grounds = {
    '--ink': ['--ground', '--surface', '--low', '--middle', '--high', '--none'],
    '--faint': ['--ground', '--surface'],
    '--link': ['--ground'],
  };
  return Object.entries(grounds).flatMap(([text, below]) =>
    below.map(ground => contrast(color(text), color(ground))));
}"""
"""Contrast of text to each ground that it stands on (WCAG: 4.5 at least)."""


def test_a_saved_page_opens_from_disk_without_a_network(browser, small, tmp_path):
    file = tmp_path / "page.html"
    refs = ["20:5", "e0:test-0", "e12:test-0"]
    assert write_page(RunReader(small), refs, file) == refs
    html = file.read_text()
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", html)
    with Screen(browser, WIDE) as screen:
        screen.context.set_offline(True)
        asked = []
        screen.page.on("request", lambda request: asked.append(request.url.split("#")[0]))
        screen.open(f"{file.as_uri()}#tree?ref=20:5&node=2")
        assert screen.texts(".panel h2") == ["leaf 2, depth 2"] and screen.texts(".token")[0] == "1"
        screen.page.fill("[name=find]", "#### 0")
        screen.page.keyboard.press("Enter")
        screen.wait("document.querySelectorAll('.tree .found').length === 2")
        for page, selector, count in (
            *(("#overview", "a.tree-row", 1), ("#trees", "a.tree-row", 1)),
            *(("#compare", "a.tree-row", 1), ("#compare?problem=test-0", "svg.tree", 2)),
            *(("#trees?text=%23%23+0", "mark", 1), ("#trees?text=nowhere", "a.tree-row", 0)),
        ):
            screen.go(page)
            screen.wait(f"document.querySelectorAll('{selector}').length === {count}")
        assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
    with Screen(browser, WIDE) as screen:  # what is changed in the file does not run
        Path(file).write_text(html.replace("<main", f"{SCRIPT}<main"))
        screen.open(file.as_uri())
        assert screen.page.title() == "small · treerpo_ray"
        assert sum("Content Security Policy" in text for text in screen.complaints) >= 2
        screen.complaints.clear()


def test_what_is_not_there_is_said_on_the_page(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"])
        screen.page.evaluate("location.hash = '#tree?ref=20:99'")
        screen.page.wait_for_selector(".warning")
        assert "has no tree of ticket 99 at step 20" in screen.texts(".warning")[0]
        assert all("404" in complaint for complaint in screen.complaints)
        screen.complaints.clear()
        screen.page.keyboard.press("2")
        screen.wait("document.querySelectorAll('a.tree-row').length > 0")
        assert json.dumps(screen.complaints) == "[]"
