"""A small run folder, written with the project's own writers."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from tests.support.project import PROJECT
from tests.support.saved_runs.run_logs import run_log_of
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree
from treerpo_ray.config import Config
from treerpo_ray.config.sections import MetricsConfig, RunConfig, TreeConfig
from treerpo_ray.evaluate.evaluation import SAMPLES
from treerpo_ray.metrics.events import Event
from treerpo_ray.quickstart.exercises import draw_exercises
from treerpo_ray.records import TreeRecord, to_table
from treerpo_ray.verifier.verdict import Verdict

NUM_STEPS = 12
NUM_CHILDREN = (4, 3)
STEP_CHARS = (23, 48)
SAVED = {11: range(4), 12: range(4, 8)}
"""Tickets of the trees that are saved, by learner step."""
TOKENIZER = PROJECT / "treerpo_ray/quickstart/model/tokenizer.json"


def write_small_run(root, name="small"):
    """Write a run folder below `root`; returns its path."""
    config = Config(
        run=RunConfig(name=name, root=str(root), num_steps=NUM_STEPS),
        tree=TreeConfig(num_children=NUM_CHILDREN, step_tokens=STEP_CHARS),
        metrics=MetricsConfig(wandb_project=None),
    )
    run_log = run_log_of(config)
    for row in metric_rows():
        run_log.step(row)
    run_log.event(Event(kind="run_started", time=1000.0))
    run_log.event(Event(kind="version_served", fields={"version": 1}, time=1001.0))
    run_log.close()
    folder = Path(config.folder)
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    for step, tickets in SAVED.items():
        save_trees(folder, step, [grown_record(ticket) for ticket in tickets])
    (folder / "eval").mkdir()
    for step in (0, NUM_STEPS):
        evaluation = {"step": step, "pass_at_1": 0.2 + step / 40, "num_problems": 300}
        (folder / f"eval/step={step:06d}.json").write_text(json.dumps(evaluation))
    return str(folder)


def save_trees(folder, step, records):
    trees = Path(folder) / f"trees/step={step:06d}"
    trees.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(to_table(records), trees / f"{len(list(trees.iterdir()))}.parquet")


def metric_rows():
    rng = np.random.default_rng(0)
    for step in range(NUM_STEPS + 1):
        reward = 0.2 + 0.4 * (1 - np.exp(-step / 5))
        row = {"step": step, "time": 1000.0 + 7.0 * step}
        if step:
            kept = {1: int(24 * (0.4 + reward / 2)), 2: int(90 * reward)}
            row |= {"reward/mean": reward + rng.normal(0, 0.03), "reward/any": min(1, 1.6 * reward)}
            row |= {f"groups/kept_depth_{depth}": count for depth, count in kept.items()}
            row |= {f"groups/pruned_depth_{d}": n - kept[d] for d, n in ((1, 24), (2, 96))}
            row |= {
                "groups/kept": sum(kept.values()),
                "groups/kept_share": sum(kept.values()) / 120,
            }
            row |= {"loss/total": rng.normal(0, 0.02), "loss/policy": rng.normal(0, 0.02)}
            row |= {"mismatch/mean": 4e-4 + rng.random() * 1e-4, "mismatch/kl": 2e-6}
            row |= {"staleness/mean": min(1.0, step / 3), "staleness/max": min(1, step - 1)}
            row |= {"length/mean": 44 + rng.normal(0, 0.5), "tokens/per_s": rng.normal(4000, 200)}
        if step % 6 == 0:
            row |= {"eval/pass_at_1": reward, "eval/length": 44.0}
            row |= {"eval/ci95_low": reward - 0.04, "eval/ci95_high": reward + 0.04}
        yield row


def grown_record(ticket):
    """A tree of answers to an arithmetic question, in which a line slips now and then."""
    rng = random.Random(ticket)
    chain = next(draw_exercises("chains4", "train", rng))
    steps, answers = [], []

    def grow(parent, depth, text):
        for _ in range(NUM_CHILDREN[depth]):
            answer = answered(chain, rng, text)
            own = answer[len(text) :][: STEP_CHARS[depth]]
            is_leaf = len(text) + len(own) == len(answer) or depth + 1 == len(NUM_CHILDREN)
            stop = StopReason.END_OF_TEXT if is_leaf else StopReason.BOUNDARY
            steps.append(text_step(parent, own, stop))
            answers.append(text + own)
            if not is_leaf:
                grow(len(steps) - 1, depth + 1, text + own)

    grow(ROOT, 0, "")
    return make_record(ticket, chain.question, chain.answer, steps, answers)


def answered(chain, rng, start):
    """A whole answer that goes on from `start` and takes its results as they stand there."""
    value, lines = chain.first, []
    for operand in chain.operands:
        line = f"{value}{operand:+d}="
        before = "".join(lines)
        written = start[len(before) + len(line) :].split("\n")[0]
        result = f"{value + operand + (rng.random() < 0.2)}"
        if len(written) >= len(result) or written != result[: len(written)]:
            result = written + result[len(written) :]
        value = int(result)
        lines.append(f"{line}{result}\n")
    return "".join(lines) + f"#### {value}"


def worked_record(ticket=0, finished_at_s=0.0):
    """Values by hand: 0.5 and 0 at depth 1, so 0.25 for the prompt."""
    end, boundary = StopReason.END_OF_TEXT, StopReason.BOUNDARY
    shape = [(ROOT, "1+1=", boundary), (0, "2\n#### 2", end), (0, "3\n#### 3", end)]
    shape += [(ROOT, "1-1=", boundary), (3, "0\n#### 0", end), (3, "0\n#### 0", end)]
    answers = ["", "#### 2", "#### 3", "", "#### 0", "#### 0"]
    steps = [text_step(*step) for step in shape]
    return make_record(ticket, "1+1=?", "2", steps, answers, finished_at_s)


def make_record(ticket, question, right, steps, answers, finished_at_s=0.0):
    """A scored record; `answers` has the text from the prompt to each step."""
    tree = Tree.from_steps(np.array([1], np.int32), tuple(steps))
    texts = tuple(answers[leaf] for leaf in tree.leaves)
    return TreeRecord(
        ticket=ticket,
        attempt=0,
        prompt_id=f"train-{ticket}",
        question=question,
        answers=(right,),
        seed=ticket,
        engine=0,
        grow_s=1.0,
        finished_at_s=finished_at_s,
        tree=tree,
        leaf_texts=texts,
        verdicts=tuple(
            Verdict.CORRECT if text.endswith(f"#### {right}") else Verdict.WRONG for text in texts
        ),
    )


def text_step(parent, text, stop):
    token_ids = np.array(Tokenizer.from_file(str(TOKENIZER)).encode(text).ids, np.int32)
    return Step(
        parent=parent,
        token_ids=token_ids,
        logprobs=np.full(len(token_ids), -0.1, np.float32),
        versions=np.zeros(len(token_ids), np.int32),
        stop=stop,
    )


def answers_to(problems, step, texts):
    """Saved answers of an evaluation: by problem (an id, a question and the right result) the
    answers' texts."""
    rows = []
    for (problem, question, right), own in zip(problems, texts, strict=True):
        for number, text in enumerate(own):
            verdict = Verdict.CORRECT if text.endswith(f"#### {right}") else Verdict.WRONG
            rows.append(
                {
                    "problem": problem,
                    "question": question,
                    "references": [right],
                    "sample": number,
                    "text": text,
                    "verdict": verdict.value,
                    "num_tokens": len(text),
                    "is_cut_off": False,
                    "group": None,
                }
            )
    return f"eval/step={step:06d}.parquet", pyarrow.Table.from_pylist(rows, schema=SAMPLES)
