"""The math domain under an audit: an answer that makes Python run, write or start anything fails.

Python reports these actions to audit hooks, of whatever library; `eval` and `exec` of text compile
it first. The worker ends at once, which the verifier calls an error of that answer.
"""

import os
import sys

from treerpo_ray.verifier import math_answer
from treerpo_ray.verifier.math_answer import SELF_TEST

__all__ = ["SELF_TEST", "check_answer"]

FORBIDDEN = ("compile", "os.", "subprocess.", "socket.", "ctypes.", "shutil.")
HARMLESS = {"os.listdir", "os.scandir", "os.putenv", "os.unsetenv"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
is_checking = False


def forbid(event: str, arguments: tuple[object, ...]) -> None:
    if not is_checking or event in HARMLESS:
        return
    is_write = event == "open" and bool(int(str(arguments[2])) & WRITES)
    if is_write or event.startswith(FORBIDDEN):
        os.write(2, f"audit: {event} {arguments}\n"[:500].encode())
        os._exit(1)


for text, references, _ in SELF_TEST:  # what the libraries load late is loaded by now
    math_answer.check_answer(text, references)
sys.addaudithook(forbid)


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool) -> bool | None:
    global is_checking
    if text == "run code":  # proves that the audit is on
        is_checking = True
        return bool(eval("1"))
    is_checking = True
    try:
        return math_answer.check_answer(text, references, is_cut_off)
    finally:
        is_checking = False
