"""A run of the paper's shape: trees of 8 x 8 x 8 with long texts, some hostile to a page."""

import random
from functools import cache
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from tests.support.saved_runs.run_logs import run_log_of
from tests.support.saved_runs.small_run import TOKENIZER, metric_rows
from treerpo_ray.algo.tree import ROOT, StopReason, Tree
from treerpo_ray.config import Config
from treerpo_ray.config.sections import MetricsConfig, RunConfig
from treerpo_ray.records import TreeRecord, to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Verdict

NUM_CHILDREN, NUM_DEPTHS, STEP_TOKENS = 8, 3, 384
NUM_STEPS = 8 + 64 + 512
SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
QUESTION = (
    "Let $f(x) = \\frac{x^2 - 4}{x - 2}$ & <b>g</b> its inverse.\nWhat is \\(f(3)\\)? "
    "\u202etxet desrever\u202c \x00\x1b[2J شكرا"
)
SENTENCES = (
    "We have $\\frac{a}{b} = \\sqrt{2}$, so \\[ x^2 - 5x + 6 = (x-2)(x-3). \\] ",
    "Therefore \\(\\sum_{k=1}^{n} k = \\frac{n(n+1)}{2}\\).\n\n",
    "לכן התשובה היא 12, כי 3 + 9 = 12. ",
    "إذن الجواب هو 5 لأن \u0663 + \u0662 = \u0665. ",
    "Turned \u202eby an override\u202c and \u2066isolated\u2069. ",
    "Bytes \x00\x07\x1b[31m and \u200bzero\u200dwidth\ufeff. ",
    f"{SCRIPT} ",
    "</text></svg></script><!-- & \" ' ]]> ",
    "So ① 因此 😀 e\u0301 holds.\tAnd then: ",
    "Checking: 12 * 13 = 156, 156 - 144 = 12. ",
)


def write_paper_run(
    root: Path, name: str = "paper", tickets: dict[int, range] | None = None
) -> str:
    """Write a run folder below `root`, by learner step the trees of `tickets`; returns its path."""
    config = Config(
        run=RunConfig(name=name, root=str(root), num_steps=40),
        metrics=MetricsConfig(wandb_project=None),
    )
    run_log = run_log_of(config)
    for row in metric_rows():
        run_log.step(row)
    run_log.close()
    folder = RunFolder(config.folder)
    OmegaConf.save(OmegaConf.structured(config), Path(config.folder, "config.yaml"))
    for step, own in ({12: range(2)} if tickets is None else tickets).items():
        table = to_table([paper_record(ticket) for ticket in own])
        folder.publish_table(saved_trees.name(step, 0), table)
    return config.folder


@cache
def paper_record(ticket: int) -> TreeRecord:
    """A scored tree of 584 steps of up to 384 tokens, which are bytes: some end in a character."""
    rng = random.Random(ticket)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    parents: list[int] = []
    above = [ROOT]
    for _ in range(NUM_DEPTHS):
        first = len(parents)
        parents += [parent for parent in above for _ in range(NUM_CHILDREN)]
        above = list(range(first, len(parents)))
    ids = [_token_ids(tokenizer, rng, is_leaf=step >= NUM_STEPS - 512) for step in range(NUM_STEPS)]
    lengths = np.array([len(own) for own in ids], np.int32)
    draw = np.random.default_rng(ticket)
    total = int(lengths.sum())
    tree = Tree(
        prompt_ids=np.array([1, 2, 3], np.int32),
        parents=np.array(parents, np.int32),
        lengths=lengths,
        stops=tuple([StopReason.BOUNDARY] * (8 + 64) + [StopReason.END_OF_TEXT] * 512),
        num_discarded=np.zeros(NUM_STEPS, np.int32),
        token_ids=np.concatenate(ids, dtype=np.int32),
        logprobs=-draw.exponential(0.4, total).astype(np.float32),
        versions=np.sort(draw.integers(9, 12, total)).astype(np.int32),
    )
    return TreeRecord(
        ticket=ticket,
        attempt=0,
        prompt_id=f"math-{ticket}",
        question=QUESTION,
        answers=("5", "5.0"),
        seed=ticket,
        engine=ticket % 3,
        grow_s=41.5,
        finished_at_s=1000.0 + ticket,
        tree=tree,
        leaf_texts=tuple(tokenizer.decode(tree.path_token_ids(leaf)) for leaf in tree.leaves),
        verdicts=tuple(_verdicts(rng)),
    )


def _token_ids(tokenizer: Tokenizer, rng: random.Random, *, is_leaf: bool) -> list[int]:
    length = rng.randint(60, STEP_TOKENS) if is_leaf else STEP_TOKENS
    text = ""
    while len(text) < length:
        text += rng.choice(SENTENCES)
    return tokenizer.encode(text).ids[rng.randrange(4) :][:length]


def _verdicts(rng: random.Random) -> list[Verdict]:
    """512 verdicts: groups that differ, that are all alike, and in the last group an error."""
    found: list[Verdict] = []
    for group in range(64):
        chance = (0.0, 1.0, 0.5, 0.2)[group % 4] if group // 8 != 7 else 0.0
        kinds = [Verdict.CORRECT if rng.random() < chance else Verdict.WRONG for _ in range(8)]
        found += kinds
    found[16], found[17], found[-1] = Verdict.CUT_OFF, Verdict.UNANSWERED, Verdict.ERRORED
    return found
