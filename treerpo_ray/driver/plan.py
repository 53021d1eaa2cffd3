"""The plan: what a run will do and need, worked out before anything is started."""

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from treerpo_ray.config import Config
from treerpo_ray.config.sections import DataConfig, MixedConfig
from treerpo_ray.driver.cluster import Available, check_vllm, look_at_resources
from treerpo_ray.driver.memory import (
    MemoryPlan,
    check_gpus,
    machine_gib,
    misfit,
    most_tokens,
    needs_more_memory,
    number,
)
from treerpo_ray.driver.model_check import ModelFacts, check_model
from treerpo_ray.driver.placement import missing_resources, needed_resources
from treerpo_ray.driver.storage import StoragePlan
from treerpo_ray.driver.trial import try_checks, try_credit
from treerpo_ray.driver.unusual import unusual
from treerpo_ray.errors import one_line
from treerpo_ray.prompts.hub import Unreachable
from treerpo_ray.prompts.problems import DataReport, Problem, load_together
from treerpo_ray.prompts.prompt_set import PromptSet, end_token_ids, load_tokenizer, one_token
from treerpo_ray.prompts.references import References, look_at_references
from treerpo_ray.run_folder.files import CONFIG_FILE, RunFolder

T = TypeVar("T")


BUCKETS = ("s3", "s3a", "gs", "gcs")
"""Stores that have what is written in buckets, which must be there before."""
STORE_S = 30.0
"""Time for a store to answer."""
SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)B(?![A-Za-z])")
"""Billions of parameters in the name of a model, as in Qwen2.5-Math-1.5B."""
SHOWN_CHARS = 150
"""Of the beginning and of the end of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPart:
    """One data set."""

    config: DataConfig
    report: DataReport
    problems: tuple[Problem, ...]
    num_too_long: int | None
    """Prompts left out for their length; None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """What a run trains on or evaluates: a data set, or several that are mixed."""

    parts: dict[str, DataPart]
    """By their key of the configuration."""
    prompts: PromptSet | None
    """If there is a tokenizer to make them."""
    example: str | None
    """The first prompt as the model reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The checked inputs of a run."""

    prompts: PromptSet
    held_out: PromptSet | None
    delimiters: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The inputs of a run as far as they can be looked at from here; None is what cannot."""

    train: DataSet | None
    held_out: DataSet | None
    delimiters: tuple[int, ...]
    model: ModelFacts | None
    misfit: str | None
    """What does not fit the GPUs that the configuration names, or this machine."""
    unchecked: tuple[str, ...]
    """A line for each input that could not be looked up for want of a connection."""
    storage: str
    """What is written to the disk of the run folder, and what room that has, in one line."""
    no_room: str | None
    """Why not even one checkpoint fits that disk."""
    num_trained_too: int
    """Problems of the evaluation that are trained on, too."""
    references: tuple[References, ...] = ()
    """What was seen of the references of the data sets, in which some are no answers."""

    def inputs(self) -> Inputs:
        """The inputs of a run that may start.

        Raises:
            ValueError: something could not be looked up, or does not fit its GPU or disk.
        """
        self.check_memory()
        self.check_looked_up()
        if self.no_room is not None:
            raise ValueError(self.no_room)
        assert self.train is not None and self.train.prompts is not None  # else it is unchecked
        return Inputs(
            prompts=self.train.prompts,
            held_out=None if self.held_out is None else self.held_out.prompts,
            delimiters=self.delimiters,
        )

    def check_looked_up(self) -> None:
        """Refuse to start without what could not be looked up.

        Raises:
            ValueError: there is such.
        """
        if self.unchecked:
            raise ValueError(self.unchecked[0])

    def check_memory(self) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: a worker or an engine does not fit its GPU, or all of them this machine.
        """
        if self.misfit is not None:
            raise ValueError(self.misfit)


def load_inputs(config: Config) -> Inputs:
    """Load and check data, tokenizer, model folder and verifier; raises as `preflight` does, and
    also where something cannot be looked up."""
    return preflight(config).inputs()


