"""The plan: what a run will do and need, in plain words, before anything is started."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.algo.forks.adaptive_shape import num_measured
from treerpo_ray.algo.groups import PruneRule
from treerpo_ray.config import Config
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.config.verifier import VerifierConfig
from treerpo_ray.driver.cluster import Available, look_at_resources, starting_stages
from treerpo_ray.preflight.inputs import DataSet, Preflight, num_parameters, set_name
from treerpo_ray.preflight.machine import check_gpus, check_vllm
from treerpo_ray.preflight.memory import MemoryPlan, needs_more_memory, number
from treerpo_ray.preflight.model_check import ModelFacts
from treerpo_ray.preflight.model_sizes import most_tokens
from treerpo_ray.preflight.pace import lines as pace_lines
from treerpo_ray.preflight.placement import check_places, missing_resources, needed_resources
from treerpo_ray.preflight.trial import own_checks
from treerpo_ray.preflight.unusual import unusual
from treerpo_ray.run_folder.files import RunFolder

SHOWN_CHARS = 150
"""Of the beginning and of the end of a prompt."""


def plan_lines(
    config: Config,
    found: Preflight,
    look: Callable[[Config], Available] = look_at_resources,
) -> list[str]:
    """The plan in plain words, a line each; what is missing or unchecked comes last.

    `look` tells what there is of resources.
    """
    gate, run = config.gate, config.run
    trees, minibatches = gate.trees_per_step, config.learner.minibatches
    in_flight = trees * (1 + gate.max_staleness)
    max_steps = max(shape.max_steps for shape in config.shapes)
    length = f"{run.num_steps} learner steps, {run.num_steps * trees:,} trees"
    if found.train is not None and found.train.prompts is not None:
        length += _epochs(found.train, run.num_steps * trees)
    if run.max_sampled_tokens is not None:
        length += f", or {run.max_sampled_tokens:,} sampled tokens"
    needed = needed_resources(config, config.engine.num_engines)
    at_most = needed_resources(config, config.engine.most)
    return [
        f"run         {config.folder}",
        f"model       {config.model.path}: {_size_line(config, found.model)}",
        *_adapter_lines(config, found.model),
        *_quantization_lines(config),
        *_data_lines("data", found.train),
        *_data_lines("held out", found.held_out),
        *_prompt_lines(config, found.train),
        *(f"no answer   {each}" for each in found.references),
        f"reward      {_reward(config.verifier)}",
        *_credit_lines(config.learner),
        f"tree        {_tree_line(config)}",
        f"step        {trees} trees: up to {trees * max_steps:,} requests and "
        f"{trees * config.largest_shape.max_sampled_tokens:,} sampled tokens, "
        f"{counted(minibatches, 'optimizer step')}",
        *_budget_lines(config),
        f"staleness   at most {counted(gate.max_staleness, 'version')}: "
        f"{in_flight} trees in flight",
        *(f"pace        {line}" for line in pace_lines(config, RunFolder(config.folder))),
        f"run length  {length}, up to {run.num_steps * minibatches:,} optimizer steps",
        *_memory_lines(config, found.model),
        f"disk        {found.storage}",
        "resources   "
        + ", ".join(f"{name} {_range(needed[name], at_most[name])}" for name in needed),
        *_missing_lines(config, found.model, look),
        *_shared_lines(found),
        *(f"unusual     {line}" for line in unusual(config)),
        *(f"unchecked   {line}" for line in found.unchecked),
    ]


def _tree_line(config: Config) -> str:
    """What one tree is, at most."""
    shape, shapes = config.shape, config.shapes
    tokens = f"of at most {list(shape.step_tokens)} tokens"
    if not config.tree.adaptive:
        return (
            f"{list(shape.num_children)} children {tokens}: up to {shape.max_steps:,} steps, "
            f"{shape.max_leaves:,} answers and {shape.max_sampled_tokens:,} tokens a question"
        )
    _, single, *forks = (list(each.num_children) for each in shapes)
    sizes = [each.max_sampled_tokens for each in shapes]
    return (
        f"{list(shape.num_children)} children {tokens} measure forks, "
        f"{num_measured(config.gate.trees_per_step)} trees in one learner step of "
        f"{config.learner.fork_every}; all others are the best fork, up to "
        f"{' or '.join(map(str, forks))}, or single answers, {single}, where none pays: at most "
        f"{min(sizes):,} to {max(sizes):,} tokens a question, by shape"
    )


def _reward(settings: VerifierConfig) -> str:
    """The checks, of which those that are the user's own have been tried before there is a plan."""
    return f"{settings.identity}{', which passed SELF_TEST' if own_checks(settings) else ''}"


