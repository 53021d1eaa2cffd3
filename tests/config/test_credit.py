"""Credit: a form or a rule of the user's is what its parameters say, and else one clear line."""

import re

import numpy as np
import pytest

from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.algo.groups import PruneRule
from treerpo_ray.config.credit import own_form, own_rule
from treerpo_ray.errors import UserCodeError
from treerpo_ray.user_code import pack

SOURCES = {
    "mine.py": pack("""
def groups(values): return values - values.mean(-1, keepdims=True)
def tree(tree, values, *, scale=2.0): return values * scale
def baseline(tree, values, baseline): return values - baseline
def baseline_error(tree, values, baseline): return values * 0
def none(): return 0
def four(a, b, c, d): return a
def by_name(values, *, scale): return values
def unequal(tree, values): return values
def unequal_error(values): return values
def fails(values): return values["first"]
def text(values): return "much"
def rule(groups): return [1, 2]
def rule_of_two(groups, threshold): return groups
""")
}


def test_names_of_the_package_stand_for_themselves() -> None:
    assert own_form(AdvantageForm.BERNOULLI, {}) is AdvantageForm.BERNOULLI
    assert own_rule(PruneRule.RANGE, {}) is PruneRule.RANGE


@pytest.mark.parametrize(
    ("name", "count", "arguments", "expected"),
    [
        ("groups", 1, ([[1.0, 3.0]],), [[-1.0, 1.0]]),
        ("tree", 2, (None, [1.0]), [2.0]),
        ("baseline", 3, (None, [1.0], 0.25), [0.75]),
    ],
)
def test_a_form_is_called_with_as_much_as_it_has_parameters_without_a_default(
    name: str, count: int, arguments: tuple[object, ...], expected: list[object]
) -> None:
    form = own_form(f"mine.py:{name}", SOURCES)
    given = [np.asarray(each) if isinstance(each, list) else each for each in arguments]
    assert form.num_parameters == count and form.name == f"mine.py:{name}"
    np.testing.assert_array_equal(form.function(*given), expected)
    assert (form.error is not None) == (name == "baseline")


def test_a_rule_gives_numbers_whatever_kind_of_list_it_returns() -> None:
    rule = own_rule("mine.py:rule", SOURCES)
    np.testing.assert_array_equal(rule.function(None), np.array([1.0, 2.0]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "learner.advantage=mine.py:none has 0 parameters; a form is called with (values)"),
        ("four", "learner.advantage=mine.py:four has 4 parameters; a form is called with (values)"),
        ("by_name", "mine.py:by_name takes (values, *, scale); its parameters must be plain ones"),
        ("unequal", "learner.advantage=mine.py:unequal: unequal_error has other parameters"),
        ("missing", "learner.advantage=mine.py:missing: mine.py has no function missing; it has "),
    ],
)
def test_what_is_no_form_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserCodeError, match=f"^{re.escape(words)}"):
        own_form(f"mine.py:{name}", SOURCES)


def test_what_is_no_rule_is_refused() -> None:
    words = r"learner\.prune=mine\.py:rule_of_two has 2 parameters; a rule has \(groups\)"
    with pytest.raises(UserCodeError, match=f"^{words}$"):
        own_rule("mine.py:rule_of_two", SOURCES)


@pytest.mark.parametrize(("name", "error"), [("fails", "IndexError"), ("text", "ValueError")])
def test_what_a_form_runs_into_is_told_with_its_setting_and_the_users_line(
    name: str, error: str
) -> None:
    form = own_form(f"mine.py:{name}", SOURCES)
    with pytest.raises(UserCodeError) as caught:
        form.function(np.zeros(2))
    assert caught.value.message.startswith(f"learner.advantage=mine.py:{name}: {error}: ")
    assert ('File "mine.py"' in caught.value.trace) == (name == "fails")
