"""A reward for code: the share of a row's tests that the last Python block of an answer passes.

    python jobs/train.py conf/quickstart.yaml verifier.check=conf/rewards/unit_tests.py ...

The column `tests` of the data set has lines of Python that must run after the code. A check that is
a plain `def` has no network, and what it starts is killed with it when its time is up; it reads and
writes as you, so that code of a stranger's model belongs into a container all the same.
"""

import re
import secrets
import subprocess
import sys


def check_answer(text, row):
    """Share of the tests that pass; None without a block of code."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if not blocks:
        return None
    return sum(passes(blocks[-1], test) for test in row["tests"]) / len(row["tests"])


def passes(code, test):
    """Whether the test comes to its end; the code cannot know the word that says so."""
    done = secrets.token_hex()
    program = f"{code}\n{test}\nprint('{done}')"
    command = ["timeout", "2", sys.executable, "-I", "-c", program]
    return done in subprocess.run(command, capture_output=True, text=True).stdout


SELF_TEST = [
    {"text": "```python\nx = 1\n```", "row": {"tests": ["assert x == 1", "y"]}, "expected": 0.5},
    {"text": "```python\nexit()\n```", "row": {"tests": ["pass"]}, "expected": 0},
    {"text": "x = 1", "row": {"tests": ["pass"]}, "expected": None},
]
