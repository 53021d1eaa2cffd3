"""Hub: no connection is found out once, and an id that does not exist is told as such."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import datasets
import pytest
from huggingface_hub import constants

from treerpo_ray.config.data import PromptsConfig
from treerpo_ray.config.sections import ModelConfig
from treerpo_ray.preflight.model_check import check_model
from treerpo_ray.prompts.hub import Unreachable, offline_because
from treerpo_ray.prompts.problems import load_problems
from treerpo_ray.prompts.prompt_set import load_tokenizer


class Hub(BaseHTTPRequestHandler):
    """Holds nothing, and says so as Hugging Face does; `someone/gated` has terms."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        Hub.asked.append(self.path)
        if self.path == "/":
            self.send_response(200)
        elif "gated" in self.path:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """It is quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """A Hub on this machine that is asked, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    place = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, place)
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    Hub.asked.clear()
    offline_because.cache_clear()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    offline_because.cache_clear()


def test_an_id_that_does_not_exist_is_told_from_a_missing_connection(hub) -> None:
    told = r"^model\.path=someone/modle: there is nothing of that name at Hugging Face, or it is p"
    for look in (
        lambda: check_model(ModelConfig(path="someone/modle"), longest=9),
        lambda: load_tokenizer("someone/modle", trust_remote_code=False),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            look()
        assert not isinstance(caught.value, Unreachable)
    with pytest.raises(ValueError, match=r"^model\.path=someone/gated: its terms must be accepted"):
        load_tokenizer("someone/gated", trust_remote_code=False)
    assert Hub.asked.count("/") == 1


def test_without_an_answer_nothing_more_is_asked_by_this_process_or_those_it_starts(
    hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.shutdown()
    hub.server_close()
    told = "there is no connection to Hugging Face, and its cache here does not hold it"
    with pytest.raises(Unreachable, match=rf"^model\.path=someone/model: {told}"):
        check_model(ModelConfig(path="someone/model"), longest=9)
    with pytest.raises(Unreachable, match=rf"^model\.path=someone/model: {told}"):
        load_tokenizer("someone/model", trust_remote_code=False)
    with pytest.raises(Unreachable, match=rf"^prompts\.path=someone/set: {told}"):
        load_problems(PromptsConfig(path="someone/set"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not any("Retrying" in record.getMessage() for record in caplog.records)
