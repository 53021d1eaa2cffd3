"""The script that drains a node whose machine goes: metadata services and `ray` are stand-ins."""

import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType

import pytest
from ray.scripts.scripts import drain_node

from tests.support.project import load_script

NODE_ID = "eb85e68d534ed6789ee1b78f6feb2d2b3b37f1b04676b8d99a46445a"
AWS = "/latest/meta-data/spot/instance-action"
GCP = "/computeMetadata/v1/instance/preempted"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    return load_script("jobs/cluster/drain.py")


@pytest.fixture
def drain(script, monkeypatch, tmp_path) -> Callable[..., None]:
    """What it does, on a machine with one raylet, which ends when `ray` is called."""
    raylet = (
        "/lib/ray/core/src/ray/raylet/raylet",
        f"--node_id={NODE_ID}",
        "--agent=x --node_id=y",
    )
    worker = ("python", "worker.py", "--node_id=other")
    for pid, words in (("12", raylet), ("13", worker), ("14", ())):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_text("\0".join(words))
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/calls\nrm -r {tmp_path}/12\n')
    ray.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ray.parent}:/usr/bin:/bin")
    return partial(script.drain, processes=tmp_path, poll_s=0.02)


@pytest.fixture
def metadata(monkeypatch):
    """A metadata service: its address, what it answers by path, and the requests that it has
    seen."""
    answers: dict[str, str] = {}
    seen: list[tuple[str, str]] = []

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.command, self.path))
            needs = ("X-aws-ec2-metadata-token", "T") if self.path == AWS else None
            needs = ("Metadata-Flavor", "Google") if self.path == GCP else needs
            allowed = needs is None or self.headers[needs[0]] == needs[1]
            self.reply(answers.get(self.path) if allowed else None)

        def do_PUT(self) -> None:
            seen.append((self.command, self.path))
            has_ttl = int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
            self.reply("T" if self.path == "/latest/api/token" and has_ttl else None)

        def reply(self, text: str | None) -> None:
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # it is not for this address
        yield f"http://127.0.0.1:{server.server_port}", answers, seen
        server.shutdown()


def drained(folder) -> dict[str, object]:
    """What the installed Ray makes of the arguments that its stand-in was called with."""
    command, *arguments = (folder / "calls").read_text().splitlines()
    assert command == drain_node.name
    return drain_node.make_context(command, arguments).params


@pytest.mark.parametrize(
    ("where", "path", "before", "notice"),
    [
        ("aws", AWS, None, '{"action": "terminate", "time": "2026-11-26T08:22:00Z"}'),
        ("gcp", GCP, "FALSE", "TRUE"),
    ],
)
def test_a_machine_is_drained_once_its_cloud_gives_notice(
    script, drain, metadata, tmp_path, where, path, before, notice
) -> None:
    address, answers, seen = metadata
    if before:
        answers[path] = before
    work = partial(drain, where, script.NOTICE_S[where], metadata=address)
    waiting = threading.Thread(target=work, daemon=True)
    waiting.start()
    while [asked for _, asked in seen].count(path) < 3:
        time.sleep(0.01)
    assert not (tmp_path / "calls").exists()
    answers[path] = notice
    waiting.join(timeout=900)
    assert not waiting.is_alive()
    params = drained(tmp_path)
    assert params["node_id"] == NODE_ID
    assert params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert params["deadline_remaining_seconds"] == script.NOTICE_S[where]


def test_no_notice_is_taken_from_a_metadata_service_that_is_not_there(script) -> None:
    nowhere = "http://127.0.0.1:1"
    assert not script.is_noticed("aws", nowhere) and not script.is_noticed("gcp", nowhere)


def test_a_pod_is_drained_at_once_and_waits_until_its_node_has_ended(drain, tmp_path) -> None:
    drain("pod", 3600)  # longer than a test may take
    assert drained(tmp_path)["node_id"] == NODE_ID


def test_a_pod_without_a_node_ends_and_one_that_is_not_drained_in_time_does_too(
    drain, tmp_path
) -> None:
    (tmp_path / "bin/ray").write_text("#!/bin/sh\nexit 1\n")
    drain("pod", 1)
    shutil.rmtree(tmp_path / "12")
    (tmp_path / "bin/ray").unlink()
    drain("pod", 1)
