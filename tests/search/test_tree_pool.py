"""The pool: whatever becomes of its engines, each ticket gives its tree, once and of its version.

The engines are stand-ins in this process (see `fake_engines`). Of real ones `test_engine_faults`
has one that is stale; they are killed and hang in `runs/test_failures`.
"""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stages.fake_engines import (
    ENDS,
    PROMPTS,
    SEED,
    SHAPE,
    STEPS,
    TREES,
    Fault,
    Fleet,
    Handle,
    make_config,
    make_gate,
    make_pool,
    serve,
    serve_from_start,
    take,
    until,
    whole_tree,
)
from tests.support.stages.virtual_time import run
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.algo.tree import Tree
from treerpo_ray.config import Config
from treerpo_ray.engine.pool import MAX_STARTS
from treerpo_ray.engine.types import Sampling
from treerpo_ray.metrics.stage_status import stalled
from treerpo_ray.prompts.mixture import one_set
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.search.gate import Gate, redrawn
from treerpo_ray.search.tree_pool import TreePool

FLAT = TreeShape(num_children=(2,), step_tokens=(3,))
LIMIT_S = 600.0
SAMPLING = Sampling(temperature=1.0)


TICKETS = [make_gate(make_config()).ticket(number) for number in range(TREES * STEPS)]


def contents(tree: Tree) -> list[list[int]]:
    return [tree.prompt_ids.tolist(), *(step.token_ids.tolist() for step in tree.steps)]


EXPECTED = [contents(whole_tree(ticket.prompt, ticket.seed)) for ticket in TICKETS]


async def opened(config: Config, fleet: Fleet, gate: Gate) -> TreePool:
    """A pool that serves version 0 and grows tickets from the first on."""
    pool = await make_pool(config, fleet)
    await serve_from_start(pool)
    await pool.grow_tickets(Handle(gate), gate.session, 0, 1, [])
    return pool


async def consume(
    pool: TreePool, gate: Gate, first: int = 0, reader: str = "reader"
) -> list[TreeRecord]:
    """What the learner gets that does all steps from `first` on, with an update in each."""
    consumed = []
    for step in range(first, STEPS):
        batch = await take(pool, TREES, reader)
        assert sorted(tree.ticket for tree in batch) == list(range(step * TREES, step * TREES + 4))
        for tree in batch:
            assert step - gate.max_staleness <= tree.tree.min_version <= tree.tree.max_version
            assert tree.tree.max_version <= step
        consumed += batch
        await serve(pool, step + 1)
        gate.consumed(step)
    return consumed


def assert_whole(trees: list[TreeRecord]) -> None:
    by_ticket = {tree.ticket: contents(tree.tree) for tree in trees}
    assert len(by_ticket) == len(trees), "no ticket is consumed twice"
    assert by_ticket == {number: EXPECTED[number] for number in by_ticket}


FAULTS = st.one_of(
    st.builds(Fault, st.just("grow"), st.sampled_from([*ENDS, "stale"]), st.integers(0, 6)),
    st.builds(Fault, st.sampled_from(["load", "probe"]), st.sampled_from([*ENDS, "stale"])),
    st.builds(Fault, st.sampled_from(["node", "start"]), st.sampled_from(ENDS)),
)


@settings(max_examples=25)
@given(st.dictionaries(st.integers(0, 2), st.lists(FAULTS, max_size=MAX_STARTS - 1), max_size=3))
def test_whatever_fails_each_ticket_is_consumed_once_by_its_step_and_has_its_own_tree(
    faults: dict[int, list[Fault]],
) -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config("engine.num_engines=3")
        gate = make_gate(config)
        pool = await opened(config, fleet, gate)
        assert_whole(await consume(pool, gate))
        await pool.stop()

    run(scenario(Fleet(faults)))


