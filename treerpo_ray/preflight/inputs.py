"""Inputs: data, tokenizer, model and verifier of a run, looked at before anything is started."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from treerpo_ray.config import Config
from treerpo_ray.config.data import DataConfig, MixedConfig
from treerpo_ray.errors import one_line
from treerpo_ray.preflight.machine import installed_gpus, machine_gib
from treerpo_ray.preflight.memory import MemoryPlan, misfit, needs_more_memory, uses_gpus
from treerpo_ray.preflight.model_check import ModelFacts, check_model
from treerpo_ray.preflight.references import References, look_at_references
from treerpo_ray.preflight.storage import StoragePlan
from treerpo_ray.preflight.trial import try_checks, try_credit
from treerpo_ray.prompts.hub import Unreachable
from treerpo_ray.prompts.problems import DataReport, Problem, load_together
from treerpo_ray.prompts.prompt_set import PromptSet, end_token_ids, load_tokenizer, one_token

T = TypeVar("T")
SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)B(?![A-Za-z])")
"""Billions of parameters in the name of a model, as in Qwen2.5-Math-1.5B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPart:
    """One data set."""

    config: DataConfig
    report: DataReport
    problems: tuple[Problem, ...]
    num_too_long: int | None
    """Prompts left out for their length; None: not known."""

    @property
    def weight(self) -> float:
        """Its share in a mix, before all are divided by their sum."""
        return _weight(self.config)


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


def preflight(config: Config, memory_gib: Callable[[], float] = machine_gib) -> Preflight:
    """Look at data, tokenizer, model and verifier; `memory_gib` tells the memory here.

    Raises:
        ValueError: a data set, a column, the tokenizer, the delimiter, the model or the verifier is
            not as it must be.
    """
    try_credit(config.learner)
    keeps_rows = try_checks(config.verifier)
    unchecked: list[str] = []

    def reached(look: Callable[[], T]) -> T | None:
        try:
            return look()
        except Unreachable as error:
            unchecked.append(str(error))
            return None

    model, learner = config.model, config.learner
    of_layers = {"shard": learner.shard, "compile": learner.compile}
    of_layers["gradient_checkpointing"] = learner.gradient_checkpointing
    facts = reached(
        lambda: check_model(
            model,
            config.max_model_tokens,
            gradient_checkpointing=learner.gradient_checkpointing,
            has_cpu_engines=not config.engine.resources.get("GPU", 0),
            layers_for=[f"learner.{key}" for key, is_set in of_layers.items() if is_set],
            lora=config.lora,
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
        misfit=_misfit(config, facts, memory_gib),
        storage=storage,
        no_room=no_room,
        unchecked=tuple(dict.fromkeys(unchecked)),
        num_trained_too=_num_shared(train, held_out),
        references=tuple(each for each in references.values() if each.no_answers),
    )


def _misfit(
    config: Config, facts: ModelFacts | None, memory_gib: Callable[[], float]
) -> str | None:
    size = num_parameters(config, facts)
    if size is None:
        return None
    sizes = None if facts is None else facts.sizes
    found = misfit(config, size, sizes)
    # A plan for GPUs that are not here is one for another machine.
    is_here = not os.environ.get("RAY_ADDRESS") and (not uses_gpus(config) or installed_gpus())
    if found is None and is_here:
        plan = MemoryPlan.of(config, size, sizes)
        return needs_more_memory(config, plan, memory_gib(), "this machine")
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
    size = num_parameters(config, facts)
    if size is None:
        return "unknown, as the model is", None
    plan = StoragePlan.of(config, size, None if facts is None else facts.sizes.num_adapted)
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
            {set_name(section): each for section, each in encoded.items()},
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


def set_name(section: str) -> str:
    """Name of a data set of the mix, by its key of the configuration."""
    return section.removeprefix("prompts.mix.")


def _weight(data: DataConfig) -> float:
    return data.weight if isinstance(data, MixedConfig) else 1.0


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


def num_parameters(config: Config, facts: ModelFacts | None) -> float | None:
    """Of the model, as counted, else as its name says."""
    if facts is not None:
        return facts.num_parameters
    size = SIZE_IN_NAME.search(config.model.path)
    return float(size[1]) * 1e9 if size else None
