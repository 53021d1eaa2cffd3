"""The embedded task: chains of additions and subtractions of two-digit numbers, one line a step.

    question   51-38+17-16+26=?
    solution   51-38=13
               13+17=30
               30-16=14
               14+26=40
               #### 40

Every operand and every intermediate result lies in 10..99, and every line carries or borrows. So a
question has 16 bytes, a line 9 with its newline and a solution 43. A problem belongs to the test
split iff the checksum of its question says so, whatever the seed: the splits cannot overlap.
"""

import argparse
import json
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

NUM_LINES = 4
SMALLEST, LARGEST = 10, 99
SPLITS = ("train", "test")
TEST_SHARE = 8  # one question in this many belongs to the test split


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem: `id` names split and seed, `answer` is the result in decimal digits."""

    id: str
    question: str
    answer: str
    solution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """`first`, to which the signed `operands` are added from left to right."""

    first: int
    operands: tuple[int, ...]

    @property
    def question(self) -> str:
        return f"{self.first}{''.join(f'{operand:+d}' for operand in self.operands)}=?"

    @property
    def split(self) -> str:
        return "test" if zlib.crc32(self.question.encode()) % TEST_SHARE == 0 else "train"


def add_without_carry(value: int, operand: int) -> int:
    """Add a signed operand as two classic schoolbook bugs do; right where nothing is carried.

    An addition forgets the carry (38+47=75); a subtraction takes the smaller digit of the units
    from the larger (52-27=35).
    """
    if operand > 0:
        return value + operand - 10 * (value % 10 + operand % 10 >= 10)
    return value + operand + 2 * max(0, -operand % 10 - value % 10)


OPERANDS = {
    value: [
        operand
        for operand in range(-LARGEST, LARGEST + 1)
        if abs(operand) >= SMALLEST
        and SMALLEST <= value + operand <= LARGEST
        and add_without_carry(value, operand) != value + operand
    ]
    for value in range(SMALLEST, LARGEST + 1)
}


def draw_chain(rng: random.Random) -> Chain:
    """Draw a chain in which every line carries; one that runs into a dead end is drawn again."""
    first = value = rng.randint(SMALLEST, LARGEST)
    operands: list[int] = []
    while len(operands) < NUM_LINES:
        if not OPERANDS[value]:
            return draw_chain(rng)
        operands.append(rng.choice(OPERANDS[value]))
        value += operands[-1]
    return Chain(first=first, operands=tuple(operands))


def draw_chains(split: str, rng: random.Random) -> Iterator[Chain]:
    """Draw chains of one split without end; raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    while True:
        chain = draw_chain(rng)
        if chain.split == split:
            yield chain


def write_solution(chain: Chain, *, slip_rate: float, rng: random.Random) -> str:
    """Write a worked solution, one line a step, then `####` and the result.

    With probability `slip_rate` a line is added without carry, and the solver goes on from the
    wrong result; a slip rate of 0 gives the correct solution.
    """
    value, lines = chain.first, []
    for operand in chain.operands:
        has_slipped = rng.random() < slip_rate
        result = add_without_carry(value, operand) if has_slipped else value + operand
        lines.append(f"{value}{operand:+d}={result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


def problems(split: str, num: int, seed: int) -> list[Problem]:
    """Return `num` different problems of a split; the same arguments give the same problems.

    Raises ValueError for an unknown split.
    """
    rng = random.Random(f"{split}-{seed}")
    chains = draw_chains(split, rng)
    found: dict[str, Problem] = {}
    while len(found) < num:
        chain = next(chains)
        if chain.question not in found:
            found[chain.question] = Problem(
                id=f"{split}-{seed}-{len(found)}",
                question=chain.question,
                answer=str(chain.first + sum(chain.operands)),
                solution=write_solution(chain, slip_rate=0.0, rng=rng),
            )
    return list(found.values())


def write_problems(path: Path, rows: list[Problem]) -> None:
    """Write problems as JSONL rows {id, question, answer, solution}."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Write problems of the embedded task as JSONL.")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--num", type=int, required=True, help="number of problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(arguments)
    write_problems(args.out, problems(args.split, args.num, args.seed))


if __name__ == "__main__":
    main(sys.argv[1:])
