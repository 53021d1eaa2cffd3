"""Arithmetic: chains of additions and subtractions of two-digit numbers, one line a step.

    question   51-38+17-16+26=?
    solution   51-38=13
               13+17=30
               30-16=14
               14+26=40
               #### 40

Every operand and every intermediate result lies in 10..99, and every line carries or borrows. So a
chain of n lines has a question of 3n+4 bytes, and a solution of 9n+7 with its newlines.
"""

import random
from dataclasses import dataclass

SMALLEST, LARGEST = 10, 99
PARTS_SLIP = 2.0
"""How much more often a line in two parts slips."""
CHECK_RATE = 2 / 3
"""How often lines that are written, or were checked, are checked once more."""
MOST_CHECKS = 6
"""Of four lines that makes 260 tokens, which a model has room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """`first`, to which the signed `operands` are added from left to right."""

    first: int
    operands: tuple[int, ...]

    @property
    def question(self) -> str:
        """The chain as a sum to work out."""
        return f"{self.first}{''.join(f'{operand:+d}' for operand in self.operands)}=?"

    @property
    def answer(self) -> str:
        """The result in decimal digits."""
        return str(self.first + sum(self.operands))

    def write_solution(self, *, slip_rate: float, rng: random.Random) -> str:
        """Write a worked solution; a slip is a line that is added without carry."""
        value, lines = self.first, []
        for operand in self.operands:
            line, value = self.write_line(value, operand, slip_rate, rng)
            lines.append(line)
        return "\n".join([*lines, f"#### {value}"])

    def write_line(
        self, value: int, operand: int, slip_rate: float, rng: random.Random
    ) -> tuple[str, int]:
        """One line of a solution and what it comes to."""
        has_slipped = rng.random() < slip_rate
        result = add_without_carry(value, operand) if has_slipped else value + operand
        return f"{value}{operand:+d}={result}", result


class WordyChain(Chain):
    """A chain whose solver writes every other line in two parts, first the tens, then the units.

    In those lines it slips more often, so that the shorter answer is the safer one.
    """

    def write_line(
        self, value: int, operand: int, slip_rate: float, rng: random.Random
    ) -> tuple[str, int]:
        """As in a plain chain, or as 38+47=78+7=85."""
        if rng.random() < 0.5:
            return super().write_line(value, operand, slip_rate, rng)
        units = operand % 10 if operand > 0 else -(-operand % 10)
        tens = value + operand - units
        part, result = super().write_line(tens, units, PARTS_SLIP * slip_rate, rng)
        return f"{value}{operand:+d}={part}", result


class CheckedChain(Chain):
    """A chain whose solver checks its lines before it answers: it writes all of them once more.

        51-38=13
        13+17=30
        30-16=14
        14+26=40 51-38=13 13+17=30 30-16=14 14+26=40
        #### 40

    It does so with probability `CHECK_RATE`, and after each check again. A check finds nothing, for
    it is a copy: it takes tokens alone. On average all lines are written nearly three times.
    """

    def write_solution(self, *, slip_rate: float, rng: random.Random) -> str:
        """Write a plain chain with the checks behind its last line."""
        *lines, answer = super().write_solution(slip_rate=slip_rate, rng=rng).split("\n")
        num_checks = 0
        while num_checks < MOST_CHECKS and rng.random() < CHECK_RATE:
            num_checks += 1
        return "\n".join([*lines[:-1], " ".join(lines[-1:] + num_checks * lines), answer])


class RestatedChain(Chain):
    """A chain whose solver first says again what is asked, without a slip, then works it out.

        The chain begins with the number 51.
        In step 1 of 4 the number 38 is taken away.
        In step 2 of 4 the number 17 is then added.
        In step 3 of 4 the number 16 is taken away.
        In step 4 of 4 the number 26 is then added.
        51-38+17-16+26=?
        51-38=13
        ...

    The restatement is five times as long as the rest, in which everything is decided. It ends with
    the only question mark of a solution.
    """

    def write_solution(self, *, slip_rate: float, rng: random.Random) -> str:
        """Write the restatement, then the lines of a plain chain."""
        steps = [
            f"In step {number} of {len(self.operands)} the number {abs(operand)} is "
            f"{'then added' if operand > 0 else 'taken away'}."
            for number, operand in enumerate(self.operands, start=1)
        ]
        first = f"The chain begins with the number {self.first}."
        rest = super().write_solution(slip_rate=slip_rate, rng=rng)
        return "\n".join([first, *steps, self.question, rest])


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


def draw_chain(num_lines: int, rng: random.Random, kind: type[Chain] = Chain) -> Chain:
    """Draw a chain in which every line carries; one that runs into a dead end is drawn again."""
    while True:
        first = value = rng.randint(SMALLEST, LARGEST)
        operands: list[int] = []
        while len(operands) < num_lines and OPERANDS[value]:
            operands.append(rng.choice(OPERANDS[value]))
            value += operands[-1]
        if len(operands) == num_lines:
            return kind(first=first, operands=tuple(operands))
