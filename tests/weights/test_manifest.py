"""A GPU's digest is the sum that its definition says, and tells any change of words or places."""

import numpy as np
import pytest
import torch

from treerpo_ray.weights.manifest import BLOCK, DeviceDigest

MASK = 2**64 - 1


def mix(word: int) -> int:
    """SplitMix64's finalizer, in Python's integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def words_of(count: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)
    return torch.from_numpy(random.view(np.int64))


def digest(*pieces: torch.Tensor) -> str:
    made = DeviceDigest()
    for piece in pieces:
        made.update(piece.view(torch.uint8))
    return made.hexdigest()


def test_the_mix_is_that_of_splitmix64() -> None:
    """First outputs of the generator with seed 1234567, as its reference implementation prints."""
    gamma, state, found = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        state = state + gamma & MASK
        found.append(mix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("count", [1, 8, 77])
def test_the_digest_is_the_sum_of_mixed_words_and_places(count: int) -> None:
    words = words_of(count)
    numbers = words.numpy().view(np.uint64).tolist()
    total = sum(mix(word ^ mix(place + 1)) for place, word in enumerate(numbers)) + mix(count)
    assert digest(words) == f"{total & MASK:016x}"


def test_pieces_and_blocks_do_not_change_it() -> None:
    words = words_of(BLOCK + 24)
    assert digest(words) == digest(words[:8], words[8 : BLOCK + 16], words[BLOCK + 16 :])


def test_a_flipped_bit_a_swap_and_what_is_missing_change_it() -> None:
    words = words_of(64)
    words[10] = words[20] + 2**40
    found = {digest(words), digest(words[:-8])}
    for bit in range(64):
        changed = words.clone()
        changed[bit] ^= 1 << (bit if bit < 63 else 0)
        found.add(digest(changed))
    swapped = words.clone()
    swapped[[10, 20]] = words[[20, 10]]
    found.add(digest(swapped))
    zeros = torch.zeros(8, dtype=torch.int64)
    found |= {digest(words, zeros), digest(zeros, words), digest(zeros), digest(zeros[:0])}
    assert len(found) == 2 + 64 + 1 + 4
