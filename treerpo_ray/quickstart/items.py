"""Graded items: six small sums, each of which counts, as unit tests or the lines of a rubric do.

    question   38+47 52-27 31&58 64&12 45-18 29+33?
    solution   38+47=85
               52-27=25
               31&58=38
               64&12=62
               45-18=27
               29+33=62

An item is of one of three kinds: an addition, a subtraction, either of which carries or borrows,
or a joint: tens of the first number and units of the second. Every question has two of each kind,
in an order drawn for it, so that no skill belongs to a place. Every number has two digits: an item
has nine bytes with its newline.
"""

import random
from dataclasses import dataclass

from treerpo_ray.quickstart.chains import LARGEST, OPERANDS, SMALLEST, add_without_carry

SIGNS = "+-&"
ITEMS_A_KIND = 2
NUM_ITEMS = ITEMS_A_KIND * len(SIGNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Two numbers and what is to be done with them."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """What is right."""
        match self.sign:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
        return join(self.left, self.right)

    @property
    def slip(self) -> int:
        """What a slip makes of it: a sum without carry, or a joint the other way round."""
        if self.sign == "&":
            return join(self.right, self.left)
        return add_without_carry(self.left, self.right if self.sign == "+" else -self.right)

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}"


@dataclass(frozen=True, slots=True)
class ItemList:
    """A question of several items."""

    items: tuple[Item, ...]

    @property
    def question(self) -> str:
        """The items, asked for."""
        return f"{' '.join(map(str, self.items))}?"

    @property
    def answer(self) -> str:
        """The right lines in their order, such as `38+47=85 52-27=25`."""
        return " ".join(f"{item}={item.result}" for item in self.items)

    def write_solution(self, *, slip_rate: float, rng: random.Random) -> str:
        """Write a line for each item; none depends on another."""
        return "\n".join(
            f"{item}={item.slip if rng.random() < slip_rate else item.result}"
            for item in self.items
        )


def join(tens: int, units: int) -> int:
    """The tens of one number with the units of another."""
    return tens - tens % 10 + units % 10


def draw_item(sign: str, rng: random.Random) -> Item:
    """Draw an item whose slip is not right; a dead end is drawn again."""
    while True:
        left = rng.randint(SMALLEST, LARGEST)
        if sign == "&":
            rights = [right for right in range(SMALLEST, LARGEST + 1) if right != left]
        else:
            rights = [abs(each) for each in OPERANDS[left] if (each > 0) == (sign == "+")]
        if rights:
            return Item(left=left, sign=sign, right=rng.choice(rights))


def draw_items(rng: random.Random) -> ItemList:
    """Draw the items of a question, in any order of their kinds."""
    signs = list(SIGNS * ITEMS_A_KIND)
    rng.shuffle(signs)
    return ItemList(tuple(draw_item(sign, rng) for sign in signs))