def preflight(config: Config) -> Preflight:
    """Look at data, tokenizer, model, verifier and run folder.

    Raises:
        ValueError: a data set, a column, the tokenizer, the delimiter, the model, the verifier or
            the run folder is not as it must be.
    """
    check_folder(config)
    try_credit(config.learner)
    keeps_rows = try_checks(config.verifier)
    unchecked: list[str] = []

    def reached(look: Callable[[], T]) -> T | None:
        try:
            return look()
        except Unreachable as error:
            unchecked.append(str(error))
            return None

    model = config.model
    facts = reached(
        lambda: check_model(
            model,
            config.max_model_tokens,
            gradient_checkpointing=config.learner.gradient_checkpointing,
            has_cpu_engines=not config.engine.resources.get("GPU", 0),
        )
    )
    tokenizer = reached(lambda: load_tokenizer(model.path, model.trust_remote_code))
    delimiters: tuple[int, ...] = ()
    if config.tree.delimiter is not None and tokenizer is not None:
        delimiters = (one_token(tokenizer, config.tree.delimiter),)
    train = reached(lambda: _load_data(training_sections(config), tokenizer, keeps_rows))
    held_out = None
    if config.evaluate.data.path:
        evaluated: dict[str, DataConfig] = {"evaluate.data": config.evaluate.data}
        held_out = reached(lambda: _load_data(evaluated, tokenizer, keeps_rows))
    if tokenizer is not None and facts is not None:
        _check_token_ids(config, facts, tokenizer, train, held_out)
    parts = {key: part for data in (train, held_out) if data for key, part in data.parts.items()}
    references = look_at_references(
        {key: (part.config, part.problems) for key, part in parts.items()}, config.verifier
    )
    storage, no_room = _storage(config, facts)
    return Preflight(
        train=train,
        held_out=held_out,
        delimiters=delimiters,
        model=facts,
        misfit=_misfit(config, facts),
        storage=storage,
        no_room=no_room,
        unchecked=tuple(dict.fromkeys(unchecked)),
        num_trained_too=_num_shared(train, held_out),
        references=tuple(each for each in references.values() if each.no_answers),
    )


def _misfit(config: Config, facts: ModelFacts | None) -> str | None:
    size = _num_parameters(config, facts)
    if size is None:
        return None
    sizes = None if facts is None else facts.sizes
    found = misfit(config, size, sizes)
    if found is None and not os.environ.get("RAY_ADDRESS"):
        plan = MemoryPlan.of(config, size, sizes)
        return needs_more_memory(config, plan, machine_gib(), "this machine")
    return found


def _num_shared(train: DataSet | None, held_out: DataSet | None) -> int:
    """Problems of `held_out` whose question is one of `train`."""
    trained, asked = (
        [problem.chat for part in data.parts.values() for problem in part.problems] if data else []
        for data in (train, held_out)
    )
    known = set(trained)
    return sum(chat in known for chat in asked)


def training_sections(config: Config) -> dict[str, DataConfig]:
    """The data sets that are trained on, by their keys."""
    mix = sorted(config.prompts.mix.items())
    return {f"prompts.mix.{name}": data for name, data in mix} or {"prompts": config.prompts}


def _storage(config: Config, facts: ModelFacts | None) -> tuple[str, str | None]:
    """What is written where, and what does not fit there."""
    num_parameters = _num_parameters(config, facts)
    if num_parameters is None:
        return "unknown, as the model is", None
    plan = StoragePlan.of(config, num_parameters)
    try:
        return plan.line(), plan.misfit()
    except OSError as error:
        return f"unknown: {one_line(error)}", None


def _load_data(
    sections: Mapping[str, DataConfig],
    tokenizer: PreTrainedTokenizerBase | None,
    keeps_rows: bool,
) -> DataSet:
    loaded = load_together(sections, keeps_rows=keeps_rows)
    encoded: dict[str, PromptSet] = {}
    if tokenizer is not None:
        for section, (problems, _) in loaded.items():
            encoded[section] = PromptSet.encode(problems, tokenizer, sections[section], section)
    prompts = next(iter(encoded.values()), None)
    if len(encoded) > 1:
        weights = {section: _weight(data) for section, data in sections.items()}
        prompts = PromptSet.mixed(
            {_name(section): each for section, each in encoded.items()},
            list(weights.values()),
        )
    example = None
    if prompts is not None and tokenizer is not None:
        [example] = tokenizer.batch_decode([prompts.token_ids[0]])
    parts = {
        section: DataPart(
            config=sections[section],
            report=report,
            problems=tuple(problems),
            num_too_long=encoded[section].num_too_long if encoded else None,
        )
        for section, (problems, report) in loaded.items()
    }
    return DataSet(parts=parts, prompts=prompts, example=example)


