"""Countdown: reach a target from three numbers, each used once, with + - * and /.

    question   12 3 25=40?
    solution   25+12=37
               37+3=40
               #### (25+12)+3

A line takes two of the values that are left and puts its result in their place; the last line is
the expression. Every value lies in 0..99, and every target can be reached: it was made by a
solution.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

NUM_NUMBERS = 3
SMALL, LARGE = (2, 9), (10, 50)  # ranges of the numbers; either is as likely
LARGEST = 99
SMALLEST_TARGET = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A number of the question, or what a line made of two values."""

    number: int
    expression: str

    @property
    def operand(self) -> str:
        """Its expression as a part of a larger one."""
        return self.expression if self.expression.isdigit() else f"({self.expression})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Two values and what is made of them."""

    left: Value
    sign: str
    right: Value
    result: int

    @property
    def value(self) -> Value:
        """What the line makes of its two values."""
        expression = f"{self.left.operand}{self.sign}{self.right.operand}"
        return Value(number=self.result, expression=expression)

    def __str__(self) -> str:
        return f"{self.left.number}{self.sign}{self.right.number}={self.result}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Countdown:
    """Numbers, and the lines by which the target was made of them."""

    numbers: tuple[int, ...]
    lines: tuple[Line, ...]

    @property
    def question(self) -> str:
        """Numbers and target, asked for."""
        return f"{self.answer}?"

    @property
    def answer(self) -> str:
        """Numbers and target, such as `12 3 25=40`; many expressions may be right."""
        return f"{' '.join(map(str, self.numbers))}={self.lines[-1].result}"

    def write_solution(self, *, slip_rate: float, rng: random.Random) -> str:
        """Write a worked solution; a slip is a line at random, as are all lines after it."""
        values, written, has_slipped = to_values(self.numbers), [], False
        for line in self.lines:
            has_slipped = has_slipped or rng.random() < slip_rate
            written.append(rng.choice(next_lines(values)) if has_slipped else line)
            values = after(values, written[-1])
        return "\n".join([*map(str, written), f"#### {values[0].expression}"])


def to_values(numbers: Sequence[int]) -> list[Value]:
    """The numbers as values that no line has made yet."""
    return [Value(number=number, expression=str(number)) for number in numbers]


def next_lines(values: Sequence[Value]) -> list[Line]:
    """Every line that `values` allow, the larger value first; there is one for any two values."""
    lines = []
    for left, right in permutations(values, 2):
        a, b = left.number, right.number
        if a < b:
            continue
        results = {"+": a + b, "-": a - b}
        if b > 1:
            results["*"] = a * b
            if a % b == 0:
                results["/"] = a // b
        lines += [
            Line(left=left, sign=sign, right=right, result=result)
            for sign, result in results.items()
            if result <= LARGEST
        ]
    return lines


def after(values: Sequence[Value], line: Line) -> list[Value]:
    """The values that are left after a line, its result last."""
    left = list(values)
    left.remove(line.left)
    left.remove(line.right)
    return [*left, line.value]


def draw_countdown(rng: random.Random) -> Countdown:
    """Draw numbers and lines at random; a target that is too small is drawn again."""
    while True:
        numbers = tuple(rng.randint(*rng.choice((SMALL, LARGE))) for _ in range(NUM_NUMBERS))
        values, lines = to_values(numbers), []
        while len(values) > 1:
            lines.append(rng.choice(next_lines(values)))
            values = after(values, lines[-1])
        if values[0].number >= SMALLEST_TARGET:
            return Countdown(numbers=numbers, lines=tuple(lines))
