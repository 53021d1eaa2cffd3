"""The plan: what a run will do and need, worked out before anything is started."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from treerpo_ray.cluster import local_resources, missing_resources, needed_resources
from treerpo_ray.config import Config
from treerpo_ray.problems import DataReport, load_problems
from treerpo_ray.prompts import PromptSet, load_tokenizer, one_token, resolve_model_path
from treerpo_ray.verifier import is_module

GIB = 2**30
LEARNER_BYTES = 16
"""Bytes a parameter in the learner: weight, gradient and two moments of AdamW, float32 each."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The checked inputs of a run."""

    prompts: PromptSet
    report: DataReport
    held_out: PromptSet | None
    held_out_report: DataReport | None
    delimiters: tuple[int, ...]


def load_inputs(config: Config) -> Inputs:
    """Load and check data, tokenizer, model folder and verifier.

    Raises:
        ValueError: a data set, a column, the tokenizer, the delimiter, the model folder or the
            verifier is not as it must be.
    """
    if not is_module(config.verifier.check):
        raise ValueError(f"verifier.check={config.verifier.check}: no such module")
    folder = Path(resolve_model_path(config.model.path))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"model.path={config.model.path}: the folder has no *.safetensors weights")
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    delimiter = config.tree.delimiter
    delimiters = () if delimiter is None else (one_token(tokenizer, delimiter),)
    problems, report = load_problems(config.prompts)
    prompts = PromptSet.encode(problems, tokenizer, config.prompts)
    held_out, held_out_report = None, None
    if config.evaluate.data.path:
        held, held_out_report = load_problems(config.evaluate.data, "evaluate.data")
        held_out = PromptSet.encode(held, tokenizer, config.evaluate.data, "evaluate.data")
    return Inputs(
        prompts=prompts,
        report=report,
        held_out=held_out,
        held_out_report=held_out_report,
        delimiters=delimiters,
    )


def count_parameters(config: Config) -> int:
    """Parameters of the model, without loading its weights.

    Raises:
        ValueError: there is no model at `model.path`.
    """
    import torch

    path = resolve_model_path(config.model.path)
    try:
        model_config = AutoConfig.from_pretrained(
            path, trust_remote_code=config.model.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path={config.model.path}: {str(error).splitlines()[0]}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def plan_lines(config: Config, inputs: Inputs) -> list[str]:
    """The plan in plain words, a line each."""
    shape, gate, num_parameters = config.shape, config.gate, count_parameters(config)
    trees, engines = gate.trees_per_step, config.engine.num_engines
    in_flight = trees * (1 + gate.max_staleness)
    copies = 1 + (config.loss.kl_coef > 0) / 4
    learner_gib = LEARNER_BYTES * copies * num_parameters / GIB
    engine_gib = DTYPE_BYTES[config.model.dtype] * num_parameters / GIB
    kv_gib = config.engine.kv_cache_gib
    cache = "the rest of its GPU" if kv_gib is None else f"{kv_gib:g} GiB"
    needed = needed_resources(config)
    lacking = missing_resources(needed, local_resources(config))
    lines = [
        f"run         {config.folder}",
        f"model       {config.model.path}: {num_parameters / 1e6:,.1f} M parameters",
        f"data        {inputs.report}; {inputs.prompts.num_too_long} prompts too long",
        f"tree        {list(shape.num_children)} children of at most {list(shape.step_tokens)} "
        f"tokens: up to {shape.max_steps:,} steps and "
        f"{shape.max_sampled_tokens:,} tokens a question",
        f"step        {trees} trees: up to {trees * shape.max_steps:,} requests and "
        f"{trees * shape.max_sampled_tokens:,} sampled tokens, "
        f"{config.learner.minibatches} optimizer step(s)",
        f"staleness   at most {gate.max_staleness} versions: {in_flight} trees in flight",
        f"run length  {config.run.num_steps} learner steps, "
        f"{config.run.num_steps * trees:,} trees, "
        f"{config.run.num_steps * trees / len(inputs.prompts):.1f} epochs",
        f"memory      {config.learner.num_workers} worker(s) of {learner_gib:.2f} GiB and "
        f"activations; {engines} engine(s) of {engine_gib:.2f} GiB and {cache} as KV cache",
        "resources   " + ", ".join(f"{name} {amount:g}" for name, amount in needed.items()),
        "missing     "
        + (", ".join(f"{n} {a:g}" for n, a in lacking.items()) or "nothing")
        + " (on this machine alone)",
    ]
    if inputs.held_out is not None:
        lines.insert(3, f"held out    {inputs.held_out_report}")
    return lines
