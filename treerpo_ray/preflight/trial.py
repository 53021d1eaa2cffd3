"""Trial: the user's own code is tried before anything is started.

A check is imported by a process of its own and grades its `SELF_TEST`; an advantage form and a
pruning rule are tried on a small tree. What fails is one line with the user's own traceback.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from treerpo_ray.algo.advantages.errors import advantage_errors
from treerpo_ray.algo.advantages.forms import step_advantages
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import Pruning
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree
from treerpo_ray.config.files import PACKAGE
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.config.verifier import VerifierConfig
from treerpo_ray.errors import UserCodeError, one_line
from treerpo_ray.scoring import make_verifiers
from treerpo_ray.user_code import file_hint, is_file, is_here, is_module, readable, with_checksum

TRUST = "--trust-run"
"""Option of an evaluation with which it runs the code that a run brings along."""
PARENTS = (ROOT, ROOT, 0, 0, 0, 1, 1, 1)
"""Two steps with three leaves each below them: where there are as many groups as children, a form
that mixes up the two would not be found out."""
REWARDS = (
    (np.nan, np.nan, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0),
    (np.nan, np.nan, 0.5, 0.25, 0.75, 0.0, 0.0, 0.0),
    (np.nan, np.nan, 1.0, np.nan, 1.0, 0.0, 1.0, 0.0),
)
"""Right and wrong; with partial credit; with a leaf that has no verdict."""


def own_checks(settings: VerifierConfig) -> list[str]:
    """The checks that are not of this package."""
    return [name for name in settings.weights if not name.startswith(f"{PACKAGE}.")]


def try_checks(settings: VerifierConfig) -> bool:
    """Have each check that is not of this package grade its `SELF_TEST`.

    Returns:
        Whether one of them asks for rows of the data set.

    Raises:
        ValueError: there is no such module; `UserCodeError` if a check cannot be used.
    """
    for name in settings.weights:
        if not is_file(name) and not is_module(name):
            raise ValueError(f"verifier.check={name}: no such module{file_hint(name)}")
    if not own_checks(settings):
        return False
    with ExitStack() as ending:
        told: list[str] = []
        verifiers = [
            ending.enter_context(each)
            for each in make_verifiers(settings, num_workers=1, on_fault=told.append)
        ]
        for verifier in verifiers:
            try:
                verifier.self_test()
            except RuntimeError as error:
                raise UserCodeError(one_line(error)) from error
        return any(verifier.wants_row for verifier in verifiers)


def code_lines(settings: VerifierConfig, run: str, *, trusts_run: bool) -> list[str]:
    """What of the user's code will grade, and where it is from, a line each.

    The configuration of a run brings the source of its checks along. Somebody else's is not run
    unasked: it counts as the user's own where the file that it names is here and the same.

    Args:
        settings: Name the checks.
        run: What is evaluated, for messages.
        trusts_run: Whether the code that it brings may be run.

    Raises:
        UserCodeError: it brings code that is not here; with that code, to be read.
    """
    lines = []
    for name in own_checks(settings):
        shown, source = with_checksum(name, settings.sources), settings.sources.get(name)
        if not is_file(name):
            lines.append(f"graded by the module {name}, as it is installed here")
        elif source is None or is_here(name, source):
            lines.append(f"graded by {shown}, which is {Path(name).expanduser().absolute()}")
        elif trusts_run:
            lines.append(f"graded by {shown}, whose code {run} brings along")
        else:
            here = "unlike the file here" if Path(name).expanduser().exists() else "not here"
            raise UserCodeError(
                f"{run} is graded by code that it brings along: {shown}, {here}. If you trust "
                f"what stands below, {TRUST} runs it; verifier.check=FILE.py takes a file of yours",
                readable(source),
            )
    return lines


def try_credit(settings: LearnerConfig) -> None:
    """Try the advantage form and the pruning rule on trees of every kind of reward.

    Raises:
        UserCodeError: one of them fails or returns what it must not.
    """
    tree = _tree()
    form, pruning = settings.form, settings.pruning
    for rewards in map(np.array, REWARDS):
        values = mean_backup(tree, rewards)
        for each in (pruning, Pruning(rule=pruning.rule, threshold=-1.0)):
            try:
                step_advantages(tree, values, form=form, pruning=each)
                advantage_errors(tree, values, form=form, pruning=each)
            except UserCodeError:
                raise
            except ValueError as error:
                key = f"learner.advantage={settings.advantage}, learner.prune={settings.prune}"
                raise UserCodeError(f"{key}: {error}") from error


def _tree() -> Tree:
    def step(parent: int, stop: StopReason) -> Step:
        one = np.ones(1)
        return Step(
            parent=parent,
            token_ids=one.astype(np.int32),
            logprobs=-one.astype(np.float32),
            versions=one.astype(np.int32),
            stop=stop,
        )

    kinds = [
        StopReason.BOUNDARY if place in PARENTS else StopReason.END_OF_TEXT
        for place in range(len(PARENTS))
    ]
    return Tree.from_steps(np.array([1], np.int32), tuple(map(step, PARENTS, kinds)))
