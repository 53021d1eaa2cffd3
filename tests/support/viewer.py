"""The viewer served and looked at: a server in a thread, and Debian's Chromium."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from treerpo_ray.viewer.__main__ import bind
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.server import HOST, make_app

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@contextmanager
def served(place: str) -> Iterator[str]:
    """Address of the page of a run."""
    listening = bind(HOST, 0)
    server = uvicorn.Server(uvicorn.Config(make_app(RunReader(place)), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://{HOST}:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Debian's browser, with a folder of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()
