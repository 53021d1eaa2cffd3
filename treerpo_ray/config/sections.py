"""Sections of the configuration: one frozen dataclass each, named like the module it serves.

Defaults and their meaning live here, those of data in `data`, of rewards in `verifier` and of
warnings in `health`; `config` puts the sections together and checks them. The string below a new
key is what `--help` says of it.
"""

import os
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from treerpo_ray.algo.advantages.forms import AdvantageForm, Form
from treerpo_ray.algo.groups import PruneRule, Pruning
from treerpo_ray.config.credit import own_form, own_rule
from treerpo_ray.config.data import DataConfig, as_found_here
from treerpo_ray.config.identity import check_file_name
from treerpo_ray.user_code import RAY_JOB, split_function

KindT = TypeVar("KindT", bound=StrEnum)

# What a number must be, as a field's metadata; null is always allowed where the type has it.
POSITIVE = {"above": 0}
NOT_NEGATIVE = {"at_least": 0}
SHARE = {"at_least": 0, "at_most": 1}
POSITIVE_SHARE = {"above": 0, "at_most": 1}


def _absolute(root: str) -> str:
    """A folder as every process finds it; a URI, or one in a home that is not there, as it is.

    Raises:
        ValueError: it would be in the working folder of a Ray job.
    """
    if "://" in root:
        return root
    try:
        folder = Path(root).expanduser()
    except RuntimeError:  # there is no such home; `Config` says so, unless another one is given
        return root
    if not folder.is_absolute() and RAY_JOB in os.environ:
        raise ValueError(
            f"run.root={root}: the working folder of a Ray job is removed after it; give a whole "
            "path or a URI"
        )
    return str(folder.absolute())