def _name(section: str) -> str:
    """Name of a data set of the mix."""
    return section.removeprefix("prompts.mix.")


def _weight(data: DataConfig) -> float:
    return data.weight if isinstance(data, MixedConfig) else 1.0


def check_folder(config: Config) -> None:
    """Refuse a run folder that cannot be written, as far as that can be told without writing.

    Whatever else reads or writes it comes after this: a store that does not answer would have it
    wait for minutes.

    Raises:
        ValueError: it cannot.
    """
    try:
        folder = RunFolder(config.folder)
    except (ImportError, ValueError) as error:  # of the store that the URI names
        raise ValueError(f"run.root={config.run.root}: {one_line(error)}") from error
    if not folder.is_local:
        _check_store(config, folder)
        return
    place = Path(folder.root)
    root = Path(RunFolder(config.run.root).root)
    for above in place.parents[: len(place.relative_to(root).parts) - 1]:
        if (above / CONFIG_FILE).exists():
            raise ValueError(f"run.name={config.run.name} is in the folder of another run: {above}")
    nearest = next(each for each in (place, *place.parents) if each.exists())
    if not nearest.is_dir():
        raise ValueError(f"run.root={config.run.root}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"run.root={config.run.root}: {nearest} cannot be written")


def _check_store(config: Config, folder: RunFolder) -> None:
    """Refuse a store that does not answer, or a bucket that is not there or not ours.

    Raises:
        ValueError: it is such.
    """
    place = urlsplit(config.run.root)
    store, bucket = place.scheme, place.netloc
    faults: list[str] = []

    def look() -> None:
        try:
            if store in BUCKETS and not folder.fs.exists(bucket):
                faults.append(f"there is no bucket {bucket}; make it, or name another")
            folder.exists()
        except Exception as error:  # every store has its own
            faults.append(f"the store refuses: {type(error).__name__}: {one_line(error)}")

    thread = threading.Thread(target=look, name="store", daemon=True)  # some try again for minutes
    thread.start()
    thread.join(STORE_S)
    if thread.is_alive():
        faults.append(f"the store has not answered for {STORE_S:g} s")
    if faults:
        raise ValueError(f"run.root={config.run.root}: {faults[0]}")


def _check_token_ids(
    config: Config,
    facts: ModelFacts,
    tokenizer: PreTrainedTokenizerBase,
    train: DataSet | None,
    held_out: DataSet | None,
) -> None:
    """Refuse tokens that the model's embedding has no row for.

    Raises:
        ValueError: an end token or one of a prompt is such.
    """
    path, rows = config.model.path, facts.num_embeddings
    fix = f"the embedding has {rows} rows; take the tokenizer of this model"
    for end in end_token_ids(path, tokenizer):
        if end >= rows:
            raise ValueError(f"model.path={path}: its end token has the id {end}, but {fix}")
    for section, data in (("prompts", train), ("evaluate.data", held_out)):
        if data is None or data.prompts is None:
            continue
        for problem, ids in zip(data.prompts.problems, data.prompts.token_ids, strict=True):
            if max(ids) >= rows:
                raise ValueError(
                    f"model.path={path}: the prompt of '{problem.id}' in {section} has the token "
                    f"{max(ids)}, but {fix}"
                )


def plan_lines(config: Config, found: Preflight) -> list[str]:
    """The plan in plain words, a line each; what is missing or unchecked comes last."""
    shape, gate, run = config.shape, config.gate, config.run
    trees, minibatches = gate.trees_per_step, config.learner.minibatches
    in_flight = trees * (1 + gate.max_staleness)
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
        *_data_lines("data", found.train),
        *_data_lines("held out", found.held_out),
        *_prompt_lines(config, found.train),
        *(f"no answer   {each}" for each in found.references),
        f"reward      {config.verifier.identity}",
        f"tree        {list(shape.num_children)} children of at most {list(shape.step_tokens)} "
        f"tokens: up to {shape.max_steps:,} steps, {shape.max_leaves:,} answers and "
        f"{shape.max_sampled_tokens:,} tokens a question",
        f"step        {trees} trees: up to {trees * shape.max_steps:,} requests and "
        f"{trees * shape.max_sampled_tokens:,} sampled tokens, {minibatches} optimizer step(s)",
        *_budget_lines(config),
        f"staleness   at most {gate.max_staleness} versions: {in_flight} trees in flight",
        f"run length  {length}, up to {run.num_steps * minibatches:,} optimizer steps",
        *_memory_lines(config, found.model),
        f"disk        {found.storage}",
        "resources   "
        + ", ".join(f"{name} {_range(needed[name], at_most[name])}" for name in needed),
        *_missing_lines(config, found.model),
        *_shared_lines(found),
        *(f"unusual     {line}" for line in unusual(config)),
        *(f"unchecked   {line}" for line in found.unchecked),
    ]


