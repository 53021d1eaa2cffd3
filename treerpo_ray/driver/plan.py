"""The plan: what a run will do and need, worked out before anything is started."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from treerpo_ray.config import Config
from treerpo_ray.config.sections import PromptsConfig
from treerpo_ray.driver.cluster import (
    check_vllm,
    local_resources,
    missing_resources,
    needed_resources,
)
from treerpo_ray.driver.model_check import ModelFacts, check_model
from treerpo_ray.driver.references import References, look_at_references
from treerpo_ray.errors import one_line
from treerpo_ray.prompts.hub import Unreachable
from treerpo_ray.prompts.problems import DataReport, Problem, load_problems
from treerpo_ray.prompts.prompt_set import PromptSet, end_token_ids, load_tokenizer, one_token
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verifier import is_module

T = TypeVar("T")


GIB = 2**30


LEARNER_BYTES = 16
"""Bytes a parameter in the learner: weight, gradient and two moments of AdamW, float32 each."""


REFERENCE_BYTES = 4
"""Bytes a parameter of the reference model, which a KL term needs beside it."""


DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)B(?![A-Za-z])")
"""Billions of parameters in the name of a model, as in Qwen2.5-Math-1.5B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A data set of a run, and its prompts if there is a tokenizer to make them."""

    report: DataReport
    prompts: PromptSet | None
    problems: tuple[Problem, ...]


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
    num_parameters: int | None
    unchecked: tuple[str, ...]
    """A line for each input that could not be looked up for want of a connection."""
    references: tuple[References, ...] = ()
    """What was seen of the references of the data sets, in which some are no answers."""

    def inputs(self) -> Inputs:
        """The inputs of a run that may start.

        Raises:
            ValueError: something could not be looked up.
        """
        if self.unchecked:
            raise ValueError(self.unchecked[0])
        assert self.train is not None and self.train.prompts is not None  # else it is unchecked
        return Inputs(
            prompts=self.train.prompts,
            held_out=None if self.held_out is None else self.held_out.prompts,
            delimiters=self.delimiters,
        )


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
    if not is_module(config.verifier.check):
        raise ValueError(f"verifier.check={config.verifier.check}: no such module")
    _check_folder(config)
    unchecked: list[str] = []

    def reached(look: Callable[[], T]) -> T | None:
        try:
            return look()
        except Unreachable as error:
            unchecked.append(str(error))
            return None

    model = config.model
    facts = reached(lambda: check_model(model, config.max_model_tokens))
    tokenizer = reached(lambda: load_tokenizer(model.path, model.trust_remote_code))
    delimiters: tuple[int, ...] = ()
    if config.tree.delimiter is not None and tokenizer is not None:
        delimiters = (one_token(tokenizer, config.tree.delimiter),)
    train = reached(lambda: _load_data(config.prompts, "prompts", tokenizer))
    held_out = None
    if config.evaluate.data.path:
        held_out = reached(lambda: _load_data(config.evaluate.data, "evaluate.data", tokenizer))
    if tokenizer is not None and facts is not None:
        _check_token_ids(config, facts, tokenizer, train, held_out)
    looked_at = {}
    if train is not None:
        looked_at["prompts"] = (config.prompts, train.problems)
    if held_out is not None:
        looked_at["evaluate.data"] = (config.evaluate.data, held_out.problems)
    references = look_at_references(looked_at, config.verifier)
    return Preflight(
        train=train,
        held_out=held_out,
        delimiters=delimiters,
        num_parameters=None if facts is None else facts.num_parameters,
        unchecked=tuple(dict.fromkeys(unchecked)),
        references=tuple(each for each in references.values() if each.no_answers),
    )


def _load_data(
    config: PromptsConfig, section: str, tokenizer: PreTrainedTokenizerBase | None
) -> DataSet:
    problems, report = load_problems(config, section)
    prompts = None
    if tokenizer is not None:
        prompts = PromptSet.encode(problems, tokenizer, config, section)
    return DataSet(report=report, prompts=prompts, problems=tuple(problems))


def _check_folder(config: Config) -> None:
    """Refuse a run folder that cannot be written, as far as that can be told without writing.

    Raises:
        ValueError: it cannot.
    """
    try:
        folder = RunFolder(config.folder)
    except (ImportError, ValueError) as error:  # of the store that the URI names
        raise ValueError(f"run.root={config.run.root}: {one_line(error)}") from error
    if not folder.is_local:
        return
    place = Path(folder.root)
    nearest = next(each for each in (place, *place.parents) if each.exists())
    if not nearest.is_dir():
        raise ValueError(f"run.root={config.run.root}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"run.root={config.run.root}: {nearest} cannot be written")


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
        length += f", {run.num_steps * trees / len(found.train.prompts):.1f} epochs"
    if run.max_sampled_tokens is not None:
        length += f", or {run.max_sampled_tokens:,} sampled tokens"
    needed = needed_resources(config, config.engine.num_engines)
    at_most = needed_resources(config, config.engine.most)
    return [
        f"run         {config.folder}",
        f"model       {config.model.path}: {_size_line(config, found)}",
        *_data_lines("data", found.train),
        *_data_lines("held out", found.held_out),
        *(f"no answer   {each}" for each in found.references),
        f"tree        {list(shape.num_children)} children of at most {list(shape.step_tokens)} "
        f"tokens: up to {shape.max_steps:,} steps, {shape.max_leaves:,} answers and "
        f"{shape.max_sampled_tokens:,} tokens a question",
        f"step        {trees} trees: up to {trees * shape.max_steps:,} requests and "
        f"{trees * shape.max_sampled_tokens:,} sampled tokens, {minibatches} optimizer step(s)",
        f"staleness   at most {gate.max_staleness} versions: {in_flight} trees in flight",
        f"run length  {length}, up to {run.num_steps * minibatches:,} optimizer steps",
        f"memory      {_memory_line(config, found)}",
        "resources   "
        + ", ".join(f"{name} {_range(needed[name], at_most[name])}" for name in needed),
        *_missing_lines(config),
        *(f"unchecked   {line}" for line in found.unchecked),
    ]


def _data_lines(title: str, data: DataSet | None) -> list[str]:
    if data is None:
        return []
    left_out = "" if data.prompts is None else f"; {data.prompts.num_too_long} prompts too long"
    return [f"{title:12}{data.report}{left_out}"]


def _num_parameters(config: Config, found: Preflight) -> float | None:
    """As counted, else as the model's name says."""
    if found.num_parameters is not None:
        return found.num_parameters
    size = SIZE_IN_NAME.search(config.model.path)
    return float(size[1]) * 1e9 if size else None