def _named(key: str, value: str, kind: type[KindT]) -> KindT | str:
    """A member of `kind` by its name or value, or a function of the user's.

    Raises:
        ValueError: it is neither.
    """
    if value.lower() in list(kind):
        return kind(value.lower())
    try:
        split_function(value)
    except ValueError as error:
        names = ", ".join(member.name for member in kind)
        raise ValueError(
            f"{key}: {value} is none of {names}, nor module:function or file.py:function"
        ) from error
    return value


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is run, and where it is written."""

    name: str = "treerpo"
    """Name of the run; a run of the same name goes on where it was. If not given it is made of the
    configuration files and the overrides, such as `quickstart-dapo-seed=1`."""
    root: str = "~/treerpo_runs"
    """Folder or URI (s3://, gs://) of all runs; run folders are `root/name`. A relative one is
    taken from the working folder of whoever starts the run."""
    seed: int = 0
    """Seed of prompts, trees and the learner."""
    num_steps: int = field(default=100, metadata=POSITIVE)
    """Learner steps of the whole run; each consumes `gate.trees_per_step` trees."""
    max_sampled_tokens: int | None = field(default=None, metadata=POSITIVE)
    """The learner step that reaches so many sampled tokens is the last one, whatever `num_steps`
    says; null: `num_steps` alone ends the run."""
    stall_timeout_s: float = 7200.0
    """Time that a stage may stand still before the run stops with a report; longer than any
    learner step, than `engine.request_timeout_s` and than twice `engine.load_timeout_s`, after
    which a hung engine is replaced."""

    def __post_init__(self) -> None:
        if set(self.name.split("/")) & {"", ".", ".."}:
            raise ValueError(f"run.name={self.name!r} must be a folder in run.root")
        for part in self.name.split("/"):
            check_file_name("run.name", part)
        for key, value in (("name", self.name), ("root", self.root)):
            if set(value) & set("*?[]"):  # file systems would look for what it matches
                raise ValueError(f"run.{key}={value} must not have * ? [ or ]")
        # Processes of a run have other working folders than the one that makes this.
        object.__setattr__(self, "root", _absolute(self.root))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy that is trained."""

    path: str = "treerpo_ray/quickstart/model"
    """Hugging Face id or folder with safetensors weights and tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the engines; the learner keeps float32 weights and computes in this."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer as the end token does, in training and evaluation, wherever in it
    they are completed. What was sampled of them is trained and graded with the answer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", as_found_here(self.path))


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """How a tree is sampled."""

    num_children: tuple[int, ...] = (8, 8, 8)
    """Children of an expanded step, one entry a depth; [16] is GRPO with 16 samples."""
    step_tokens: tuple[int, ...] = (384, 384, 384)
    """Most tokens of a step, one entry a depth. Where only `num_children` is given, with another
    number of depths, their sum is shared out equally: an answer is as long as before."""
    delimiter: str | None = None
    """Text of one token that also ends a step above the last depth; none: by length alone."""
    adaptive: bool = False
    """Whether forks are where the measured variance is: in one learner step of `learner.fork_every`
    a quarter of the trees, and 8 if there are so many, have `num_children`, two levels or more,
    and measure each fork behind a first step; all others have the one fork that needs the fewest
    tokens, or are single answers where none pays: `treerpo_ray/algo/forks/adaptive_shape.py`."""
    entropy_window: int = 0
    """Entropy branching: a full step that is to have several children is cut before the least
    likely of so many tokens at its end; 0: off."""
    temperature: float = field(default=0.6, metadata=POSITIVE)
    """Sampling temperature; the learner divides its logits by the same."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Admission of trees."""

    trees_per_step: int = field(default=128, metadata=POSITIVE)
    """Trees (questions) that one learner step consumes."""
    max_staleness: int = field(default=1, metadata=NOT_NEGATIVE)
    """Learner steps by which a tree may be behind; 0 is strictly on-policy."""
    max_redraws: int = field(default=0, metadata=NOT_NEGATIVE)
    """Times a ticket whose tree has no kept group draws another prompt (DAPO's refill)."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """vLLM engines, each in an actor of its own."""

    num_engines: int = field(default=1, metadata=POSITIVE)
    """Engines that search and evaluate; the fewest, where the pool may grow."""
    max_engines: int | None = None
    """Most engines: the pool grows to them while trees wait; null: always `num_engines`."""
    max_trees: int | None = field(default=None, metadata=POSITIVE)
    """Trees that one engine grows at a time, the others wait; null: any number."""
    shrink_after_s: float = field(default=120.0, metadata=NOT_NEGATIVE)
    """Time that fewer engines must have been enough before the pool shrinks to them."""
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 0.5})
    """Ray resources of one engine, such as {GPU: 1, rollout_slot: 1}."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the Ray nodes that engines may run on, such as {role: rollout}."""
    tensor_parallel: int = field(default=1, metadata=POSITIVE)
    """GPUs of one engine, all of one node."""
    quantization: Literal["fp8"] | None = None
    """Type that engines compute linear layers in, a byte a weight: fp8 rounds each version's
    weights anew as they come. The learner's stay as they are, so that engines sample from another
    distribution: `loss.importance_cap` must be set. Null: `model.dtype`."""
    max_num_seqs: int = field(default=256, metadata=POSITIVE)
    """Requests that one engine decodes at a time."""
    gpu_memory_gib: float | None = field(default=None, metadata=POSITIVE)
    """Memory of one of its GPUs in GiB, which the plan must fit: 79 of 80 GB, 22 of an L4; null:
    not known, and not checked."""
    kv_cache_gib: float | None = field(default=1.0, metadata=POSITIVE)
    """KV cache of one engine in GiB; null on a GPU means what `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float = field(default=0.85, metadata=POSITIVE_SHARE)
    """Share of a GPU's memory that an engine takes where `kv_cache_gib` is null."""
    sleep: bool = False
    """Whether engines give their GPUs' memory, weights and KV cache, to the learner while it
    updates. Needs `gate.max_staleness` 0: engine and learner work in turns."""
    cpu_threads: int = field(default=1, metadata=POSITIVE)
    """OpenMP threads of a CPU engine."""
    start_timeout_s: float = field(default=600.0, metadata=POSITIVE)
    """Time after which an engine that does not come up is started again, five times at most."""
    load_timeout_s: float = field(default=300.0, metadata=POSITIVE)
    """Time that an engine gets to take new weights over, and once more to be probed, before it
    counts as hung while the learner waits; 7B weights (15 GB) need 50 MB/s."""
    request_timeout_s: float = field(default=1800.0, metadata=POSITIVE)
    """Time that an engine may go without a finished step group, of whichever of its trees, before
    it counts as hung."""

    @property
    def most(self) -> int:
        """Engines that the pool may grow to."""
        return self.num_engines if self.max_engines is None else self.max_engines

    @property
    def join_timeout_s(self) -> float:
        """Time that all engines get to join a group that sends weights: of what they have for a
        version, so that those which wait for one that has died are not taken for dead, too."""
        return self.load_timeout_s / 2

    @property
    def start_share(self) -> float:
        """Share of a GPU that must be free before vLLM starts, whatever it takes afterwards.

        With a KV cache of fixed size it counts for nothing else: a large one would only keep an
        engine from being started again beside a learner that has grown meanwhile.
        """
        return self.gpu_memory_utilization if self.kv_cache_gib is None else 0.01


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The Ray Train workers and their optimizer."""

    num_workers: int = field(default=1, metadata=POSITIVE)
    """Data-parallel workers; `gate.trees_per_step` must be a multiple."""
    min_workers: int | None = None
    """Fewest workers to go on with when train nodes are lost; up to `num_workers` as they come
    back. None: always `num_workers`. Needs nodes of its own, by a resource such as train_slot."""
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 0.5})
    """Ray resources of one worker, such as {GPU: 1, train_slot: 1}."""
    gpu_memory_gib: float | None = field(default=None, metadata=POSITIVE)
    """Memory of its GPU in GiB, which the plan must fit; null: not known, and not checked."""
    cpu_threads: int = field(default=1, metadata=POSITIVE)
    """Torch threads of a CPU worker."""
    max_failures: int = field(default=3, metadata=NOT_NEGATIVE)
    """Times the worker group is started again after a worker or its node was lost, until it gets
    further than ever before, after 1 s, then 20, 40 and 60 s. 0: a failure ends the run."""
    learning_rate: float = field(default=1e-6, metadata=POSITIVE)
    """Rate of AdamW after warm-up."""
    final_rate: float = field(default=1.0, metadata=SHARE)
    """Share of `learning_rate` that is left at the end of the run, to which the rate falls
    linearly with learner steps or, if they are further, with `run.max_sampled_tokens`."""
    warmup_steps: int = field(default=0, metadata=NOT_NEGATIVE)
    """Optimizer steps over which the rate rises from zero."""
    weight_decay: float = field(default=0.01, metadata=NOT_NEGATIVE)
    """Decoupled weight decay of AdamW."""
    clip_grad_norm: float = field(default=1.0, metadata=POSITIVE)
    """Largest norm of the gradient."""
    minibatches: int = field(default=1, metadata=POSITIVE)
    """Optimizer steps that one learner step is split into; the paper takes 2."""
    advantage: AdvantageForm | str = AdvantageForm.BERNOULLI
    """How values become advantages: a name, or a function of yours as module:function or
    file.py:function; see `treerpo_ray/config/credit.py`."""
    baseline_share: float = field(default=1.0, metadata=SHARE)
    """Share of its baseline that `shrunk_baseline` takes off from a step's value: with 0 only what
    was right is trained (RAFT), whatever the shape of the trees."""
    prune: PruneRule | str = PruneRule.RANGE
    """What must be above `prune_threshold` for a step group to be trained: the `range` of its
    values (the paper) or of its whole tree's rewards (`tree_range`), the `significance` (spread of
    its values in standard errors), or `shrinkage`: the share of the spread that is no noise, by
    which the group's advantages are scaled too. Or a function of yours, as for `advantage`."""
    prune_threshold: float = 0.1
    """Threshold of `prune` (the paper's tau); negative: every group is trained."""
    length_weight: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Weight of length among right answers, added to the advantages of whatever form: a right step
    that is longer than its right siblings by all the tokens that an answer may have gets so much
    less, and groups are kept whose right answers differ in length. See
    `treerpo_ray/algo/advantages/length.py`."""
    fork_every: int = field(default=10, metadata=NOT_NEGATIVE)
    """Learner steps between two looks at whether another place or number of forks would need fewer
    tokens (metrics `fork/`), by one more forward pass of the trees; 0: never."""
    token_budget: int = field(default=16384, metadata=POSITIVE)
    """Most tokens of one forward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    shard: bool = False
    """Whether weights, gradients and optimizer lie on all workers, a part on each (FSDP2), and are
    computed in `model.dtype` throughout; else each worker holds them whole."""
    offload: bool = False
    """Whether a worker keeps its part in main memory and updates it there; needs `shard`."""
    compile: bool = False
    """Whether torch compiles the layers: minutes at the start, faster passes after it."""
    sources: dict[str, str] = field(default_factory=dict)
    """Packed source of the files and modules named above; filled in when a run is started."""

    def __post_init__(self) -> None:
        for key, kind in (("advantage", AdvantageForm), ("prune", PruneRule)):
            object.__setattr__(self, key, _named(f"learner.{key}", getattr(self, key), kind))

    @property
    def fewest_workers(self) -> int:
        """Workers that the run needs to go on."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def form(self) -> Form:
        """What an advantage is.

        Raises:
            UserCodeError: that of the user cannot be used.
        """
        return own_form(self.advantage, self.sources)

    @property
    def pruning(self) -> Pruning:
        """Rule and threshold.

        Raises:
            UserCodeError: the rule of the user cannot be used.
        """
        return Pruning(
            rule=own_rule(self.prune, self.sources),
            threshold=self.prune_threshold,
            keeps_lengths=self.length_weight > 0,
        )

    @property
    def leaves_out_alike(self) -> bool:
        """Whether only children and siblings of one value are trained less, or not at all."""
        return self.prune_threshold >= 0 or self.prune is PruneRule.SHRINKAGE


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """Weight sync from the learner to the engines."""

    transport: Literal["file", "ipc", "nccl"] = "file"
    """How weights travel: `file`, through main memory, in one file a node; `ipc`, on the one GPU
    that worker and engine share; `nccl`, from the learner's GPU to all others at once (gloo where
    there is no GPU), which get half of `engine.load_timeout_s` to meet."""
    chunk_mib: int = field(default=256, metadata=POSITIVE)
    """Size of the chunks that weights travel in."""
    probe_every: int = field(default=10, metadata=POSITIVE)
    """Syncs between comparisons of engine and learner log-probabilities; also at start."""
    probe_tolerance: float = field(default=1e-3, metadata=POSITIVE)
    """Largest mean difference (nats a token) that a probe may show; 0.1 with bfloat16, 0.5 with
    `engine.quantization`=fp8."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation before, during and after training."""

    data: DataConfig = field(default_factory=DataConfig)
    """Held-out problems; no path, no evaluation. Columns, template, system prompt, arguments of the
    chat template and length of a prompt are those of `prompts` if not given."""
    num_samples: int = field(default=8, metadata=POSITIVE)
    """Answers a problem; Pass@1 is their mean."""
    temperature: float = field(default=0.6, metadata=NOT_NEGATIVE)
    """Sampling temperature."""
    top_p: float = field(default=1.0, metadata=POSITIVE_SHARE)
    """Tokens are drawn from the smallest set that has this probability."""
    max_tokens: int | None = field(default=None, metadata=POSITIVE)
    """Most tokens of an answer; as in training if not given."""
    pass_ks: tuple[int, ...] = ()
    """The k of pass@k; powers of two up to `num_samples` if none is named."""
    benchmarks: dict[str, DataConfig] = field(default_factory=dict)
    """Data sets by name, for `jobs/evaluate.py`; training evaluates `data` alone. What is not given
    is taken from `prompts` as for `data`."""
    every: int = field(default=0, metadata=NOT_NEGATIVE)
    """Learner steps between evaluations during training; 0: only before and after."""
    interim_samples: int | None = field(default=None, metadata=POSITIVE)
    """Answers a problem of the evaluations during training, which show a curve and decide nothing;
    as `num_samples` if not given."""

    def __post_init__(self) -> None:
        for name in self.benchmarks:
            check_file_name("evaluate.benchmarks", name)  # its results are files of that name

    @property
    def interim(self) -> "EvaluateConfig":
        """Settings of the evaluations during training."""
        if self.interim_samples is None:
            return self
        return replace(self, num_samples=self.interim_samples, pass_ks=())


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints in the run folder."""

    every: int = field(default=1, metadata=POSITIVE)
    """Learner steps between checkpoints, and at most what a lost worker or driver costs; one is
    always written at the end. A large model takes its time to be written: there, more."""
    keep: int = field(default=2, metadata=POSITIVE)
    """Newest checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go besides `metrics.jsonl` and the terminal."""

    wandb_project: str | None = "treerpo_ray"
    """Weights & Biases project; null turns it off. Without an API key it runs offline."""
    save_trees_every: int = field(default=1, metadata=NOT_NEGATIVE)
    """Learner steps between saved batches of trees; 0: none."""
