"""The gate admits what may be trained in time; a ticket follows from number and shapes."""

import asyncio
from collections.abc import Coroutine

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treerpo_ray.prompts.mixture import Mixture, Turns, one_set
from treerpo_ray.search.gate import Gate, from_state, redrawn, to_state
from treerpo_ray.search.shapes import ChosenShape
from treerpo_ray.task import GateState, Ticket

SMALL = st.integers(1, 7)
SHAPE = (1, 4)


def make_gate(
    num_prompts: int = 10,
    trees_per_step: int = 4,
    max_staleness: int = 1,
    num_steps: int = 5,
    seed: int = 3,
) -> Gate:
    return Gate(
        mixture=one_set(num_prompts),
        trees_per_step=trees_per_step,
        max_staleness=max_staleness,
        num_steps=num_steps,
        seed=seed,
        num_children=SHAPE,
    )


async def now(next_ticket: Coroutine[None, None, Ticket]) -> Ticket | None:
    """The ticket if the gate lets it out at once, else None."""
    try:
        async with asyncio.timeout(0):
            return await next_ticket
    except TimeoutError:
        return None


async def all_now(gate: Gate) -> list[int]:
    """Numbers of the tickets that the gate lets out before it has to wait."""
    numbers = []
    while (ticket := await now(gate.next(gate.session))) is not None:
        numbers.append(ticket.number)
    return numbers


@given(trees=SMALL, staleness=st.integers(0, 4), num_steps=SMALL, data=st.data())
def test_issued_less_consumed_never_exceeds_the_window_and_every_ticket_is_issued_once(
    trees: int, staleness: int, num_steps: int, data: st.DataObject
) -> None:
    async def scenario() -> None:
        gate = make_gate(
            trees_per_step=trees, max_staleness=staleness, num_steps=num_steps, num_prompts=5
        )
        window = trees * (1 + staleness)
        issued: list[int] = []
        for step in range(num_steps):
            issued += await all_now(gate)
            assert len(issued) - step * trees == min(window, (num_steps - step) * trees)
            assert len(issued) >= (step + 1) * trees, "the next batch can always be finished"
            gate.consumed(step)
        assert await all_now(gate) == []
        assert issued == list(range(num_steps * trees))

    asyncio.run(scenario())