@pytest.mark.parametrize("how", [*ENDS, "hung", "stale"])
def test_a_tree_goes_on_from_its_groups_at_another_engine_and_the_first_is_replaced(
    how: str,
) -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config("gate.max_staleness=0")
        gate = make_gate(config)
        pool = await make_pool(config, fleet)
        await serve_from_start(pool, version=1)
        after = 0 if how == "stale" else 2
        fleet.started[0][0].fault = Fault("grow", how, after)
        await pool.grow_tickets(Handle(gate), gate.session, 0, 1, [])
        batch = await take(pool, TREES)
        assert_whole(batch)
        assert {tree.attempt for tree in batch} == {1}
        assert {tree.tree.min_version for tree in batch} == {1}
        lost, fresh = fleet.started[0]
        assert fleet.killed == [lost]
        assert fresh.calls[:3] == ["start", "load 1", "probe"]
        assert fresh.held == [after] * TREES
        told = [str(event["what"]) for event in fleet.of("waiting")]
        assert not [what for what in told if "step group" in what]
        await pool.stop()

    run(scenario(Fleet()))


def test_a_tree_may_wait_for_longer_than_the_limit_while_its_engine_is_busy_with_others() -> None:
    async def scenario(fleet: Fleet) -> None:
        pool = await make_pool(make_config("engine.request_timeout_s=2"), fleet)
        await serve_from_start(pool)
        fleet.started[0][0].fault = Fault("grow", "busy")
        clock = asyncio.get_running_loop()
        start = clock.time()
        trees = [tree async for tree in pool.evaluate(PROMPTS, FLAT, SAMPLING, SEED)]
        assert clock.time() - start > 2
        assert sorted(tree.ticket for tree in trees) == list(range(len(PROMPTS)))
        assert {tree.attempt for tree in trees} == {0}
        assert not fleet.killed
        await pool.stop()

    run(scenario(Fleet()))


@pytest.mark.parametrize("method", ["load", "probe"])
@pytest.mark.parametrize("how", [*ENDS, "hung", "stale"])
def test_an_engine_that_does_not_prove_new_weights_serves_none_and_is_replaced(
    method: str, how: str
) -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config("engine.num_engines=2")
        gate = make_gate(config)
        pool = await opened(config, fleet, gate)
        await take(pool, TREES)
        fleet.started[0][0].fault = Fault(method, how)
        await serve(pool, 1, should_probe=True)
        assert fleet.killed == [fleet.started[0][0]]
        serving = {replica.index: replica.is_serving for replica in pool.engines.replicas}
        assert serving == {0: False, 1: True}
        gate.consumed(0)
        while len(fleet.of("engine_serving")) < 3:
            await asyncio.sleep(0.01)
        assert fleet.started[0][1].calls[:3] == ["start", "load 1", "probe"]
        assert (await pool.stats())[0].num_requests >= 0
        await pool.stop()

    run(scenario(Fleet()))


def test_with_a_single_engine_hung_while_it_loads_the_version_is_served_by_its_successor() -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config("engine.num_engines=1")
        pool = await make_pool(config, fleet)
        await serve_from_start(pool)
        fleet.started[0][0].fault = Fault("load", "hung")
        await serve(pool, 1)
        assert await pool.version() == 1
        assert fleet.started[0][1].version == 1
        await pool.stop()

    run(scenario(Fleet()))


def test_an_engine_that_answers_late_for_its_totals_counts_as_before_and_holds_nobody_up() -> None:
    async def scenario(fleet: Fleet) -> None:
        pool = await make_pool(make_config("engine.num_engines=3"), fleet)
        await serve_from_start(pool)
        never, late, alert = (fleet.started[index][0] for index in range(3))
        never.fault = Fault("stats", "hung")
        late.num_sampled = alert.num_sampled = 5
        assert [stats.num_requests for stats in await pool.stats()] == [5, 5]
        late.fault = Fault("stats", "hung")
        late.num_sampled = alert.num_sampled = 7
        await serve(pool, 1)
        assert [(s.num_requests, s.version) for s in await pool.stats()] == [(5, 1), (7, 1)]
        late.fault = None
        assert [stats.num_requests for stats in await pool.stats()] == [7, 7]
        assert fleet.killed == []
        await pool.stop()

    run(scenario(Fleet()))


