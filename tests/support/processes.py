"""Processes, and what is waited for of them."""

import time
from pathlib import Path

PATIENCE_S = 900.0
"""Far more than anything takes that is waited for."""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_dead(pids: list[int]) -> list[int]:
    """Those that live on, however long one waits."""
    end = time.monotonic() + PATIENCE_S
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return [pid for pid in pids if is_running(pid)]


def wait_for_file(path: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)
