"""Answers: the samples of an evaluation to one problem, as a tree of one depth."""

from dataclasses import dataclass

import numpy as np

from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.tree import ROOT, StopReason
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.sightings import answer_rows, reward_of
from treerpo_ray.verifier.verdict import Verdict
from treerpo_ray.viewer.tree_list import shape
from treerpo_ray.viewer.tree_view import TreeView


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers to one problem in one evaluation."""

    view: TreeView
    texts: tuple[str, ...]
    """Whole, by answer."""


def read_answers(folder: RunFolder, step: int, problem: str) -> Answers:
    """The answers to one problem.

    Raises:
        ValueError: there is no such evaluation or problem.
    """
    return _answers(answer_rows(folder, step, problem), step)


def _answers(rows: list[dict], step: int) -> Answers:
    verdicts = [Verdict(row["verdict"]) for row in rows]
    rewards = np.array([reward_of(row) for row in rows])
    none = np.full(len(rows), np.nan)
    lengths = np.array([row["num_tokens"] for row in rows], np.int32)
    tree = shape(np.full(len(rows), ROOT, np.int32), lengths)
    values = mean_backup(tree, rewards)
    stops = [StopReason.BOUNDARY if r["is_cut_off"] else StopReason.END_OF_TEXT for r in rows]
    view = TreeView(
        ref=f"e{step}:{rows[0]['problem']}",
        step=step,
        ticket=None,
        prompt_id=rows[0]["problem"],
        question=rows[0]["question"],
        answers=tuple(rows[0]["references"]),
        num_redraws=0,
        seed=None,
        engine=None,
        grow_s=None,
        root_value=values.root,
        root_se=values.root_error,
        groups={},
        parent=tree.parents,
        depth=tree.depth_array,
        length=lengths,
        stop=tuple(stop.value for stop in stops),
        value=values.steps,
        value_se=values.step_errors,
        advantage=none,
        advantage_se=none,
        state=(None,) * len(rows),
        verdict=tuple(verdict.value for verdict in verdicts),
        oldest_version=(None,) * len(rows),
        newest_version=(None,) * len(rows),
        mean_logprob=none,
        mean_log_ratio=none,
        largest_log_ratio=float("nan"),
        text=tuple(row["text"][:200] for row in rows),
        has_texts=False,
    )
    return Answers(view=view, texts=tuple(row["text"] for row in rows))
