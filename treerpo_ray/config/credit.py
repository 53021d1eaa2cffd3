"""Credit: the advantage form and the pruning rule of a run, also where they are the user's own.

A form is a function that `learner.advantage` names. Its number of parameters tells what it is of:

    def form(values):                  # of step groups: groups x children
    def form(tree, values):            # of a whole tree; `values.steps` has one a step
    def form(tree, values, baseline):  # and with the mean root value of earlier learner steps

It returns the advantages, in the shape of the values. Each step of a group in which every step has
a value must have one; the values of what stands above a leaf without a verdict, the root's too, are
NaN. A function beside it that is called
`form_error` and has the same parameters gives their standard errors; without, there are none.

A rule is a function that `learner.prune` names: `def rule(groups)` takes `StepGroups` and returns
the number of each that must be above `learner.prune_threshold` for it to be trained.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from treerpo_ray.algo.advantages.forms import AdvantageForm, Form, OwnForm
from treerpo_ray.algo.groups import OwnRule, PruneRule
from treerpo_ray.errors import UserCodeError, one_line
from treerpo_ray.user_code import load_function, load_module, split_function, trace_of

NUM_PARAMETERS = (1, 2, 3)
"""Of a form: what it is of, as above."""


def own_form(name: AdvantageForm | str, sources: Mapping[str, str]) -> Form:
    """The form of that name.

    Raises:
        UserCodeError: there is no such function, or none of a form.
    """
    if isinstance(name, AdvantageForm):
        return name
    function = _loaded("learner.advantage", name, sources)
    count = _num_parameters(name, function)
    if count not in NUM_PARAMETERS:
        raise UserCodeError(
            f"learner.advantage={name} has {count} parameters; a form is called with (values), "
            "(tree, values) or (tree, values, baseline)"
        )
    module_name, function_name = split_function(name)
    error = getattr(load_module(module_name, sources), f"{function_name}_error", None)
    if error is not None and _num_parameters(name, error) != count:
        raise UserCodeError(f"learner.advantage={name}: {function_name}_error has other parameters")
    return OwnForm(
        name=name,
        num_parameters=count,
        function=partial(_called, f"learner.advantage={name}", function),
        error=None if error is None else partial(_called, f"learner.advantage={name}", error),
    )


def own_rule(name: PruneRule | str, sources: Mapping[str, str]) -> PruneRule | OwnRule:
    """The rule of that name.

    Raises:
        UserCodeError: there is no such function, or none of a rule.
    """
    if isinstance(name, PruneRule):
        return name
    function = _loaded("learner.prune", name, sources)
    if (count := _num_parameters(name, function)) != 1:
        raise UserCodeError(f"learner.prune={name} has {count} parameters; a rule has (groups)")
    return OwnRule(name=name, function=partial(_called, f"learner.prune={name}", function))


def _loaded(key: str, name: str, sources: Mapping[str, str]) -> Callable[..., object]:
    try:
        return load_function(name, sources)
    except UserCodeError as error:
        raise UserCodeError(f"{key}={name}: {error.message}", error.trace) from error


def _num_parameters(name: str, function: Callable[..., object]) -> int:
    """Parameters that a function must be given, all by their place."""
    parameters = inspect.signature(function).parameters.values()
    needed = [each for each in parameters if each.default is each.empty]
    if any(each.kind not in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in needed):
        raise UserCodeError(
            f"{name} takes {inspect.signature(function)}; its parameters must be plain ones"
        )
    return len(needed)


def _called(setting: str, function: Callable[..., object], *arguments: object) -> np.ndarray:
    """What a function of the user's returns, as numbers.

    Raises:
        UserCodeError: it fails, or returns something else.
    """
    try:
        return np.asarray(function(*arguments), dtype=np.float64)
    except Exception as error:
        message = f"{setting}: {type(error).__name__}: {one_line(error)}"
        raise UserCodeError(message, trace_of(error)) from error
