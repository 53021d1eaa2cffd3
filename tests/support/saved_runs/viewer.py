"""The viewer served and looked at: a server in a thread, and Debian's Chromium."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.testclient import TestClient

from treerpo_ray.viewer.__main__ import bind
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.server import HOST, make_app

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
WIDE, PHONE = {"width": 1300, "height": 850}, {"width": 390, "height": 800}
PROBLEMS = (("test-0", "1+1=?", "2"), ("test-1", "2+2=?", "4"), ("only-once", "3+3=?", "6"))
"""Id, question and right result."""
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


def client_of(place: str, host: str = "127.0.0.1:8300") -> TestClient:
    """A client of a run's server, which it knows under that name."""
    return TestClient(make_app(RunReader(place)), base_url=f"http://{host}")


class Screen:
    """A tab of the browser, which fails at its end if the page complained of anything."""

    def __init__(self, browser, size, scheme="light"):
        self.context = browser.new_context(
            viewport=size, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.complaints = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", self.note_failure)

    def open(self, address):
        self.page.goto("about:blank")  # so that another fragment is another page, too
        self.page.goto(address)
        self.page.wait_for_selector("#main[data-shown]")

    def go(self, fragment):
        """To another fragment of the page that is open."""
        self.page.evaluate(
            "go => { delete document.querySelector('main').dataset.shown; location.hash = go; }",
            fragment,
        )
        self.page.wait_for_selector("#main[data-shown]")

    def note_failure(self, request):
        if request.failure != "net::ERR_ABORTED":  # of a page that was left
            self.complaints.append(f"{request.url}: {request.failure}")

    def wait(self, expression):
        deadline = time.monotonic() + 600
        while not self.page.evaluate(expression):  # not in the page, whose policy allows no eval
            assert time.monotonic() < deadline, f"{expression}: {self.page.content()[-3000:]}"
            time.sleep(0.02)

    def search(self, text):
        """By keyboard, in all answers."""
        self.page.keyboard.press("s")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def texts(self, selector):
        return self.page.locator(selector).all_inner_texts()

    def chosen(self):
        return self.page.locator(".tree .selected").get_attribute("aria-label")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if error is None:
                assert self.complaints == []
                assert self.page.evaluate(
                    "document.documentElement.scrollWidth <= window.innerWidth"
                ), "the page is wider than the screen"
        finally:
            self.context.close()
