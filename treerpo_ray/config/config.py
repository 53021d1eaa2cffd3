"""Configuration: the sections of a whole run, what holds between them, and what follows.

A YAML file holds only what differs from the defaults in `sections` (see `files`). Derived
numbers are properties, not keys.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path

from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config.sections import (
    CheckpointConfig,
    EngineConfig,
    EvaluateConfig,
    GateConfig,
    LearnerConfig,
    MetricsConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    SyncConfig,
    TreeConfig,
    VerifierConfig,
)

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


POSITIVE = (
    *("run.num_steps", "tree.temperature", "gate.trees_per_step", "evaluate.num_samples"),
    "evaluate.top_p",
    *("engine.num_engines", "engine.tensor_parallel", "engine.max_num_seqs"),
    *("engine.gpu_memory_utilization", "engine.cpu_threads", "engine.start_timeout_s"),
    *("engine.load_timeout_s", "engine.request_timeout_s"),
    *("verifier.num_workers", "verifier.timeout_s"),
    *("verifier.memory_mib", "learner.num_workers", "learner.minibatches", "learner.cpu_threads"),
    *("learner.learning_rate", "learner.clip_grad_norm", "learner.token_budget"),
    *("sync.chunk_mib", "sync.probe_every", "sync.probe_tolerance"),
    *("checkpoint.every", "checkpoint.keep"),
)
"""Keys whose value must be more than zero."""


NOT_NEGATIVE = (
    *(
        "gate.max_redraws",
        "verifier.max_error_share",
        "verifier.false_positive_rate",
        "verifier.false_negative_rate",
    ),
    *("gate.max_staleness", "evaluate.temperature", "evaluate.every", "metrics.save_trees_every"),
    *("learner.max_failures", "learner.warmup_steps", "learner.weight_decay"),
    "learner.final_rate",
    *("loss.kl_coef", "loss.entropy_coef", "engine.shrink_after_s"),
)
"""Keys whose value must be zero or more."""


SHARES = (
    *("evaluate.top_p", "learner.final_rate", "verifier.max_error_share"),
    *("verifier.false_positive_rate", "verifier.false_negative_rate"),
)
"""Keys whose value must not be more than one."""


MAX_TEMPERATURE = 2.0
"""The highest that vLLM samples at."""


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
    loss: LossConfig = field(default_factory=LossConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        for key in credential_keys(self):
            raise ValueError(
                f"{key} holds a credential, which would be written into config.yaml and W&B: give "
                "it to the store by its environment variables or profile"
            )
        for key in POSITIVE:
            if not (value := attrgetter(key)(self)) > 0:
                raise ValueError(f"{key}={value} must be more than 0")
        for key in NOT_NEGATIVE:
            if (value := attrgetter(key)(self)) < 0:
                raise ValueError(f"{key}={value} must not be negative")
        if not 0 <= self.gate.revisit < 1:
            raise ValueError(
                f"gate.revisit={self.gate.revisit} must be at least 0 and less than 1: only what "
                "follows the data set meets new prompts"
            )
        for key in SHARES:
            if (value := attrgetter(key)(self)) > 1:
                raise ValueError(f"{key}={value} must not be more than 1")
        for key, times in (("engine.request_timeout_s", 1), ("engine.load_timeout_s", 2)):
            if self.run.stall_timeout_s <= times * (value := attrgetter(key)(self)):
                raise ValueError(
                    f"run.stall_timeout_s={self.run.stall_timeout_s:g} must be more than "
                    f"{'twice ' * (times - 1)}{key}={value:g}, after which a hung engine is "
                    "replaced"
                )
        if self.evaluate.max_tokens is not None and self.evaluate.max_tokens < 1:
            raise ValueError(f"evaluate.max_tokens={self.evaluate.max_tokens} must be more than 0")
        for key in ("tree.temperature", "evaluate.temperature"):
            if (value := attrgetter(key)(self)) > MAX_TEMPERATURE:
                raise ValueError(
                    f"{key}={value:g} must not be more than {MAX_TEMPERATURE:g} in vLLM"
                )
        budget = self.run.max_sampled_tokens
        if budget is not None and budget < 1:
            raise ValueError(f"run.max_sampled_tokens={budget} must be more than 0")
        if any(not 1 <= k <= self.evaluate.num_samples for k in self.evaluate.pass_ks):
            raise ValueError(
                f"evaluate.pass_ks={list(self.evaluate.pass_ks)} must lie between 1 and "
                f"evaluate.num_samples={self.evaluate.num_samples}"
            )
        self._check_engine()
        self._check_workers()
        if self.max_path_tokens > self.learner.token_budget:
            raise ValueError(
                f"learner.token_budget={self.learner.token_budget} is smaller than one path: "
                "prompts.max_prompt_tokens + the sum of tree.step_tokens = "
                f"{self.max_path_tokens}"
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
        if engine.max_trees is not None and engine.max_trees < 1:
            raise ValueError(f"engine.max_trees={engine.max_trees} must be more than 0")
        if engine.max_engines is not None and engine.max_engines < engine.num_engines:
            raise ValueError(
                f"engine.max_engines={engine.max_engines} must not be less than "
                f"engine.num_engines={engine.num_engines}"
            )
        if self.most_engines > engine.num_engines and engine.max_trees is None:
            raise ValueError(
                f"engine.max_engines={engine.max_engines} needs engine.max_trees: the pool grows "
                "while more trees are in hand than its engines may grow at a time"
            )
        if engine.kv_cache_gib is None and not num_gpus:
            raise ValueError("engine.kv_cache_gib is needed on a CPU; 1 is enough for small models")
        if engine.kv_cache_gib is not None and engine.kv_cache_gib <= 0:
            raise ValueError(f"engine.kv_cache_gib={engine.kv_cache_gib} must be more than 0")
        if engine.tensor_parallel > 1 and engine.tensor_parallel != num_gpus:
            raise ValueError(
                f"engine.tensor_parallel={engine.tensor_parallel} needs as many GPUs, but "
                f"engine.resources has GPU: {num_gpus:g}"
            )

    @property
    def most_engines(self) -> int:
        """Engines that the pool may grow to."""
        most = self.engine.max_engines
        return self.engine.num_engines if most is None else most

    @property
    def shape(self) -> TreeShape:
        """Shape of the training trees; the delimiter's token id is known only to the engines."""
        return TreeShape(
            num_children=self.tree.num_children,
            step_tokens=self.tree.step_tokens,
            entropy_window=self.tree.entropy_window,
        )

    @property
    def max_path_tokens(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.prompts.max_prompt_tokens + self.shape.max_answer_tokens

    @property
    def max_model_tokens(self) -> int:
        """Tokens that an engine must hold: the longest prompt of any data set and an answer."""
        evaluated = (self.evaluate.data, *self.evaluate.benchmarks.values())
        longest = [d.max_prompt_tokens + self.max_evaluated_tokens for d in evaluated if d.path]
        trained = [self.max_path_tokens] if self.prompts.path or not longest else []
        return max(trained + longest)

    @property
    def max_evaluated_tokens(self) -> int:
        """Most tokens of an answer that is evaluated."""
        return self.evaluate.max_tokens or self.shape.max_answer_tokens

    @property
    def folder(self) -> str:
        """The run folder: path or URI."""
        root = self.run.root if "://" in self.run.root else str(Path(self.run.root).expanduser())
        return f"{root.rstrip('/')}/{self.run.name}"

    @property
    def log_folder(self) -> str | None:
        """Where engines write what they print; None, and Ray keeps it, if the folder is a URI."""
        return None if "://" in self.folder else f"{self.folder}/logs"