def test_an_engine_that_answers_late_claims_no_version_that_it_has_not_proved() -> None:
    async def scenario(fleet: Fleet) -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        await serve_from_start(pool, version=1)
        await pool.stats()
        late = fleet.started[0][0]
        late.fault = Fault("load", "hung")
        publication = asyncio.create_task(serve(pool, 2))
        while late.calls[-1] != "load 2":
            await asyncio.sleep(0)
        late.fault = Fault("stats", "hung")
        assert await pool.version() == 2
        assert [stats.version for stats in await pool.stats()] == [1, 2]
        publication.cancel()
        await pool.stop()

    run(scenario(Fleet()))


@pytest.mark.parametrize("how", ENDS)
def test_an_engine_that_fails_when_asked_for_its_totals_is_replaced(how: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        await serve_from_start(pool)
        assert len(await pool.stats()) == 2
        fleet.started[1][0].fault = Fault("stats", how)
        assert len(await pool.stats()) == 1
        assert fleet.killed == [fleet.started[1][0]]
        await pool.stop()

    run(scenario(Fleet()))


def test_an_engine_that_fails_time_and_again_ends_the_run_with_its_reason() -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config("engine.num_engines=1")
        gate = make_gate(config)
        pool = await make_pool(config, fleet)
        await serve_from_start(pool)
        fleet.faults = {0: [Fault("grow", "core dead")] * MAX_STARTS}
        fleet.started[0][0].fault = fleet.faults[0][0]
        await pool.grow_tickets(Handle(gate), gate.session, 0, 1, [])
        with pytest.raises(RuntimeError, match=r"5 times in a row: .*core is dead"):
            await take(pool, TREES)
        assert len(fleet.started[0]) == MAX_STARTS
        await pool.stop()

    run(scenario(Fleet()))


def test_the_evaluation_of_a_learner_that_died_ends_when_the_next_one_begins() -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config()
        gate = make_gate(config)
        pool = await opened(config, fleet, gate)
        await take(pool, TREES)
        [engine] = fleet.started[0]
        engine.fault = Fault("grow", "hung")
        orphan = asyncio.create_task(anext(pool.evaluate(PROMPTS, FLAT, SAMPLING, SEED)))
        [replica] = pool.engines.replicas
        while engine.calls.count("grow") < 2 * TREES + len(PROMPTS):
            await asyncio.sleep(0)
        await pool.grow_tickets(Handle(gate), gate.restart(0, None), 0, 1, [])
        with pytest.raises(RuntimeError, match="gave this evaluation up"):
            await orphan
        assert replica.num_trees <= 2 * TREES, "only trees of tickets are left"
        engine.fault = None
        own = [tree async for tree in pool.evaluate(PROMPTS, FLAT, SAMPLING, SEED)]
        assert len(own) == len(PROMPTS)
        await pool.stop()

    run(scenario(Fleet()))


def test_an_evaluation_that_its_caller_cancels_leaves_nothing_behind() -> None:
    async def scenario(fleet: Fleet) -> None:
        pool = await make_pool(make_config(), fleet)
        await serve_from_start(pool)
        fleet.started[0][0].fault = Fault("grow", "hung")
        evaluation = asyncio.create_task(anext(pool.evaluate(PROMPTS, FLAT, SAMPLING, SEED)))
        [replica] = pool.engines.replicas
        while replica.num_trees < len(PROMPTS):
            await asyncio.sleep(0)
        evaluation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await evaluation
        while replica.num_trees:
            await asyncio.sleep(0)
        await pool.stop()

    run(scenario(Fleet()))


# Saved trees -----------------------------------------------------------------------------------


@settings(max_examples=25)
@given(step=st.integers(0, STEPS - 1), turns=st.integers(0, 40), taken=st.integers(0, TREES))
def test_a_pool_goes_on_from_what_another_one_had_not_had_consumed(
    step: int, turns: int, taken: int
) -> None:
    """The first pool is left after `turns` of the event loop in learner step `step`."""

    async def scenario(fleet: Fleet) -> None:
        config = make_config()
        gate = make_gate(config)
        pool = await opened(config, fleet, gate)
        for done in range(step):
            await take(pool, TREES)
            await serve(pool, done + 1)
            gate.consumed(done)
        for _ in range(turns):
            await asyncio.sleep(0)
        await pool.take("reader", taken, 0.0)
        saved = await pool.unconsumed(step * TREES)
        await pool.stop()
        num_saved = sum(len(tree.tree.steps) for tree in saved)
        assert len({tree.ticket for tree in saved}) == len(saved)
        assert saved or turns < 30, "there is something to go on from"

        later = make_gate(config)
        session = later.restart(step, None)
        other = await make_pool(config, fleet)
        await serve_from_start(other, version=step)
        await other.grow_tickets(Handle(later), session, step * TREES, 1, saved)
        assert_whole(await consume(other, later, first=step))
        sampled = fleet.started[0][1].num_sampled
        expected = sum(len(tree) - 1 for tree in EXPECTED[step * TREES :])
        # Steps of a sibling group that was not complete are sampled again, and no others.
        assert sampled == expected - num_saved
        assert len(fleet.of("tree_reused")) == len(saved)
        await other.stop()

    run(scenario(Fleet()))


@settings(max_examples=25)
@given(
    lost=st.integers(0, STEPS - 1),
    back=st.integers(0, 2),
    turns=st.integers(0, 40),
    staleness=st.integers(0, 1),
)
def test_a_learner_that_is_lost_goes_on_from_what_its_own_pool_holds_of_the_versions_that_it_knows(
    lost: int, back: int, turns: int, staleness: int
) -> None:
    """It is lost in learner step `lost`, `turns` of the event loop after its start, and goes on
    from the checkpoint `back` steps before, with the same pool."""

    async def scenario(fleet: Fleet) -> None:
        config = make_config(f"gate.max_staleness={staleness}")
        gate, first = make_gate(config), max(lost - back, 0)
        pool = await opened(config, fleet, gate)
        for done in range(lost):
            await take(pool, TREES)
            await serve(pool, done + 1)
            gate.consumed(done)
        for _ in range(turns):
            await asyncio.sleep(0)
        grown = await pool.recall(first * TREES)
        finished = len(fleet.of("tree_finished"))
        await serve(pool, first)
        for _ in range(30):
            await asyncio.sleep(0)
        assert len(fleet.of("tree_finished")) == finished, "none of what was dropped grows on"
        session = gate.restart(first, None)
        saved = saved_trees.usable(grown, step=first, version=first, gate=config.gate)
        assert all(tree.tree.max_version <= first for tree in saved)
        assert back or len(saved) == len(grown), "they are of no version that was rolled back"
        assert saved or back or turns < 30, "there is something to go on from"
        await pool.grow_tickets(Handle(gate), session, first * TREES, 1, saved)
        assert_whole(await consume(pool, gate, first, reader="the next stream"))
        assert len(fleet.of("tree_reused")) == len(saved)
        await pool.stop()

    run(scenario(Fleet()))


def test_trees_in_the_stream_are_kept_until_their_step_is_consumed() -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config()
        gate = make_gate(config)
        pool = await opened(config, fleet, gate)
        tickets = {tree.ticket for tree in await take(pool, TREES)}
        assert {tree.ticket for tree in await pool.unconsumed(0)} >= tickets
        for step in range(3):
            await serve(pool, step + 1)
            gate.consumed(step)
            await take(pool, TREES)
        kept = [tree.ticket for tree in await pool.unconsumed(0)]
        assert min(kept) >= TREES, "what was consumed steps ago is given up"
        assert sorted(kept) == sorted(set(kept))
        await pool.stop()

    run(scenario(Fleet()))


@pytest.mark.parametrize("other", [(7, SEED + 1), (5, SEED)])
def test_a_saved_tree_of_another_seed_or_prompt_is_not_used(other: tuple[int, int]) -> None:
    num_prompts, seed = other
    new = Gate(
        mixture=one_set(num_prompts),
        trees_per_step=TREES,
        max_staleness=0,
        num_steps=STEPS,
        seed=seed,
        num_children=SHAPE.num_children,
    )
    tickets = [new.ticket(number) for number in range(TREES)]
    expected = [contents(whole_tree(ticket.prompt, ticket.seed)) for ticket in tickets]
    differs = [n for n in range(TREES) if tickets[n] != TICKETS[n]]

    async def scenario(fleet: Fleet) -> None:
        config = make_config("gate.max_staleness=0")
        pool = await opened(config, fleet, make_gate(config))
        saved = await take(pool, TREES)
        await pool.grow_tickets(Handle(new), new.session, 0, 1, saved)
        batch = await take(pool, TREES, "another reader")
        assert {tree.ticket: contents(tree.tree) for tree in batch} == dict(enumerate(expected))
        assert len(fleet.of("tree_reused")) == TREES - len(differs)
        await pool.stop()

    assert differs
    run(scenario(Fleet()))


def test_a_redrawn_tree_is_saved_as_such_and_goes_on_as_such() -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config("gate.max_redraws=2")
        gate = make_gate(config)
        pool = await opened(config, fleet, gate)
        batch = {tree.ticket: tree for tree in await take(pool, TREES)}
        await pool.redraw("reader", batch[2])
        (other_prompt,) = [tree for tree in await take(pool, 1) if tree.ticket == 2]
        saved = await pool.unconsumed(0)
        assert [tree.num_redraws for tree in saved if tree.ticket == 2] == [1]
        await pool.stop()

        other = await make_pool(config, fleet)
        await serve_from_start(other)
        await other.grow_tickets(Handle(gate), gate.restart(0, None), 0, 1, saved)
        (again,) = [tree for tree in await take(other, TREES) if tree.ticket == 2]
        assert contents(again.tree) == contents(other_prompt.tree)
        assert (again.num_redraws, again.redrawn_tokens) == (1, other_prompt.redrawn_tokens)
        assert again.seed == redrawn(gate.ticket(2), 1, mixture=PROMPTS.sets, seed=SEED).seed
        await other.stop()

    run(scenario(Fleet()))


def test_a_redrawn_tree_that_is_of_another_shape_is_grown_anew_as_redrawn_as_it_was() -> None:
    """Its prompt is that of the redraw, whose tokens were sampled whatever becomes of it."""

    async def scenario(fleet: Fleet) -> None:
        config = make_config("gate.max_redraws=2")
        pool = await opened(config, fleet, make_gate(config))
        batch = {tree.ticket: tree for tree in await take(pool, TREES)}
        await pool.redraw("reader", batch[2])
        (past,) = [tree for tree in await take(pool, 1) if tree.ticket == 2]
        await pool.stop()

        gate = make_gate(config, adapt_every=5)  # whose first trees are single answers
        other = await make_pool(config, fleet)
        await serve_from_start(other)
        await other.grow_tickets(Handle(gate), gate.restart(0, None), 0, 1, [past])
        (again,) = [tree for tree in await take(other, TREES) if tree.ticket == 2]
        assert len(again.tree.leaves) == 1
        assert (again.num_redraws, again.redrawn_tokens) == (1, past.redrawn_tokens)
        assert (again.seed, again.prompt_id) == (past.seed, past.prompt_id)
        await other.stop()

    run(scenario(Fleet()))


def counts(tree: Tree) -> set[tuple[int, int]]:
    """Depth and number of children of each step that has some; 0 is the prompt's."""
    depths = [*tree.depths, 0]  # ROOT = -1 is the last
    return {(depths[parent], len(children)) for parent, children in tree.children.items()}


def test_a_tree_has_the_shape_of_its_ticket_redrawn_and_resumed_too() -> None:
    """Step 0 has single answers, step 1 measures, step 2 is grown as was chosen in step 0."""
    chosen = (1, 1, 3)

    async def scenario(fleet: Fleet) -> None:
        config = make_config("gate.max_redraws=2")
        gate = make_gate(config, adapt_every=5)
        pool = await opened(config, fleet, gate)
        for step in range(2):
            batch = await take(pool, TREES)
            found = {children for tree in batch for _, children in counts(tree.tree)}
            assert found == {1 + step}
            await serve(pool, step + 1)
            state = gate.consumed(step, None if step else chosen)
        batch = {tree.ticket: tree for tree in await take(pool, TREES)}
        number, past = next((n, tree) for n, tree in batch.items() if n >= 2 * TREES)
        await pool.redraw("reader", past)
        (again,) = [tree for tree in await take(pool, 1) if tree.ticket == number]
        assert again.num_redraws == 1
        batch[number] = again
        expected = set(enumerate(chosen))
        assert all(counts(tree.tree) <= expected for tree in batch.values())
        assert set().union(*(counts(tree.tree) for tree in batch.values())) == expected
        saved = await pool.unconsumed(2 * TREES)
        await pool.stop()

        later = make_gate(config, adapt_every=5)
        session = later.restart(2, state)
        other = await make_pool(config, fleet)
        await serve_from_start(other, version=2)
        await other.grow_tickets(Handle(later), session, 2 * TREES, 1, saved)
        resumed = {tree.ticket: tree for tree in await take(other, TREES)}
        assert {n: contents(tree.tree) for n, tree in resumed.items()} == {
            n: contents(tree.tree) for n, tree in batch.items()
        }
        assert {event["ticket"] for event in fleet.of("tree_reused")} >= batch.keys()
        await other.stop()

    run(scenario(Fleet()))


def test_a_stream_that_has_ended_gives_no_trees_to_whoever_reads_it_then() -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config()
        gate = make_gate(config)
        pool = await opened(config, fleet, gate)
        await take(pool, TREES)
        await pool.end_stream()
        for reader in ("test", "one that comes late"):
            assert await pool.take(reader, 1, 0.0) is None
        await pool.grow_tickets(Handle(gate), gate.restart(0, None), 0, 1, [])
        assert await take(pool, TREES, reader="of the next run")
        await pool.stop()

    run(scenario(Fleet()))


def test_the_share_of_a_worker_follows_from_the_workers_that_there_are() -> None:
    async def scenario(fleet: Fleet) -> None:
        config = make_config()
        gate = make_gate(config)
        pool = await opened(config, fleet, gate)
        for num_workers, size in ((1, 4), (2, 2), (4, 1)):
            await pool.grow_tickets(Handle(gate), gate.restart(0, None), 0, num_workers, [])
            assert await pool.worker_batch_size() == size
        await pool.stop()

    run(scenario(Fleet()))


def test_trees_that_still_wait_on_their_engine_move_with_those_that_it_has_finished() -> None:
    async def scenario(fleet: Fleet) -> None:
        pool = await make_pool(make_config(), fleet)
        await serve_from_start(pool)
        fleet.started[0][0].fault = Fault("grow", "busy")
        evaluation = pool.evaluate(PROMPTS, FLAT, SAMPLING, SEED)
        await anext(evaluation)
        for tree in pool.growing:
            assert tree.is_on_engine
            tree.last_progress -= 2 * LIMIT_S
        status = await pool.status()
        assert "on engine 0: 0 step groups, the last 1" in status.doing and status.is_busy
        assert stalled([status], LIMIT_S) == []
        await evaluation.aclose()
        await until(lambda: not pool.growing)
        assert not (await pool.status()).is_busy
        await pool.stop()

    run(scenario(Fleet()))
