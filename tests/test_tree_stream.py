"""The tree stream scores what the pool gives, and ends the run when its verifier fails; no Ray."""

import faulthandler
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT as ROOT_FOLDER
from tests.support.records import make_record
from tests.support.trees import make_step
from treerpo_ray import tree_stream
from treerpo_ray.algo.tree import ROOT, StopReason, Tree
from treerpo_ray.config import load
from treerpo_ray.metrics.run_log import FATAL, Event
from treerpo_ray.prompts.prompt_set import load_tokenizer
from treerpo_ray.records import TreeRecord, from_table
from treerpo_ray.scoring import VerifierFailing
from treerpo_ray.tree_stream import from_share
from treerpo_ray.verifier.verdict import Verdict

CONFIG = load(
    [
        *("run.root=memory://runs", "run.name=stream", "gate.trees_per_step=2"),
        *("verifier.check=tests.support.unruly_answers", "verifier.num_workers=1"),
        f"model.path={ROOT_FOLDER}/treerpo_ray/quickstart/model",
    ]
)
TOKENIZER = load_tokenizer(CONFIG.model.path, trust_remote_code=False)


def tree_of(ticket: int, *answers: str) -> TreeRecord:
    """An unscored tree whose leaves say `answers`; `right` is right."""
    ids = [TOKENIZER(answer, return_tensors="np")["input_ids"][0] for answer in answers]
    steps = [replace(make_step(ROOT, own), stop=StopReason.END_OF_TEXT) for own in ids]
    tree = Tree.from_steps(ids[0], tuple(steps))
    record = make_record(tree, ())
    return replace(record, ticket=ticket, question="which?", answers=("right",), leaf_texts=())


class Handle:
    """Stands in for the handle of an actor with these methods; the results come at once."""

    def __init__(self, **methods: Callable[..., object]) -> None:
        self.__dict__ |= {name: SimpleNamespace(remote=do) for name, do in methods.items()}


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SimpleNamespace]]:
    """Streams what the pool gives, one list after the other; the result has `shares`, `events`."""
    monkeypatch.setattr(tree_stream.ray, "get", lambda value: value)

    def run(*given: list[TreeRecord], config=CONFIG) -> SimpleNamespace:
        found, rest = SimpleNamespace(events=[], redrawn=[], moved=[]), iter([*given, None])
        pool = Handle(
            take=lambda *arguments: next(rest),
            share_size=lambda: 2,
            redraw=lambda reader, tree: found.redrawn.append(tree),
        )
        found.shares = tree_stream._shares(
            config, pool, Handle(event=found.events.append), Handle(moved=found.moved.append), "me"
        )
        return found

    yield run
    faulthandler.cancel_dump_traceback_later()


def test_trees_come_out_scored_in_shares_of_their_step_until_the_pool_ends(stream) -> None:
    trees = [tree_of(0, "right", "left"), tree_of(2, "right", "right"), tree_of(1, "raise", "left")]
    found = stream(trees[:2], [], trees[2:], [tree_of(3, "left", "left")])
    shares = [from_table(from_share(share)) for share in found.shares]
    assert [[tree.ticket for tree in share] for share in shares] == [[0, 1], [2, 3]]
    assert shares[0][0].leaf_texts == ("right", "left")
    assert shares[0][0].verdicts == (Verdict.CORRECT, Verdict.WRONG)
    assert shares[0][1].verdicts == (Verdict.ERRORED, Verdict.WRONG)
    assert [event.kind for event in found.events] == ["verifier_started"]
    assert found.moved[-1].doing == "ended"


def test_a_tree_without_a_signal_goes_back_to_be_drawn_again(stream) -> None:
    config = replace(CONFIG, gate=replace(CONFIG.gate, max_redraws=1))
    again = replace(tree_of(1, "right", "right"), num_redraws=1)
    found = stream(
        [tree_of(0, "right", "left"), tree_of(1, "left", "left")], [again], config=config
    )
    shares = [from_table(from_share(share)) for share in found.shares]
    assert [[tree.ticket for tree in share] for share in shares] == [[0, 1]]
    assert [(tree.ticket, tree.num_redraws) for tree in found.redrawn] == [(1, 0)]


def test_a_verifier_that_fails_too_often_ends_the_run_with_its_examples(stream) -> None:
    config = replace(CONFIG, verifier=replace(CONFIG.verifier, max_error_share=0.01))
    found = stream(
        [tree_of(0, "right", "left"), tree_of(1, "right", "left")],
        [tree_of(2, "raise", "right"), tree_of(3, "abort", "recurse")],
        config=config,
    )
    assert next(found.shares).num_rows == 1
    with pytest.raises(VerifierFailing, match=r"verifier\.max_error_share=0\.01"):
        next(found.shares)
    fatal: Event = found.events[-1]
    assert fatal.kind == FATAL
    for answer in ("raise", "abort", "recurse"):
        example = f"errored: answer '{answer}' to question 'which?' with reference 'right'"
        assert example in str(fatal.fields["reason"])