def _credit_lines(settings: LearnerConfig) -> list[str]:
    """Functions of the user's that make credit, which have been tried likewise."""
    own = {"advantage": (settings.advantage, AdvantageForm), "prune": (settings.prune, PruneRule)}
    names = [f"{key} {name}" for key, (name, kind) in own.items() if not isinstance(name, kind)]
    return [f"credit      {' and '.join(names)}, tried on trees of every kind"] if names else []


def counted(number: int, what: str) -> str:
    """A number of things: `1 version`, `2 versions`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _epochs(data: DataSet, trees: int) -> str:
    """How often a run of so many trees goes through its data sets."""
    assert data.prompts is not None
    if (mixture := data.prompts.mixture) is None:
        return f", {number(trees / len(data.prompts))} epochs"
    sets = zip(map(set_name, data.parts), mixture.shares, mixture.sizes, strict=True)
    parts = (f"{number(trees * share / size)} epochs of {name}" for name, share, size in sets)
    return f", {', '.join(parts)}"


def _shared_lines(found: Preflight) -> list[str]:
    if not found.num_trained_too or found.held_out is None:
        return []
    total = sum(len(part.problems) for part in found.held_out.parts.values())
    return [
        f"unusual     evaluate.data.path: {found.num_trained_too:,} of its {total:,} problems are "
        "trained on, too; what comes out tells little of new ones"
    ]


def _budget_lines(config: Config) -> list[str]:
    """Where a forward pass is never as large as it may be, as large as it will be."""
    budget, most = config.learner.token_budget, most_tokens(config)
    if budget <= most:
        return []
    return [
        f"pass        one forward pass takes a worker's whole optimizer step, at most {most:,} "
        f"tokens: learner.token_budget={budget:,} is not reached"
    ]


def _data_lines(title: str, data: DataSet | None) -> list[str]:
    if data is None:
        return []
    lines = []
    total = sum(part.weight for part in data.parts.values())
    for section, part in data.parts.items():
        share = ""
        if len(data.parts) > 1:
            share = f"{part.weight / total:.0%} {set_name(section)}, "
        lines.append(f"{title:12}{share}{part.report.told(part.num_too_long)}")
    return lines


def _prompt_lines(config: Config, train: DataSet | None) -> list[str]:
    """The first prompt as the model reads it, and what ends an answer besides the end token."""
    lines = []
    if train is not None and train.example is not None:
        shown = train.example
        if len(shown) > 2 * SHOWN_CHARS:
            shown = f"{shown[:SHOWN_CHARS]}...{shown[-SHOWN_CHARS:]}"
        problem = next(iter(train.parts.values())).problems[0]
        answer = problem.answers[0][-SHOWN_CHARS:]
        lines.append(f"prompt      {shown!r}, expected answer {answer!r}")
    if config.model.stop:
        texts = ", ".join(map(repr, config.model.stop))
        lines.append(f"stop        an answer ends with its end token or behind {texts}")
    return lines


def _size_line(config: Config, facts: ModelFacts | None) -> str:
    size = num_parameters(config, facts)
    if size is None:
        return "parameters unknown"
    if facts is None:
        return f"about {size / 1e6:,.0f} M parameters, by its name"
    return f"{size / 1e6:,.1f} M parameters" if size >= 1e5 else f"{size:,.0f} parameters"


def _adapter_lines(config: Config, facts: ModelFacts | None) -> list[str]:
    """What is trained in place of the model's own weights."""
    lora = config.lora
    if not lora.rank:
        return []
    where = ", ".join(lora.target_modules) or "all linear layers but the head"
    size = "they alone" if facts is None else f"{facts.sizes.num_adapted:,} numbers"
    return [
        f"adapters    rank {lora.rank}, alpha {lora.alpha:g} on {where}: {size} are trained, sent "
        "and kept in checkpoints"
    ]


