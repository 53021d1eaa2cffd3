"""Configuration: the sections of a whole run, what holds between them, and what follows.

A YAML file holds only what differs from the defaults in `sections` (see `files`). Derived
numbers are properties, not keys.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import isinf
from operator import attrgetter

from treerpo_ray.algo.forks.adaptive_shape import largest_forks, single_answers
from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config.credit_checks import check_credit
from treerpo_ray.config.data import DataConfig, PromptsConfig
from treerpo_ray.config.health import HealthConfig
from treerpo_ray.config.lora import MOST_RANK, LoraConfig
from treerpo_ray.config.sections import (
    CheckpointConfig,
    EngineConfig,
    EvaluateConfig,
    GateConfig,
    LearnerConfig,
    MetricsConfig,
    ModelConfig,
    RunConfig,
    SyncConfig,
    TreeConfig,
)
from treerpo_ray.config.verifier import VerifierConfig

# `abfs://container@account` and its kin name a place with an at sign, without a secret.
USER = re.compile(r"(?<![\w+.-])(?!(?:abfss?|wasbs?)://[^/@:]*@)[a-z][\w+.-]*://[^/@\s]+@", re.I)


SIGNED = re.compile(r"[?&][^=&\s]*(?:key|sig|token|secret|password|credential)[^=&\s]*=", re.I)
"""A parameter of a URL that opens what it points to."""


def credential_keys(value: object, key: str = "") -> Iterator[str]:
    """Keys of what a configuration (a dataclass) holds at any depth that have a credential."""
    if isinstance(value, str):
        if USER.search(value) or SIGNED.search(value):
            yield key
        return
    inner: Iterable[tuple[object, object]] = ()
    if is_dataclass(value):
        inner = ((item.name, getattr(value, item.name)) for item in fields(value))
    elif isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    for name, part in inner:
        yield from credential_keys(part, f"{key}.{name}" if key else f"{name}")


FP8_TOLERANCE = 0.5
"""Least `sync.probe_tolerance` of engines in fp8. On its prompts the project's model is up to 0.26
nats a token off when its layers are rounded so, and 0.07 on its answers; weights of another version
are told by their digests, whatever the probe allows."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""The lowest and the highest that vLLM samples at; it takes a lower one for this, but for 0, at
which it takes the likeliest token."""


def numbers(config: "Config") -> Iterator[tuple[str, float, Mapping[str, float]]]:
    """Key, value and limits of each number of a configuration that has limits and is not null."""
    for section in fields(config):
        part = getattr(config, section.name)
        for each in fields(part):
            value = getattr(part, each.name)
            if each.metadata and value is not None:
                yield f"{section.name}.{each.name}", value, each.metadata


def _check_number(key: str, value: float, limits: Mapping[str, float]) -> None:
    """Check a number against the limits of its field; what is not a number meets none.

    Raises:
        ValueError: it is beyond one of them.
    """
    if "above" in limits and not value > limits["above"]:
        raise ValueError(f"{key}={value} must be more than {limits['above']}")
    if "at_least" in limits and not value >= limits["at_least"]:
        raise ValueError(f"{key}={value} must be at least {limits['at_least']}")
    if "at_most" in limits and not value <= limits["at_most"]:
        raise ValueError(f"{key}={value} must not be more than {limits['at_most']}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        for key in credential_keys(self):
            raise ValueError(
                f"{key} holds a credential, which would be written into config.yaml and W&B: give "
                "it to the store by its environment variables or profile"
            )
        if self.run.root.startswith("~"):
            raise ValueError(f"run.root={self.run.root}: there is no such home; give a whole path")
        for key, value, limits in numbers(self):
            _check_number(key, value, limits)
        for key, times in (("engine.request_timeout_s", 1), ("engine.load_timeout_s", 2)):
            if self.run.stall_timeout_s <= times * (value := attrgetter(key)(self)):
                raise ValueError(
                    f"run.stall_timeout_s={self.run.stall_timeout_s:g} must be more than "
                    f"{'twice ' * (times - 1)}{key}={value:g}, after which a hung engine is "
                    "replaced"
                )
        for key in ("tree.temperature", "evaluate.temperature"):
            value = attrgetter(key)(self)
            if value > MAX_TEMPERATURE:
                raise ValueError(
                    f"{key}={value:g} must not be more than {MAX_TEMPERATURE:g} in vLLM"
                )
            if 0 < value < MIN_TEMPERATURE:
                raise ValueError(
                    f"{key}={value:g} must be at least {MIN_TEMPERATURE:g}, the lowest that vLLM "
                    "samples at"
                )
        if any(not 1 <= k <= self.evaluate.num_samples for k in self.evaluate.pass_ks):
            raise ValueError(
                f"evaluate.pass_ks={list(self.evaluate.pass_ks)} must lie between 1 and "
                f"evaluate.num_samples={self.evaluate.num_samples}"
            )
        self._check_data()
        check_credit(self.learner, self.tree, self.gate)
        self._check_engine()
        self._check_sync()
        self._check_workers()
        if self.lora.rank > MOST_RANK:
            raise ValueError(
                f"lora.rank={self.lora.rank} must not be more than {MOST_RANK}, the largest that "
                "vLLM serves"
            )
        if self.lora.target_modules and not self.lora.rank:
            raise ValueError(
                f"lora.target_modules={list(self.lora.target_modules)} has no effect without "
                "lora.rank, which is 0: set it, to 32 for example"
            )
        if self.max_path_tokens > self.learner.token_budget:
            raise ValueError(
                f"learner.token_budget={self.learner.token_budget} is smaller than one path: "
                "prompts.max_prompt_tokens + the sum of tree.step_tokens = "
                f"{self.max_path_tokens}"
            )

    def _check_data(self) -> None:
        """Check what can be told of data and prompts without reading them."""
        for section, data in self.data_sections.items():
            for name, value in data.chat_template_args.items():
                if not isinstance(value, bool | int | float | str):
                    raise ValueError(
                        f"{section}.chat_template_args.{name}={value} must be true, false, a "
                        "number or a text"
                    )
        if "" in self.model.stop:
            raise ValueError("model.stop has an empty text, which would end every answer; drop it")
        prompts = self.prompts
        if not prompts.mix:
            return
        for key, none in (("path", "''"), ("num_problems", "null")):
            if getattr(prompts, key):
                raise ValueError(
                    f"prompts.{key}={getattr(prompts, key)} and prompts.mix exclude each other, as "
                    f"each set of the mix has its own: add prompts.{key}={none}"
                )
        for name, mixed in prompts.mix.items():
            if not mixed.weight > 0 or isinf(mixed.weight):
                raise ValueError(
                    f"prompts.mix.{name}.weight={mixed.weight} must be a number above 0; a data "
                    "set that is not wanted is left out of prompts.mix"
                )
            if mixed.max_prompt_tokens > prompts.max_prompt_tokens:
                raise ValueError(
                    f"prompts.mix.{name}.max_prompt_tokens={mixed.max_prompt_tokens} must not be "
                    f"more than prompts.max_prompt_tokens={prompts.max_prompt_tokens}"
                )

    def _check_workers(self) -> None:
        """Check that each number of workers that there may be gets equal shares."""
        learner, trees = self.learner, self.gate.trees_per_step
        if not 1 <= learner.fewest_workers <= learner.num_workers:
            raise ValueError(
                f"learner.min_workers={learner.min_workers} must be from 1 to "
                f"learner.num_workers={learner.num_workers}"
            )
        for workers in range(learner.fewest_workers, learner.num_workers + 1):
            if trees % (workers * learner.minibatches):
                raise ValueError(
                    f"gate.trees_per_step={trees} must be a multiple of learner.num_workers="
                    f"{workers} times learner.minibatches={learner.minibatches}"
                )
        if learner.offload and not learner.shard:
            raise ValueError(
                "learner.offload=true needs learner.shard=true: the parts of a sharded model are "
                "what is kept in main memory"
            )
        share = learner.resources.get("GPU", 0)
        if learner.num_workers > 1 and 0 < share <= 0.5:
            raise ValueError(
                f"learner.num_workers={learner.num_workers} with GPU: {share:g} in "
                "learner.resources puts several workers on one GPU, where NCCL has room for one: "
                "set the first to 1, or the second to more than 0.5"
            )
        if learner.min_workers is None:
            return
        if not set(learner.resources) - {"CPU", "GPU"}:
            raise ValueError(
                "learner.min_workers needs a resource that only train nodes have, such as "
                "learner.resources.train_slot=1: Ray would count what engines take as free"
            )
        for name, amount in learner.resources.items():
            if amount % 0.5:  # others are not exact, and Ray divides by them and rounds down
                raise ValueError(
                    f"learner.resources.{name}={amount} must be a multiple of 0.5 where "
                    "learner.min_workers is set"
                )

    def _check_engine(self) -> None:
        """Check the engine's share of the machine, and how far the pool may grow."""
        engine, num_gpus = self.engine, self.engine.resources.get("GPU", 0)
        if engine.max_engines is not None and engine.max_engines < engine.num_engines:
            raise ValueError(
                f"engine.max_engines={engine.max_engines} must not be less than "
                f"engine.num_engines={engine.num_engines}"
            )
        if engine.most > engine.num_engines and engine.max_trees is None:
            raise ValueError(
                f"engine.max_engines={engine.max_engines} needs engine.max_trees: the pool grows "
                "while more trees are in hand than its engines may grow at a time"
            )
        if engine.kv_cache_gib is None and not num_gpus:
            raise ValueError("engine.kv_cache_gib is needed on a CPU; 1 is enough for small models")
        if engine.kv_cache_gib is None and num_gpus < 1:
            raise ValueError(
                f"engine.kv_cache_gib is needed where a GPU is shared (engine.resources has GPU: "
                f"{num_gpus:g}): what is left of it differs when an engine is started again"
            )
        if engine.sleep and self.gate.max_staleness:
            raise ValueError(
                f"engine.sleep=true needs gate.max_staleness=0, not {self.gate.max_staleness}: the "
                "learner updates while no tree grows"
            )
        if engine.tensor_parallel > 1 and engine.tensor_parallel != num_gpus:
            raise ValueError(
                f"engine.tensor_parallel={engine.tensor_parallel} needs as many GPUs, but "
                f"engine.resources has GPU: {num_gpus:g}"
            )
        if engine.quantization is not None:
            self._check_quantization(engine.quantization)

    def _check_quantization(self, name: str) -> None:
        """Check that engines can compute so, and that the loss and the probe know of it."""
        start = f"engine.quantization={name}"
        if not self.engine.resources.get("GPU", 0):
            raise ValueError(
                f"{start} needs GPUs of compute capability 8.9 or newer, and engine.resources has "
                "none: set it to null"
            )
        if self.model.dtype != "bfloat16":
            raise ValueError(
                f"{start} rounds weights of bfloat16, not model.dtype={self.model.dtype}: set that "
                "to bfloat16"
            )
        if self.loss.importance_cap is None:
            raise ValueError(
                f"{start} has engines sample from another distribution than the learner's: set "
                "loss.importance_cap (2 is its default), which weighs tokens for it"
            )
        if self.sync.probe_tolerance < FP8_TOLERANCE:
            raise ValueError(
                f"sync.probe_tolerance={self.sync.probe_tolerance:g} is less than rounding to "
                f"engine.quantization={name} takes engines off the learner: set it to "
                f"{FP8_TOLERANCE:g}"
            )

    def _check_sync(self) -> None:
        """Check that weights can travel as asked for between the devices that there are."""
        learner, engine = self.learner, self.engine
        shares = learner.resources.get("GPU", 0), engine.resources.get("GPU", 0)
        kind = self.sync.transport
        told = f"learner and engine have GPU: {shares[0]:g} and {shares[1]:g}"
        if kind == "nccl" and any(shares) and min(shares) < 1:
            raise ValueError(
                f"sync.transport=nccl needs a GPU for each worker and each engine, but {told} in "
                "their resources: share a GPU by sync.transport=ipc, or set it to file"
            )
        if kind != "ipc":
            return
        if self.gate.max_staleness:
            raise ValueError(
                f"sync.transport=ipc needs gate.max_staleness=0, not {self.gate.max_staleness}: an "
                "engine may still copy what the learner writes next"
            )
        if not learner.num_workers == engine.most == 1:
            raise ValueError(
                f"sync.transport=ipc needs one worker and one engine, not learner.num_workers="
                f"{learner.num_workers} and {engine.most} engine(s): set it to nccl or file"
            )
        if any(shares) and not (min(shares) > 0 and sum(shares) <= 1):
            raise ValueError(
                f"sync.transport=ipc needs worker and engine to share a GPU, but {told} in their "
                "resources: set it to nccl or file"
            )

    @property
    def shape(self) -> TreeShape:
        """Shape of the training trees, of adaptive ones of those that measure; the delimiter's
        token id is known only to the engines."""
        return TreeShape(
            num_children=self.tree.num_children,
            step_tokens=self.tree.step_tokens,
            entropy_window=self.tree.entropy_window,
        )

    @property
    def shapes(self) -> tuple[TreeShape, ...]:
        """Shapes between which all training trees lie: `shape`, and where it adapts single answers
        and each fork with as many children as it may ever have."""
        shape = self.shape
        if not self.tree.adaptive:
            return (shape,)
        chosen = single_answers(len(shape.num_children)), *largest_forks(shape.num_children)
        return shape, *(replace(shape, num_children=each) for each in chosen)

    @property
    def largest_shape(self) -> TreeShape:
        """The one of them that takes the most tokens."""
        return max(self.shapes, key=attrgetter("max_sampled_tokens"))

    @property
    def data_sections(self) -> dict[str, DataConfig]:
        """Everything that may name a data set, by its key."""
        evaluate = self.evaluate
        return {
            "prompts": self.prompts,
            **{f"prompts.mix.{name}": data for name, data in sorted(self.prompts.mix.items())},
            "evaluate.data": evaluate.data,
            **{f"evaluate.benchmarks.{name}": data for name, data in evaluate.benchmarks.items()},
        }

    @property
    def max_path_tokens(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.prompts.max_prompt_tokens + self.shape.max_answer_tokens

    @property
    def max_model_tokens(self) -> int:
        """Tokens that an engine must hold: the longest prompt of any data set and an answer."""
        evaluated = (self.evaluate.data, *self.evaluate.benchmarks.values())
        longest = [d.max_prompt_tokens + self.max_evaluated_tokens for d in evaluated if d.path]
        is_trained = self.prompts.path or self.prompts.mix or not longest
        trained = [self.max_path_tokens] if is_trained else []
        return max(trained + longest)

    @property
    def max_evaluated_tokens(self) -> int:
        """Most tokens of an answer that is evaluated."""
        return self.evaluate.max_tokens or self.shape.max_answer_tokens

    @property
    def folder(self) -> str:
        """The run folder: path or URI."""
        return f"{self.run.root.rstrip('/')}/{self.run.name}"

    @property
    def log_folder(self) -> str | None:
        """Where engines write what they print; None, and Ray keeps it, if the folder is a URI."""
        return None if "://" in self.folder else f"{self.folder}/logs"
