"""Check: a module that grades answers, as its author writes it and as the verifier calls it.

    def check_answer(text, references):            # or async def; see below
        return 1.0 if text.strip() in references else 0.2

    SELF_TEST = [("4", ["4"], 1.0), {"text": "5", "references": ["4"], "expected": 0.2}]

`check_answer` names what it wants of `text`, `question`, `references`, `row` and `is_cut_off`. It
returns True, False, a number from 0 to 1 (partial credit) or None: the text holds no answer. An
`async def` has the network, many answers at hand at a time, and is asked again where it fails; any
other runs without network, one answer at a time.

If it has them, `find_answer(text, is_cut_off) -> str | None` and `is_equal(answer, other)` tell
which answers are the same, `is_answer(reference)` whether a reference is one that a text can be
graded against.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from types import ModuleType
from typing import Any

from treerpo_ray.verifier.verdict import Answer

INPUTS = ("text", "question", "references", "row", "is_cut_off")
"""What `check_answer` may ask for, by the names of its parameters."""
ROUNDING = 1e-6
"""How far a number may be from the one that SELF_TEST expects; and from 0 or 1, as a sum of parts
may be that should be those."""

Reward = bool | float | None


class WrongReturn(Exception):
    """`check_answer` returned what is no reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """An answer with the reward that it must get."""

    answer: Answer
    expected: tuple[float, float] | None
    """The least and the most; None: the text holds no answer."""

    @property
    def shown(self) -> str:
        """What is expected, in words."""
        if self.expected is None:
            return "unanswered"
        low, high = self.expected
        words = {0.0: "wrong", 1.0: "correct"}
        return words.get(low, f"{low:g}") if low == high else f"from {low:g} to {high:g}"

    def is_met(self, reward: Reward) -> bool:
        """Whether a reward is what is expected."""
        if self.expected is None or reward is None:
            return reward is self.expected
        low, high = self.expected
        return low - ROUNDING <= reward <= high + ROUNDING

    def to_json(self) -> dict[str, object]:
        """As the worker sends it."""
        return {"answer": asdict(self.answer), "expected": self.expected}

    @classmethod
    def from_json(cls, sent: dict) -> "SelfTest":
        """The inverse of `to_json`."""
        fields = sent["answer"] | {"references": tuple(sent["answer"]["references"])}
        expected = sent["expected"]
        ends = None if expected is None else (float(expected[0]), float(expected[1]))
        return cls(answer=Answer(**fields), expected=ends)


class Check:
    """A module's check.

    Raises:
        ValueError: the module is none of a check; one line that says what it must have.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        function = getattr(module, "check_answer", None)
        if not callable(function):
            raise ValueError("has no function check_answer(text, references)")
        self.function: Callable[..., Any] = function
        self.wanted = _wanted(self.function)
        self.is_async = inspect.iscoroutinefunction(self.function)
        if not hasattr(module, "SELF_TEST"):
            raise ValueError(
                "has no SELF_TEST, a list of (text, references, reward that it must get)"
            )
        self.self_test = _self_tests(module.SELF_TEST)

    def arguments(self, answer: Answer) -> dict[str, object]:
        """What `check_answer` is called with."""
        found = {name: getattr(answer, name) for name in self.wanted}
        return found | ({"row": json.loads(answer.row)} if "row" in self.wanted else {})

    def __call__(self, answer: Answer) -> Reward:
        """Reward of an answer, of a check that is not asynchronous.

        Raises:
            WrongReturn: what came back is none. What the check raises goes through.
        """
        return as_reward(self.function(**self.arguments(answer)))


def as_reward(returned: object) -> Reward:
    """What `check_answer` returned, as a reward.

    Raises:
        WrongReturn: it is none.
    """
    if returned is None or isinstance(returned, bool):
        return returned
    if isinstance(returned, Real):
        number = float(returned)
        if -ROUNDING <= number <= 1 + ROUNDING:
            return 0.0 if number < ROUNDING**2 else 1.0 if number > 1 - ROUNDING**2 else number
    if inspect.iscoroutine(returned):
        returned.close()
    raise WrongReturn(
        f"check_answer returned {_clipped(repr(returned))} ({type(returned).__name__}); it must be "
        "True, False, None or a number from 0 to 1"
    )


def _wanted(function: Callable[..., object]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    wanted = []
    for each in parameters:
        is_named = each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        if is_named and each.name in INPUTS:
            wanted.append(each.name)
        elif not is_named or each.default is each.empty:
            raise ValueError(
                f"has check_answer{inspect.signature(function)}, but {each} is none of what it "
                f"may ask for: {', '.join(INPUTS)}"
            )
    if not wanted:
        raise ValueError(f"has a check_answer that asks for none of {', '.join(INPUTS)}")
    return tuple(wanted)


def _self_tests(given: object) -> tuple[SelfTest, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(
            "has a SELF_TEST that is no list of (text, references, reward that it must get)"
        )
    return tuple(_self_test(number, entry) for number, entry in enumerate(given))


def _self_test(number: int, entry: object) -> SelfTest:
    """One entry: (text, references, expected), or a mapping of inputs and `expected`."""
    where = f"has SELF_TEST[{number}]={_clipped(repr(entry))}"
    if isinstance(entry, Mapping):
        fields = dict(entry)
    elif isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 3:
        fields = dict(zip(("text", "references", "expected"), entry, strict=True))
    else:
        raise ValueError(f"{where}, which is neither (text, references, expected) nor a dict")
    if unknown := [key for key in fields if key not in (*INPUTS, "expected")]:
        raise ValueError(f"{where}: {unknown[0]!r} is none of {', '.join(INPUTS)}, expected")
    if not isinstance(fields.get("text"), str) or "expected" not in fields:
        raise ValueError(f"{where} without a text or what is expected of it")
    references = fields.get("references", ())
    is_list = isinstance(references, Sequence) and not isinstance(references, str)
    if not is_list or not all(isinstance(each, str) for each in references):
        raise ValueError(f"{where}: references must be a list of texts")
    try:
        answer = Answer(
            text=fields["text"],
            references=tuple(references),
            is_cut_off=bool(fields.get("is_cut_off", False)),
            question=str(fields.get("question", "")),
            row=json.dumps(fields.get("row", {})),
        )
        return SelfTest(answer=answer, expected=_expected(fields["expected"]))
    except (TypeError, ValueError, WrongReturn) as error:
        raise ValueError(f"{where}: {error}") from error


def _expected(given: object) -> tuple[float, float] | None:
    """A reward, or the least and the most that it may be, as of a judge."""
    ends = given if isinstance(given, tuple | list) else (given, given)
    if len(ends) != 2:
        raise ValueError("what is expected must be a reward, or two: the least and the most")
    low, high = map(as_reward, ends)
    if low is None or high is None:
        return None
    return float(low), float(high)


def _clipped(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