def _epochs(data: DataSet, trees: int) -> str:
    """How often a run of so many trees goes through its data sets."""
    assert data.prompts is not None
    if (mixture := data.prompts.mixture) is None:
        return f", {number(trees / len(data.prompts))} epochs"
    sets = zip(map(_name, data.parts), mixture.shares, mixture.sizes, strict=True)
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
    total = sum(_weight(part.config) for part in data.parts.values())
    for section, part in data.parts.items():
        share = ""
        if len(data.parts) > 1:
            share = f"{_weight(part.config) / total:.0%} {_name(section)}, "
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
        lines.append(f"prompt      {shown!r}, answered by {problem.answers[0][-SHOWN_CHARS:]!r}")
    if config.model.stop:
        texts = ", ".join(map(repr, config.model.stop))
        lines.append(f"stop        an answer ends with its end token or behind {texts}")
    return lines


def _num_parameters(config: Config, facts: ModelFacts | None) -> float | None:
    """As counted, else as the model's name says."""
    if facts is not None:
        return facts.num_parameters
    size = SIZE_IN_NAME.search(config.model.path)
    return float(size[1]) * 1e9 if size else None


def _size_line(config: Config, facts: ModelFacts | None) -> str:
    size = _num_parameters(config, facts)
    if size is None:
        return "parameters unknown"
    if facts is None:
        return f"about {size / 1e6:,.0f} M parameters, by its name"
    return f"{size / 1e6:,.1f} M parameters" if size >= 1e5 else f"{size:,.0f} parameters"


def _memory_lines(config: Config, facts: ModelFacts | None) -> list[str]:
    """What a worker and an engine take, as a table of at most 80 columns."""
    size = _num_parameters(config, facts)
    if size is None:
        return ["memory      unknown, as the model is"]
    plan = MemoryPlan.of(config, size, None if facts is None else facts.sizes)
    first, *rows = plan.table(config)
    return [f"memory      {first}", *(f"            {row}" for row in rows)]


def _missing_lines(config: Config, facts: ModelFacts | None) -> list[str]:
    """What there is, and what the fewest workers and engines lack of it."""
    learner = replace(config.learner, num_workers=config.learner.fewest_workers)
    needed = needed_resources(replace(config, learner=learner), config.engine.num_engines)
    lines = []
    try:
        there = look_at_resources(config)
    except ValueError as error:
        lines.append(f"missing     {error}")
    else:
        has = [f"{name} {there.resources.get(name, 0.0):g}" for name in needed]
        has.append(f"{number(there.memory_gib)} GiB of memory")
        lines.append(f"there is    {', '.join(has)} ({there.where})")
        lacking = missing_resources(needed, there.resources)
        amounts = ", ".join(f"{name} {amount:g}" for name, amount in lacking.items())
        lines.append(f"missing     {amounts or 'nothing'}")
        lines += _missing_memory(config, facts, there)
    for check in (check_vllm, check_gpus):
        try:
            check(config)
        except ValueError as error:
            lines.append(f"missing     {error}")
    return lines


def _missing_memory(config: Config, facts: ModelFacts | None, there: Available) -> list[str]:
    """Of a cluster, whose nodes have their own memory, what one engine or worker would lack."""
    size = _num_parameters(config, facts)
    if size is None or not os.environ.get("RAY_ADDRESS"):
        return []
    one = replace(
        config,
        engine=replace(config.engine, num_engines=1, max_engines=None),
        learner=replace(config.learner, num_workers=1, min_workers=None),
    )
    plan = MemoryPlan.of(one, size, None if facts is None else facts.sizes)
    found = needs_more_memory(one, plan, there.memory_gib, "the largest node")
    return [f"missing     {found}"] if found else []


def _range(fewest: float, most: float) -> str:
    return f"{fewest:g} to {most:g}" if most > fewest else f"{fewest:g}"