def _size_line(config: Config, found: Preflight) -> str:
    size = _num_parameters(config, found)
    if size is None:
        return "parameters unknown"
    if found.num_parameters is None:
        return f"about {size / 1e6:,.0f} M parameters, by its name"
    return f"{size / 1e6:,.1f} M parameters"


def _memory_line(config: Config, found: Preflight) -> str:
    """Every worker holds the whole model with its optimizer, every engine a copy."""
    size = _num_parameters(config, found)
    if size is None:
        return "unknown, as the model is"
    has_reference = config.loss.kl_coef > 0
    learner_gib = (LEARNER_BYTES + has_reference * REFERENCE_BYTES) * size / GIB
    engine_gib = DTYPE_BYTES[config.model.dtype] * size / GIB
    kv_gib = config.engine.kv_cache_gib
    cache = "the rest of its GPU" if kv_gib is None else f"{kv_gib:g} GiB"
    return (
        f"{config.learner.num_workers} worker(s) of {learner_gib:.2f} GiB and activations; "
        f"{_range(config.engine.num_engines, config.engine.most)} engine(s) of "
        f"{engine_gib:.2f} GiB and {cache} as KV cache"
    )


def _missing_lines(config: Config) -> list[str]:
    """What the fewest workers and engines lack."""
    learner = replace(config.learner, num_workers=config.learner.fewest_workers)
    needed = needed_resources(replace(config, learner=learner), config.engine.num_engines)
    lacking = missing_resources(needed, local_resources(config))
    amounts = ", ".join(f"{name} {amount:g}" for name, amount in lacking.items()) or "nothing"
    lines = [f"missing     {amounts} (on this machine alone)"]
    try:
        check_vllm(config)
    except ValueError as error:
        lines.append(f"missing     {error}")
    return lines


def _range(fewest: float, most: float) -> str:
    return f"{fewest:g} to {most:g}" if most > fewest else f"{fewest:g}"
