"""The first page in a browser: a run that begins, what training fixed, curves."""

import json
import re
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from tests.support.saved_runs.small_run import (
    answers_to,
    save_trees,
    worked_record,
    write_small_run,
)
from tests.support.saved_runs.viewer import PROBLEMS, WIDE, Screen, served
from treerpo_ray.config import Config
from treerpo_ray.config.sections import RunConfig
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.viewer.page import write_page
from treerpo_ray.viewer.reader import RunReader

MOST_NODES, MOST_BYTES = 600, 190_000
"""Of the first page and all that it loads, uncompressed."""


def test_an_empty_run_says_what_will_come_and_then_shows_it(browser, tmp_path):
    config = Config(run=RunConfig(name="live", root=str(tmp_path)))
    folder = tmp_path / "live"
    folder.mkdir()
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    with served(str(folder)) as address, Screen(browser, WIDE) as screen:
        screen.open(address)
        assert screen.texts(".note") == [
            "No learner step is done yet: curves and trees appear here by themselves."
        ]
        screen.page.click("nav >> text=Before and after")
        screen.wait("document.querySelector('.note')?.textContent.startsWith('No problem')")
        run = RunFolder(str(folder))
        for step in (0, 6):
            run.publish_table(*answers_to(PROBLEMS[:2], step, [[f"#### {step // 3}"], ["#### 4"]]))
        screen.wait("document.querySelectorAll('a.problem-row').length === 2")  # by itself
        assert screen.texts("a.problem-row")[0].startswith("+1.00")
        screen.page.click("nav >> text=Trees")
        screen.wait("document.querySelector('.note')?.textContent.startsWith('No trees')")
        save_trees(folder, 1, [worked_record(3)])
        (folder / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "reward/mean": 0.25}\n')
        screen.wait("document.querySelectorAll('a.tree-row').length === 1")  # by itself
        assert "step 1 of 100" in screen.texts("#run-state")[0]
        screen.page.keyboard.press("1")
        screen.wait("document.querySelectorAll('.curve canvas').length === 1")
        save_trees(folder, 2, [worked_record(4), worked_record(5)])
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "time": 2.0, "reward/mean": 0.5, "loss/total": 0.1}\n')
        screen.wait("document.querySelectorAll('.curve canvas').length === 2")
        screen.wait("document.querySelectorAll('.newest a.tree-row').length === 2")
        assert screen.texts(".change a.tree-row")[0].startswith("+1.00")


def test_what_training_fixed_stands_first_and_one_click_shows_it(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["fixed"])
        assert screen.texts("h2")[0].startswith("Mistakes that training fixed")
        assert screen.texts(".change .note")[0].startswith(
            "Of 2 held-out problems, asked at learner steps 0 and 12 (4 sampled answers each), 1 "
            "were mostly wrong and are mostly right now, 0 the other way round."
        )
        rows = screen.page.locator(".change a.tree-row")
        assert rows.count() == 1 and "1+1=?" in rows.first.inner_text()
        rows.first.click()
        screen.wait("document.querySelectorAll('.compare-side .block.selected').length === 2")
        before, after = screen.texts(".compare-side .block.selected")
        assert "wrong" in before and "#### 3" in before
        assert "right" in after and "#### 2" in after


def test_the_first_page_asks_for_little_however_many_trees_there_are(browser, tmp_path):
    folder = write_small_run(tmp_path)
    for step in range(100, 140):
        save_trees(folder, step, [replace(worked_record(5), ticket=n) for n in range(10)])
    with served(folder) as address, Screen(browser, WIDE) as screen:
        answers = []
        screen.page.on("response", lambda answer: answers.append(answer))
        screen.open(address)
        screen.wait("document.querySelectorAll('.curve canvas').length > 5")
        asked = sorted(answer.url.removeprefix(address) for answer in answers)
        told = sum(len(answer.body()) for answer in answers)
        assert [own for own in asked if own.startswith("api/")] == [
            *("api/change?", "api/curves?", "api/status?", "api/trees?step=139"),
        ]
        assert told < MOST_BYTES
        assert screen.page.locator("body *").count() < MOST_NODES


def test_curves_have_the_evaluations_intervals(browser, addresses):
    with Screen(browser, WIDE) as screen:
        screen.open(addresses["small"])
        captions = screen.texts(".curve figcaption")
        assert "Pass@1 on held-out problems" in captions[1]
        assert re.search(r"\d+\.\d % \[\d+\.\d %, \d+\.\d %\]$", captions[1].replace("\n", " "))
        assert len(screen.texts("a.tree-row")) == 2
        screen.page.locator(".curve .u-over").first.click(position={"x": 200, "y": 40})
        screen.wait("location.hash.startsWith('#trees?step=')")


def test_trees_that_are_not_mixed_are_in_no_list_of_mixed_ones(browser, tmp_path):
    """Two of three are all wrong; then all of them."""
    folder, mixed = write_small_run(tmp_path), worked_record(5)
    alike = [replace(worked_record(ticket), verdicts=(mixed.verdicts[1],) * 4) for ticket in (6, 7)]
    save_trees(folder, 20, [*alike, mixed])
    assert write_page(RunReader(folder), [], tmp_path / "mixed.html")[:1] == ["20:5"]
    with served(folder) as address, Screen(browser, WIDE) as screen:
        screen.open(address)
        screen.wait("document.querySelectorAll('.newest a.tree-row').length === 1")
        assert screen.texts(".newest .note") == ["1 of 3 trees has both right and wrong answers."]
        save_trees(folder, 21, alike)
        screen.open(address)
        screen.wait("document.querySelector('.newest h2')?.textContent.includes('step 21')")
        assert screen.page.locator(".newest a.tree-row").count() == 0
        assert screen.texts(".newest .note") == [
            "None of 2 trees has both right and wrong answers."
        ]
    assert write_page(RunReader(folder), [], tmp_path / "alike.html")[:2] == ["21:6", "21:7"]


def test_what_is_said_of_each_line_has_the_colour_of_the_line(browser, tmp_path):
    folder = write_small_run(tmp_path)
    shares = {"idle/engines_share": 0.1, "idle/scoring_share": 0.9, "idle/learner_share": 0.4}
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        for step in (13, 14):
            row = {"step": step, "time": 1.0, "reward/mean": 0.5} | shares
            file.write(json.dumps(row) + "\n")
    with served(folder) as address, Screen(browser, WIDE) as screen:
        screen.open(address)
        idle = screen.page.locator(".curve", has_text="idle time")
        told = "engines 10.0 %, scoring 90.0 %, learner 40.0 %"
        assert idle.locator("output").inner_text() == told
        grounds = "items => items.map(item => getComputedStyle(item).backgroundColor)"
        colors = idle.locator(".key").evaluate_all(grounds)
        assert len(set(colors)) == 3 and "rgba(0, 0, 0, 0)" not in colors
        keys = [tuple(map(int, re.findall(r"\d+", color))) for color in colors]
        drawn = idle.locator("canvas").evaluate(COLORS_DRAWN)
        for key in keys:  # edges of a thin line are mixed with the ground
            assert min(max(abs(a - b) for a, b in zip(key, own, strict=True)) for own in drawn) < 30


COLORS_DRAWN = """canvas => {
  const copy = Object.assign(document.createElement('canvas'), {
    width: canvas.width, height: canvas.height,
  }).getContext('2d', { willReadFrequently: true });  // else the browser warns
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  const found = new Set();
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] === 255) found.add(data.slice(i, i + 3).join());
  return [...found].map(color => color.split(',').map(Number));
}"""
"""Those of the points of a canvas that nothing shines through."""
