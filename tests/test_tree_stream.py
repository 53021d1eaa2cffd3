"""The tree stream scores what the pool gives, and hands whole batches to workers; no Ray."""

import faulthandler
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.learning.records import make_record, plain, records
from tests.support.learning.trees import make_step, make_tree
from tests.support.project import PROJECT
from tests.support.stages.answering_at_once import AnsweringAtOnce
from treerpo_ray.algo.tree import ROOT, StopReason, Tree
from treerpo_ray.config import load
from treerpo_ray.errors import NodeDiffers
from treerpo_ray.metrics.events import FATAL, Event
from treerpo_ray.prompts.prompt_set import load_tokenizer
from treerpo_ray.records import SCHEMA, TreeRecord, from_table, to_table
from treerpo_ray.scoring import VerifierFailing
from treerpo_ray.tree_stream import (
    Prefetcher,
    WorkerBatch,
    WorkerBatches,
    from_worker_batch,
    has_signal,
    to_worker_batch,
    trained_tokens,
    worker_batches,
)
from treerpo_ray.verifier.verdict import Grade, Verdict
from treerpo_ray.verifier.verifier import VariableNotSet

CONFIG = load(
    [
        *("run.root=memory://runs", "run.name=stream", "gate.trees_per_step=2"),
        *("verifier.check=tests.support.answers.unruly_answers", "verifier.num_workers=1"),
        f"model.path={PROJECT}/treerpo_ray/quickstart/model",
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
def stream() -> Iterator[Callable[..., SimpleNamespace]]:
    """Streams what the pool gives, one list after the other; the result has `shares`, `events`."""

    def run(*given: list[TreeRecord], config=CONFIG, check_node=lambda: None) -> SimpleNamespace:
        found, rest = SimpleNamespace(events=[], redrawn=[], moved=[]), iter([*given, None])
        pool = Handle(
            take=lambda *arguments: next(rest),
            worker_batch_size=lambda: 2,
            redraw=lambda reader, tree: found.redrawn.append(tree),
        )
        found.shares = worker_batches(
            config,
            actors=AnsweringAtOnce(
                gate=None,
                pool=pool,
                weight_sync=None,
                run_log=Handle(event=found.events.append),
                heartbeats=Handle(moved=found.moved.append),
            ),
            reader="me",
            check_node=check_node,
        )
        return found

    yield run
    faulthandler.cancel_dump_traceback_later()


def test_trees_come_out_scored_in_shares_of_their_step_until_the_pool_ends(stream) -> None:
    trees = [tree_of(0, "right", "left"), tree_of(2, "right", "right"), tree_of(1, "raise", "left")]
    found = stream(trees[:2], [], trees[2:], [tree_of(3, "left", "left")])
    shares = [from_table(from_worker_batch(share)) for share in found.shares]
    assert [[tree.ticket for tree in share] for share in shares] == [[0, 1], [2, 3]]
    assert shares[0][0].leaf_texts == ("right", "left")
    assert shares[0][0].verdicts == (Verdict.CORRECT, Verdict.WRONG)
    assert shares[0][1].verdicts == (Verdict.ERRORED, Verdict.WRONG)
    started, failed = found.events
    assert (started.kind, failed.kind) == ("verifier_started", "check_failed")
    assert "in check_answer\n    raise ValueError" in failed.fields["reason"]
    assert found.moved[-1].doing == "ended"


def test_who_asks_in_vain_has_not_moved_so_that_a_run_in_which_all_wait_is_seen_to_hang(
    stream,
) -> None:
    trees = [tree_of(0, "right", "left"), tree_of(1, "right", "left")]
    found = stream([], [], trees, [], [], [])
    assert len(list(found.shares)) == 1
    assert [status.doing for status in found.moved] == [
        "starting the verifier",
        "waiting for finished trees",
        "scoring tickets [0, 1]",
        "handing trees on",
        "waiting for finished trees",
        "ended",
    ]


def test_a_tree_without_a_signal_goes_back_to_be_drawn_again(stream) -> None:
    config = replace(CONFIG, gate=replace(CONFIG.gate, max_redraws=1))
    again = replace(tree_of(1, "right", "right"), num_redraws=1)
    found = stream(
        [tree_of(0, "right", "left"), tree_of(1, "left", "left")], [again], config=config
    )
    shares = [from_table(from_worker_batch(share)) for share in found.shares]
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


def test_a_variable_that_this_node_lacks_ends_the_run_as_further_tries_would_not_find_it(
    stream,
) -> None:
    config = replace(CONFIG, verifier=replace(CONFIG.verifier, env=("NO_SUCH_KEY",)))
    found = stream([tree_of(0, "right", "left")], config=config)
    with pytest.raises(VariableNotSet, match=r"verifier\.env names NO_SUCH_KEY"):
        next(found.shares)
    [fatal] = found.events
    assert fatal.kind == FATAL and "NO_SUCH_KEY, which is not set on" in fatal.fields["reason"]


def test_a_node_with_other_versions_scores_nothing_and_ends_the_run_with_its_line(stream) -> None:
    def differs() -> None:
        raise NodeDiffers("10.0.0.9 has torch 2.8.0, and the driver 2.9.1: install the same")

    found = stream([tree_of(0, "right", "left")], check_node=differs)
    with pytest.raises(NodeDiffers, match=r"has torch 2\.8\.0"):
        next(found.shares)
    [fatal] = found.events
    assert fatal.kind == FATAL and fatal.fields["reason"].startswith("10.0.0.9 has torch 2.8.0")


# Batches of workers


@settings(max_examples=30)
@given(st.lists(records(), min_size=1, max_size=4))
def test_a_share_is_one_row_and_gives_its_trees_back(drawn: list[TreeRecord]) -> None:
    share = to_worker_batch(drawn)
    assert share.num_rows == 1
    table = from_worker_batch(share)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert [plain(record) for record in from_table(table)] == [plain(record) for record in drawn]


def test_of_shares_that_arrow_put_together_each_gives_its_own_trees() -> None:
    drawn = [make_record(make_tree([ROOT] * n), ()) for n in (1, 3)]
    both = pa.concat_tables([to_worker_batch([record]) for record in drawn])
    for index, record in enumerate(drawn):
        (found,) = from_table(from_worker_batch(both.slice(index, 1)))
        assert plain(found) == plain(record)


def scored_tree(ticket: int, *verdicts: Verdict) -> TreeRecord:
    return replace(make_record(make_tree([ROOT] * len(verdicts)), verdicts), ticket=ticket)


def given_out(shares: WorkerBatches, *tickets: int) -> list[list[int]]:
    for ticket in tickets:
        shares.add(scored_tree(ticket, Verdict.WRONG))
    return [[tree.ticket for tree in share] for share in shares.complete()]


def test_shares_come_in_the_order_of_their_learner_steps() -> None:
    learner = load([]).learner
    shares = WorkerBatches(trees_per_step=4, size=2, first=8, learner=learner)
    # A redrawn tree is awaited, although the next step is complete.
    assert given_out(shares, 9, 8, 11, 14, 12, 13, 15) == []
    batches = given_out(shares, 10)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    assert sorted(batches[0] + batches[1]) == [8, 9, 10, 11]
    assert sorted(batches[2] + batches[3]) == [12, 13, 14, 15]


def test_a_step_none_of_whose_trees_has_come_holds_the_next_one_back() -> None:
    shares = WorkerBatches(trees_per_step=2, size=2, first=1, learner=load([]).learner)
    assert given_out(shares, 2, 3) == []
    assert given_out(shares, 0, 1) == [[0, 1], [2, 3]]


def test_workers_get_about_as_much_to_train() -> None:
    learner, right, wrong = load([]).learner, Verdict.CORRECT, Verdict.WRONG
    shares = WorkerBatches(trees_per_step=4, size=2, first=0, learner=learner)
    for ticket in range(4):  # those of the first two have something to train
        shares.add(scored_tree(ticket, right, wrong if ticket < 2 else right))
    batches = list(shares.complete())
    assert [sum(trained_tokens(tree, learner) > 0 for tree in batch) for batch in batches] == [1, 1]
    assert all(len(batch) == 2 for batch in batches)


@pytest.mark.parametrize("size", [8, 4, 2])
def test_minibatches_are_of_the_same_trees_whatever_the_number_of_workers(size: int) -> None:
    """A worker cuts its own by ticket."""
    learner = load(["learner.minibatches=2"]).learner
    shares = WorkerBatches(trees_per_step=8, size=size, first=0, learner=learner)
    for ticket in (6, 1, 3, 0, 7, 5, 2, 4):  # some have something to train
        verdicts = (
            Verdict.CORRECT,
            Verdict.WRONG if ticket in (0, 1, 4, 6, 7) else Verdict.CORRECT,
        )
        shares.add(scored_tree(ticket, *verdicts))
    batches = [sorted(tree.ticket for tree in batch) for batch in shares.complete()]
    minibatches = np.array(batches).reshape(8 // size, 2, -1)
    assert [sorted(minibatches[:, k].flat) for k in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_tree_has_a_signal_if_any_group_is_kept() -> None:
    config = load([])
    right, wrong, errored = Verdict.CORRECT, Verdict.WRONG, Verdict.ERRORED
    assert has_signal(scored_tree(0, right, wrong), config.learner)
    assert not has_signal(scored_tree(0, right, right), config.learner)
    assert not has_signal(scored_tree(0, right, wrong, errored), config.learner)


def test_right_answers_that_differ_in_length_are_a_signal_where_length_counts() -> None:
    graded = {}
    for answers in (("a", "longer"), ("a", "b")):
        tree = tree_of(0, *answers)
        graded[answers] = tree.graded([Grade(Verdict.CORRECT, 1.0)] * 2)
    for weight in (0.0, 0.5):
        learner = load([f"learner.length_weight={weight}"]).learner
        found = [has_signal(each, learner) for each in graded.values()]
        assert found == [weight > 0, False]
        assert trained_tokens(graded["a", "longer"], learner) == (7 if weight else 0)


# The next batch is fetched ahead


class Shard:
    """Gives a batch of one tree for each ticket; an exception among them is raised."""

    def __init__(self, *items: int | Exception) -> None:
        self.items, self.asked = items, threading.Semaphore(0)

    def iter_batches(
        self, *, batch_size: int, batch_format: str, prefetch_batches: int
    ) -> Iterator[pa.Table]:
        assert (batch_size, batch_format, prefetch_batches) == (1, "pyarrow", 0)
        for item in self.items:
            self.asked.release()
            if isinstance(item, Exception):
                raise item
            yield to_worker_batch([tree_of(item, "right")])


def number(batch: WorkerBatch) -> int:
    assert batch.asked_at <= batch.arrived_at and to_table(batch.records).equals(batch.table)
    return batch.records[0].ticket


def test_batches_come_in_order_and_that_none_follows_the_last_is_an_error() -> None:
    batches = Prefetcher(Shard(3, 1, 2))
    assert [number(batches.take()) for _ in range(3)] == [3, 1, 2]
    with pytest.raises(RuntimeError, match="the stream of trees has ended"):
        batches.take()


@pytest.mark.parametrize("tickets", [[4, 5], [4, 4], [4, 8], [4], [4, 5, 6]])
def test_a_batch_must_be_an_equal_share_of_its_own_steps_tickets_each_once(
    tickets: list[int],
) -> None:
    trees = [tree_of(ticket, "right") for ticket in tickets]
    batch = WorkerBatch(records=trees, table=to_table(trees), asked_at=0.0, arrived_at=0.0)
    if tickets == [4, 5]:
        batch.check(range(4, 8), 2)
        return
    with pytest.raises(RuntimeError, match=re.escape(f"tickets {tickets} are no worker batch")):
        batch.check(range(4, 8), 2)


def test_the_end_of_a_stream_is_waited_for_whatever_it_ends_of_and_not_for_ever() -> None:
    for shard in (Shard(), Shard(RuntimeError("the stream broke"))):
        shares = Prefetcher(shard)
        shares.await_end(600)
        assert shares._asked.done()
    Prefetcher(Shard(1, 2)).await_end(0)


def test_the_next_share_is_asked_for_before_it_is_taken_and_no_further_one() -> None:
    shard = Shard(1, 2, 3)
    shares = Prefetcher(shard)
    assert number(shares.take()) == 1
    for _ in range(2):
        assert shard.asked.acquire(timeout=600)
    assert not shard.asked.acquire(timeout=0.1)


def test_what_goes_wrong_in_the_stream_is_raised_where_the_share_is_taken() -> None:
    shares = Prefetcher(Shard(1, RuntimeError("the stream broke")))
    assert number(shares.take()) == 1
    with pytest.raises(RuntimeError, match="the stream broke"):
        shares.take()
