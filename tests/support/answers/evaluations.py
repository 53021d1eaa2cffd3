"""Graded answers and evaluations."""

from dataclasses import replace

from tests.support.learning.trees import make_tree
from treerpo_ray.algo.tree import ROOT, StopReason, Tree
from treerpo_ray.evaluate.evaluation import Evaluation
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Verdict

C, W = Verdict.CORRECT, Verdict.WRONG
CUT, SLOW, ERR = Verdict.CUT_OFF, Verdict.TIMED_OUT, Verdict.ERRORED

EVALUATION = Evaluation(
    step=3, version=2, data="held.jsonl", num_problems=1, num_samples=1, temperature=0.6,
    pass_at_1=0.5, ci95_low=0.4, ci95_high=0.6, pass_at_k=0.5, length=2.0, cut_off_share=0.0,
    errored_share=0.0, num_sampled_tokens=4, seconds=0.1,
)  # fmt: skip


def graded(*verdicts: Verdict, length: int = 2, is_full: bool = False) -> TreeRecord:
    """The answers to one problem, each of `length` tokens; requests failed where ERR stands.

    All are at the length limit if `is_full`, otherwise those that are cut off.
    """
    stops = {
        verdict: StopReason.BOUNDARY if is_full or verdict is CUT else StopReason.END_OF_TEXT
        for verdict in verdicts
    } | {ERR: StopReason.ERROR}
    tree = make_tree(
        [ROOT] * len(verdicts),
        lengths=[0 if verdict is ERR else length for verdict in verdicts],
    )
    steps = (
        replace(step, stop=stops[verdict])
        for step, verdict in zip(tree.steps, verdicts, strict=True)
    )
    tree = Tree.from_steps(tree.prompt_ids, tuple(steps))
    return TreeRecord(
        ticket=0,
        attempt=0,
        prompt_id="0",
        question="",
        answers=(),
        seed=0,
        engine=0,
        grow_s=0.0,
        finished_at_s=0.0,
        tree=tree,
        leaf_texts=("",) * len(verdicts),
        verdicts=verdicts,
    )