def _quantization_lines(config: Config) -> list[str]:
    """What engines compute in, where that is not what the learner does."""
    if (name := config.engine.quantization) is None:
        return []
    return [
        f"engines     compute linear layers in {name}; the loss weighs tokens for it, by at most "
        f"loss.importance_cap={config.loss.importance_cap:g}"
    ]


def _memory_lines(config: Config, facts: ModelFacts | None) -> list[str]:
    """What a worker and an engine take, as a table of at most 80 columns."""
    size = num_parameters(config, facts)
    if size is None:
        return ["memory      unknown, as the model is"]
    plan = MemoryPlan.of(config, size, None if facts is None else facts.sizes)
    first, *rows = plan.table(config)
    return [f"memory      {first}", *(f"            {row}" for row in rows)]


def _missing_lines(
    config: Config, facts: ModelFacts | None, look: Callable[[Config], Available]
) -> list[str]:
    """What there is, and what the fewest workers and engines lack of it."""
    learner = replace(config.learner, num_workers=config.learner.fewest_workers)
    needed = needed_resources(replace(config, learner=learner), config.engine.num_engines)
    lines = []
    try:
        there = look(config)
    except ValueError as error:
        lines.append(f"missing     {error}")
    else:
        has = [f"{name} {there.resources.get(name, 0.0):g}" for name in needed]
        has.append(f"{number(there.memory_gib)} GiB of memory")
        lines.append(f"there is    {', '.join(has)} ({there.where})")
        lines += _node_lines(there, list(needed))
        lacking = missing_resources(needed, there.resources)
        amounts = ", ".join(f"{name} {amount:g}" for name, amount in lacking.items())
        lines.append(f"missing     {amounts or _without_place(config, there) or 'nothing'}")
        lines += _missing_memory(config, facts, there)
    for check in (check_vllm, check_gpus):
        try:
            check(config)
        except ValueError as error:
            lines.append(f"missing     {error}")
    return lines


def _node_lines(there: Available, names: Sequence[str]) -> list[str]:
    """What each node of a cluster has of some resources; nodes that are alike together."""
    kinds = Counter(
        ", ".join(f"{name} {node.resources[name]:g}" for name in names if name in node.resources)
        for node in there.nodes
    )
    if len(there.nodes) < 2:
        return []
    told = (f"{count} with {has or 'none of that'}" for has, count in kinds.items())
    return [f"nodes       {'; '.join(told)}"]


def _without_place(config: Config, there: Available) -> str | None:
    """What has no place on the nodes, where they have enough of everything together."""
    try:
        check_places(starting_stages(config, trains=True), there.nodes)
    except ValueError as error:
        return str(error)
    return None


def _missing_memory(config: Config, facts: ModelFacts | None, there: Available) -> list[str]:
    """Of a cluster, whose nodes have their own memory, what one engine or worker would lack."""
    size = num_parameters(config, facts)
    if size is None or not os.environ.get("RAY_ADDRESS"):
        return []
    one = replace(
        config,
        engine=replace(config.engine, num_engines=1, max_engines=None),
        learner=replace(config.learner, num_workers=1, min_workers=None),
    )
    plan = MemoryPlan.of(config, size, None if facts is None else facts.sizes)
    found = needs_more_memory(one, plan, there.memory_gib, "the largest node")
    return [f"missing     {found}"] if found else []


def _range(fewest: float, most: float) -> str:
    return f"{fewest:g} to {most:g}" if most > fewest else f"{fewest:g}"
