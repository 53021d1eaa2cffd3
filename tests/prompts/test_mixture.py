"""A mixture's turns: shares by weight, no repetition within a set, the same for each resume."""

from collections import Counter

import numpy as np
import pytest

from treerpo_ray.prompts.mixture import BLOCK, Mixture, Turns, one_set

THREE = Mixture(sizes=(5, 40, 3000), weights=(1.0, 2.0, 5.0))


def sets_of(prompts: list[int], mixture: Mixture) -> list[int]:
    bounds = np.cumsum(mixture.sizes)
    return np.searchsorted(bounds, prompts, side="right").tolist()


def test_one_set_takes_turns_as_it_did_before_there_were_several() -> None:
    turns = Turns(mixture=one_set(7), seed=3)
    for number in (0, 1, 6, 7, 20, 700):
        epoch, place = divmod(number, 7)
        expected = np.random.default_rng((3, epoch)).permutation(7)[place]
        assert turns.prompt(number) == expected
    assert one_set(7).at(2**63 + 5) == (2**63 + 5) % 7


def test_each_set_gets_its_share_and_none_of_its_prompts_comes_again_before_all_others() -> None:
    turns, number = Turns(mixture=THREE, seed=1), 3 * BLOCK + 17
    prompts = [turns.prompt(n) for n in range(number)]
    assert min(prompts) >= 0 and max(prompts) < sum(THREE.sizes)
    found = sets_of(prompts, THREE)
    counts = Counter(found)
    for chosen, share in enumerate((0.125, 0.25, 0.625)):
        deviation = (number * share * (1 - share)) ** 0.5
        assert abs(counts[chosen] - number * share) < 4 * deviation
        own = [p for p, s in zip(prompts, found, strict=True) if s == chosen]
        size = THREE.sizes[chosen]
        for start in range(0, len(own), size):
            assert len(set(own[start : start + size])) == len(own[start : start + size])
    firsts = [p for p, s in zip(prompts, found, strict=True) if s == 0]
    assert firsts[:5] != firsts[5:10], "each of its epochs has an order of its own"


def test_a_turn_is_a_function_of_number_and_seed_alone() -> None:
    numbers = (0, 5, BLOCK - 1, BLOCK, 5 * BLOCK + 3)
    inorder, fresh = (
        Turns(mixture=THREE, seed=4),
        [Turns(mixture=THREE, seed=4).prompt(n) for n in numbers],
    )
    assert [inorder.prompt(n) for n in numbers] == fresh
    assert [inorder.prompt(n) for n in reversed(numbers)] == fresh[::-1]
    assert [Turns(mixture=THREE, seed=5).prompt(n) for n in range(50)] != [
        Turns(mixture=THREE, seed=4).prompt(n) for n in range(50)
    ]


@pytest.mark.parametrize(
    ("share", "prompt"),
    [(0.0, 0), (0.124, 4), (0.125, 5), (0.3749, 44), (0.375, 45), (0.6875, 1545), (1.0, 3044)],
)
def test_random_bits_stand_for_a_prompt_by_the_weight_of_its_set(share: float, prompt: int) -> None:
    # 1/8, 2/8 and 5/8: 0.6875 is in the middle of the last set, 45 + 3000 / 2
    assert THREE.at(min(int(share * 2**64), 2**64 - 1)) == prompt


def test_random_bits_never_lead_out_of_the_sets() -> None:
    rng = np.random.default_rng(0)
    mixture = Mixture(sizes=(1, 2, 3), weights=(0.1, 0.7, 0.2))
    words = [0, 2**64 - 1, *rng.integers(0, 2**64, 3000, np.uint64).tolist()]
    counts = Counter(mixture.at(word) for word in words)
    assert set(counts) == set(range(6))
    assert counts[1] / len(words) == pytest.approx(0.35, abs=0.04)
