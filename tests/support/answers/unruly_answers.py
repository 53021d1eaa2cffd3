"""A domain whose answers are commands to misbehave, for the tests of the verifier's pool."""

import ctypes
import os
import re
import resource
import sys
import time
from pathlib import Path

HOARD: list[bytes] = []

print("the worker's standard output goes nowhere")

SELF_TEST = (("right", ("right",), True), ("left", ("right",), False), ("", ("right",), None))


def tell(file: str) -> None:
    """Append the process id to a file, if one is named."""
    if file:
        with open(file.strip(), "a") as pids:
            pids.write(f"{os.getpid()}\n")


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool) -> bool | None:
    if text == "sleep":
        time.sleep(3600)
    elif text.startswith("hang in C"):
        tell(text.removeprefix("hang in C"))
        ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock
    elif text == "backtrack":
        re.match(r"(a+)+$", "a" * 64 + "b")
    elif text == "hog":
        hoard = [bytes(2**24)]
        while True:
            hoard.append(bytes(2**24))  # zeros that are never touched: quick on a busy machine too
    elif text == "grow":
        HOARD.append(bytes(2**24))
        return True
    elif text == "raise":
        raise ValueError("a fault of the domain")
    elif text == "recurse":
        check_answer(text, references, is_cut_off)
    elif text == "abort":
        os.abort()
    elif text == "exit":
        sys.exit(3)
    elif text == "core":
        return resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
    elif text == "stdin":
        return sys.stdin.read() == ""
    elif text.startswith("write pid"):
        tell(text.removeprefix("write pid"))
    elif text.startswith("meet"):
        file = text.removeprefix("meet")
        tell(file)
        while len(set(Path(file.strip()).read_text().split())) < 2:
            time.sleep(0.01)
        return True
    return text == references[0] if text else None
