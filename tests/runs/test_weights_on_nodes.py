"""Weights lie on the learner's node, outlive the learner, and move with it: on real Ray nodes."""

import json
import subprocess
import sys

import pytest

from tests.support.project import PROJECT


@pytest.mark.ray
def test_weights_lie_where_the_learner_is_and_their_loss_is_told() -> None:
    """See `weights_on_nodes`: the engines' pool is on the driver's node, they on their own."""
    command = [sys.executable, "-m", "tests.support.stages.weights_on_nodes"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "GPUs of two engines of two": ["0,1", "2,3"],
        "its node's store has the learner's file": True,
        "stores elsewhere": 0,  # before an engine there asks
        "learner killed": "whole",
        "the engines' store is one": 1,
        "old versions spilled": 0,  # they are let go as the next ones come
        "engines' store killed": "whole",
        "learner's store killed, with the bytes brought": "whole",
        "learner's store killed before": "lost",
        "published after that": "whole",  # by the same learner, as if nothing had been
        "node lost": "lost",
        "published for a lost node": "RayTaskError(ActorUnschedulableError)",  # and not waited for
        "moved with the learner": 1,
        "published from another node": "whole",
        "nodes that are alike": 2,
        "nodes that differ": True,
        "one node that differs from the driver's": True,
        "a node that was compared": None,
        "a later one that is alike": None,
        "a later one that differs": True,
        "an engine on one that differs": True,
    }
