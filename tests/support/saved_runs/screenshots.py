"""Small pictures of the viewer, as the README shows them.

python -m tests.support.saved_runs.screenshots RUN FOLDER

Of the run's trees that is drawn which has most to show, and of the problems that training fixed the
first.
"""

import io
import sys
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image

from tests.support.saved_runs.viewer import chromium, served
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.tree_list import TreeSummary

SIZE = {"width": 1200, "height": 600}
NUM_COLORS = 160
MOST_BYTES = 120_000


def main(run: str, folder: str) -> None:
    """Write `overview.png`, `tree.png` and `before_and_after.png` into the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    reader = RunReader(run)
    change = reader.change()
    assert change is not None and change.fixed, f"{run} has fixed no mistake in its evaluations"
    before, after = change.fixed[0].refs
    shown = max(
        (tree for step in reader.status().tree_steps for tree in reader.trees(step)),
        key=most_to_show,
    )
    fragments = {
        "overview": "#overview",
        "tree": f"#tree?{urlencode({'ref': f'{shown.step}:{shown.ticket}', 'node': 0, 'fit': 1})}",
        "before_and_after": f"#compare?{urlencode({'a': before, 'b': after})}",
    }
    with served(run) as address, chromium() as browser:
        for name, fragment in fragments.items():
            page = browser.new_page(viewport=SIZE, color_scheme="light")
            page.goto(address + fragment)
            page.wait_for_selector("#main[data-shown] :is(.curve canvas, .block)")
            page.wait_for_load_state("networkidle")
            file = Path(folder, f"{name}.png")
            file.write_bytes(small(page.screenshot()))
            print(f"{file}: {file.stat().st_size} bytes")
            assert file.stat().st_size < MOST_BYTES
            page.close()


def most_to_show(tree: TreeSummary) -> tuple[bool, int, int, float]:
    """Order of trees: with kept groups and pruned ones, as many as may be, about half of it right;
    a tree without a value comes last."""
    kept, pruned = tree.groups["kept"], tree.groups["pruned"]
    return tree.value == tree.value, min(kept, pruned), kept, -abs(tree.value - 0.5)


def small(picture: bytes) -> bytes:
    """A picture in few colours."""
    content = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(NUM_COLORS).save(
        content, "PNG", optimize=True
    )
    return content.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])