@settings(max_examples=30)
@given(num_prompts=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation_of_the_training_set(
    num_prompts: int, seed: int, epoch: int
) -> None:
    gate = make_gate(num_prompts=num_prompts, seed=seed)
    first = epoch * num_prompts
    rows = [gate.ticket(first + place).prompt for place in range(num_prompts)]
    assert sorted(rows) == list(range(num_prompts))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        gate = make_gate(num_prompts=50, seed=seed)
        return [gate.ticket(epoch * 50 + place).prompt for place in range(50)]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@given(number=st.integers(0, 10**6), trees=SMALL, staleness=st.integers(0, 4))
def test_a_ticket_is_a_pure_function_of_its_number(number: int, trees: int, staleness: int) -> None:
    other = make_gate(trees_per_step=trees, max_staleness=staleness)
    other.restart(2, None)
    assert other.ticket(number) == make_gate().ticket(number)


def test_the_seeds_of_trees_are_distinct_and_fit_a_signed_64_bit_number() -> None:
    seeds = {make_gate(seed=seed).ticket(n).seed for seed in (0, 1) for n in range(500)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_tickets_issued_are_those_of_their_numbers_in_order() -> None:
    async def scenario() -> list[Ticket]:
        gate = make_gate()
        return [await gate.next(gate.session) for _ in range(8)]

    assert asyncio.run(scenario()) == [make_gate().ticket(number) for number in range(8)]


def test_those_who_wait_for_a_ticket_are_woken_when_a_step_is_consumed_and_get_one_each() -> None:
    async def scenario() -> None:
        gate = make_gate(trees_per_step=2, max_staleness=0)
        assert await all_now(gate) == [0, 1]
        waiting = [asyncio.create_task(gate.next(gate.session)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        gate.consumed(0)
        async with asyncio.timeout(600):
            done, still = await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
            await asyncio.sleep(0)
        assert sorted(task.result().number for task in done) == [2, 3]
        gate.consumed(1)
        async with asyncio.timeout(600):
            assert [(await task).number for task in still] == [4]

    asyncio.run(scenario())


@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_step_that_is_consumed_twice_or_skips_others_is_refused(step: int) -> None:
    gate = make_gate()
    gate.consumed(0)
    with pytest.raises(RuntimeError, match=f"step {step} consumed, but step 1 is due"):
        gate.consumed(step)
    assert gate.done() == 1


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_restart_issues_the_tickets_from_its_step_on_once_more(step: int) -> None:
    async def scenario() -> None:
        gate = make_gate(trees_per_step=2, max_staleness=1, num_steps=4)
        await all_now(gate)
        gate.consumed(0)
        gate.consumed(1)
        await all_now(gate)
        gate.restart(step, None)
        assert gate.done() == step
        last = min(step + 2, 4) * 2
        assert await all_now(gate) == list(range(step * 2, last))
        gate.consumed(step)
        assert gate.done() == step + 1

    asyncio.run(scenario())


def test_nothing_is_issued_past_the_last_step_and_its_consumption_ends_the_run() -> None:
    async def scenario() -> None:
        gate = make_gate(trees_per_step=2, max_staleness=3, num_steps=2)
        assert await all_now(gate) == [0, 1, 2, 3]
        for step in range(2):
            gate.consumed(step)
        assert await all_now(gate) == []

    asyncio.run(scenario())


def test_a_stop_ends_the_run_with_the_step_that_is_under_way() -> None:
    gate = make_gate(num_steps=5)
    gate.consumed(0)
    assert not gate.is_told_to_stop()
    gate.stop()
    assert gate.is_told_to_stop()
    gate.consumed(1)
    assert gate.done() == 2


def test_who_waits_for_a_ticket_at_the_end_gets_none() -> None:
    async def scenario() -> Ticket | None:
        gate = make_gate(num_prompts=8, trees_per_step=2, max_staleness=0, num_steps=1)
        for _ in range(2):
            await gate.next(0)
        late = asyncio.create_task(gate.next(0))
        await asyncio.sleep(0)
        gate.close()
        return await late

    assert asyncio.run(scenario()) is None


def test_who_waits_from_before_a_restart_gets_no_ticket_of_the_new_session() -> None:
    async def scenario() -> tuple[Ticket | None, list[int]]:
        gate = make_gate(num_prompts=8, trees_per_step=2, max_staleness=0, num_steps=4)
        for _ in range(2):
            await gate.next(0)
        late = asyncio.create_task(gate.next(0))
        await asyncio.sleep(0)
        session = gate.restart(1, None)
        tickets = [await gate.next(session) for _ in range(2)]
        return await late, [ticket.number for ticket in tickets if ticket is not None]

    assert asyncio.run(scenario()) == (None, [2, 3])


def test_tickets_of_several_sets_follow_their_mixture_and_come_again_as_they_were() -> None:
    mixture = Mixture(sizes=(3, 7), weights=(1.0, 1.0))

    def make() -> Gate:
        return Gate(
            mixture=mixture,
            trees_per_step=4,
            max_staleness=1,
            num_steps=50,
            seed=2,
            num_children=SHAPE,
        )

    turns = Turns(mixture=mixture, seed=2)
    prompts = [make().ticket(number).prompt for number in range(60)]
    assert prompts == [turns.prompt(number) for number in range(60)]
    assert sum(prompt < 3 for prompt in prompts) > 20, "not by their sizes"
    again = [redrawn(make().ticket(n), 1, mixture=mixture, seed=2).prompt for n in range(60)]
    assert 20 < sum(prompt < 3 for prompt in again) < 40
    gate = make()
    gate.restart(1, gate.consumed(0))
    assert [gate.ticket(n).prompt for n in range(4, 60)] == prompts[4:]


def test_a_redrawn_ticket_keeps_its_number_and_draws_another_prompt_each_time() -> None:
    ticket = make_gate().ticket(7)

    def again(num_redraws: int) -> Ticket:
        return redrawn(ticket, num_redraws, mixture=one_set(1000), seed=3)

    drawn = [again(n) for n in range(1, 200)]
    assert {(each.number, each.num_children) for each in drawn} == {(7, SHAPE)}
    assert again(1) == drawn[0]
    assert len({ticket.seed for ticket in drawn}) == 199
    # 199 draws of 1000 prompts: 180 different ones are expected, with a deviation of 4
    assert len({ticket.prompt for ticket in drawn}) == pytest.approx(180, abs=16)
    assert max(ticket.prompt for ticket in drawn) < 1000


# Shapes ----------------------------------------------------------------------------------------


SIZE = 10
"""Trees of a learner step, of which eight measure if any does: all but those at 1 and 6."""


def adapting(staleness: int) -> Gate:
    return Gate(
        mixture=one_set(40),
        trees_per_step=SIZE,
        max_staleness=staleness,
        num_steps=14,
        seed=3,
        num_children=SHAPE,
        adapt_every=4,
    )


def adapt(gate: Gate, told: dict[int, int]) -> tuple[dict[int, Ticket], list[GateState]]:
    """Consume all steps, of which some tell the number of answers behind the fork; returns the
    tickets that were let out, and the state after each step."""
    issued: dict[int, Ticket] = {}
    states = []
    while gate.done() < gate.num_steps:
        while gate.issued < gate.limit:
            ticket = asyncio.run(gate.next(gate.session))
            issued[ticket.number] = ticket
        step = gate.done()
        chosen = (1, told[step]) if step in told else None
        states.append(gate.consumed(step, chosen))
    return issued, states


TOLD = st.fixed_dictionaries({}, optional={step: st.integers(1, 16) for step in (1, 5, 9, 13)})
"""A look may tell nothing."""


@settings(max_examples=30, deadline=None)
@given(staleness=st.integers(0, 2), told=TOLD, step=st.integers(1, 13))
def test_a_resumed_run_grows_the_shapes_of_one_without_a_break(
    staleness: int, told: dict[int, int], step: int
) -> None:
    ahead = adapting(staleness)
    whole, states = adapt(ahead, told)
    for gate in (adapting(staleness), ahead):  # in another process, or the same one put back
        gate.restart(step, states[step - 1])
        left = range(step * SIZE, 14 * SIZE)
        assert adapt(gate, told)[0] == {number: whole[number] for number in left}


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_shape_follows_from_steps_that_were_consumed_before_any_of_its_trees_began(
    staleness: int,
) -> None:
    told = {1: 8, 5: 1, 9: 16}
    whole, _ = adapt(adapting(staleness), told)
    for step in range(14):
        known = {past: chosen for past, chosen in told.items() if past <= step - 1 - staleness}
        other = (1, known[max(known)]) if known else (1, 1)
        without, _ = adapt(adapting(staleness), known)
        for place in range(SIZE):
            number = step * SIZE + place
            measures = step in (1, 5, 9, 13) and place not in (1, 6)
            assert whole[number].num_children == (SHAPE if measures else other)
            assert without[number] == whole[number], "whatever is told afterwards"


def test_shapes_come_back_from_a_state_as_they_were() -> None:
    shapes = [ChosenShape(1, (1, 8)), ChosenShape(11, (1, 1, 16))]
    assert from_state(to_state(shapes)) == shapes
    assert from_state(to_state([])) == from_state(None) == []


@pytest.mark.parametrize("state", ["[]", '["p1", "p2"]'])
def test_a_checkpoint_from_before_shapes_were_chosen_holds_none(state: str) -> None:
    assert from_state(GateState(state)) == []
    gate = make_gate()
    session = gate.session
    assert gate.restart(2, GateState(state)) == session + 1
    assert (gate.steps_done, gate.shapes.chosen) == (2, [])
