"""Small pictures of the viewer, as the README shows them.

python -m tests.support.screenshots RUN FOLDER TREE PROBLEM

TREE (STEP:TICKET) is drawn, and PROBLEM shown before and after.
"""

import io
import sys
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image

from tests.support.viewer import chromium, served

SIZE = {"width": 1100, "height": 560}
NUM_COLORS = 48
MOST_BYTES = 60_000


def main(run: str, folder: str, tree: str, problem: str) -> None:
    """Write `curves.png`, `tree.png` and `before_and_after.png` into the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    fragments = {
        "curves": "#overview",
        "tree": f"#tree?{urlencode({'ref': tree, 'node': 0, 'fit': 1})}",
        "before_and_after": f"#compare?{urlencode({'problem': problem})}",
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


def small(picture: bytes) -> bytes:
    """A picture in few colours."""
    content = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(NUM_COLORS).save(
        content, "PNG", optimize=True
    )
    return content.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])
