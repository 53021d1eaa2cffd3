"""The curriculum: weights by hand, draws against their closed form, and nothing lost on disk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.search.curriculum import Curriculum, Measurement

MEASURED = [
    Measurement(0, 3, 0.5),
    Measurement(0, 1, 0.25),
    Measurement(0, 6, 0.5),
    Measurement(1, 4, 1.0),
    Measurement(1, 2, 0.0),
    Measurement(1, 1, 0.125),
    Measurement(2, 6, 1.0),
    Measurement(2, 0, 0.75),
    Measurement(2, 0, 0.5),
]


def test_a_prompt_weighs_what_its_newest_value_up_to_a_step_says() -> None:
    drawn = Curriculum(share=0.5, seed=0, measurements=MEASURED)
    assert drawn.weights(-1) == {}
    assert drawn.weights(0) == {1: 3 / 16, 3: 1 / 4, 6: 1 / 4}
    assert drawn.weights(1) == {1: 7 / 64, 3: 1 / 4, 6: 1 / 4}
    # Prompt 6 is solved now; of two trees of a step the last one counts.
    assert drawn.weights(2) == drawn.weights(9) == {0: 1 / 4, 1: 7 / 64, 3: 1 / 4}


def test_a_prompt_with_partial_credit_weighs_what_its_rewards_vary() -> None:
    """Half right everywhere tells nothing apart; right or wrong as often tells most."""
    measured = [Measurement(0, 1, 0.5, 0.0), Measurement(0, 2, 0.5, 0.0625), Measurement(0, 3, 0.5)]
    drawn = Curriculum(share=0.5, seed=0, measurements=measured)
    assert drawn.weights(0) == {2: 1 / 16, 3: 1 / 4}
    drawn.add([], 0)
    assert drawn.measurements == measured[1:]


def test_tickets_come_back_as_often_as_set_and_to_each_prompt_in_proportion_to_its_weight() -> None:
    share, num_tickets = 0.3, 6000
    drawn = Curriculum(share=share, seed=5, measurements=MEASURED)
    found = [drawn.revisited(number, 1) for number in range(num_tickets)]
    total = 7 / 64 + 1 / 4 + 1 / 4
    for prompt, weight in {1: 7 / 64, 3: 1 / 4, 6: 1 / 4}.items():
        chance = share * weight / total
        deviation = (chance * (1 - chance) / num_tickets) ** 0.5
        assert found.count(prompt) / num_tickets == pytest.approx(chance, abs=4 * deviation)
    rest = found.count(None) / num_tickets
    assert rest == pytest.approx(1 - share, abs=4 * (share * (1 - share) / num_tickets) ** 0.5)
    assert set(found) == {None, 1, 3, 6}


@pytest.mark.parametrize(
    ("share", "last_step", "measured"),
    [(0.0, 2, MEASURED), (0.99, -1, MEASURED), (0.99, 2, []), (0.99, 2, MEASURED[3:5])],
)
def test_no_ticket_comes_back_where_it_is_off_or_no_prompt_has_weight(
    share: float, last_step: int, measured: list[Measurement]
) -> None:
    drawn = Curriculum(share=share, seed=5, measurements=measured)
    assert {drawn.revisited(number, last_step) for number in range(100)} == {None}


def test_seeds_and_tickets_draw_differently() -> None:
    def found(seed: int) -> list[int | None]:
        return [
            Curriculum(share=0.5, seed=seed, measurements=MEASURED).revisited(number, 1)
            for number in range(50)
        ]

    assert found(0) == found(0) != found(1)
    assert len(set(found(0))) == 4


VALUES = st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@given(steps=st.lists(st.lists(VALUES, max_size=4), max_size=6), staleness=st.integers(0, 3))
def test_what_is_given_up_is_nothing_that_later_tickets_ask_for(
    steps: list[list[tuple[int, float]]], staleness: int
) -> None:
    drawn, everything = Curriculum(share=0.5, seed=0), []
    for step, values in enumerate(steps):
        own = [Measurement(step, prompt, value) for prompt, value in values]
        everything += own
        drawn.add(own, step - staleness)
        whole = Curriculum(share=0.5, seed=0, measurements=everything)
        for last_step in range(step - staleness, step + 1):
            assert drawn.weights(last_step) == whole.weights(last_step)
        assert len(drawn.measurements) <= 5 + 4 * staleness, "bounded by prompts and window"
