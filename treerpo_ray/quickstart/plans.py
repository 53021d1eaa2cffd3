"""Plan first: the first line decides, and the rest carries it out, as with a plan or a first guess.

    question   j 51 38 17 26?
    solution   way 2
               1:51
               2:38
               3:17
               4:26
               2:38
               #### 38

A way is the place of the entry that counts. Which of the four is right depends on the question's
letter alone, and nothing in the text tells it. A slip is another way; what follows is only copied.
"""

import random
import string
from dataclasses import dataclass

from treerpo_ray.quickstart.chains import LARGEST, SMALLEST

WAYS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A letter and as many different entries as there are ways."""

    letter: str
    entries: tuple[int, ...]

    @property
    def question(self) -> str:
        """Letter and entries, asked for."""
        return f"{self.letter} {' '.join(map(str, self.entries))}?"

    @property
    def way(self) -> int:
        """The right way: neighbours in the alphabet have different ones."""
        return WAYS[string.ascii_lowercase.index(self.letter) % len(WAYS)]

    @property
    def answer(self) -> str:
        """The entry that counts."""
        return str(self.entries[self.way - 1])

    def write_solution(self, *, slip_rate: float, rng: random.Random) -> str:
        """Write a worked solution; only the first line slips."""
        way = self.way
        if rng.random() < slip_rate:
            way = rng.choice([each for each in WAYS if each != way])
        lines = [f"{number}:{entry}" for number, entry in enumerate(self.entries, start=1)]
        return "\n".join([f"way {way}", *lines, lines[way - 1], f"#### {self.entries[way - 1]}"])


def draw_plan(rng: random.Random) -> Plan:
    """Draw a letter and entries."""
    entries = rng.sample(range(SMALLEST, LARGEST + 1), len(WAYS))
    return Plan(letter=rng.choice(string.ascii_lowercase), entries=tuple(entries))
