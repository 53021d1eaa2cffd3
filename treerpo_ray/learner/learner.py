"""Learner: one Ray Train worker's policy and optimizer; takes whole trees, makes updates.

Each worker computes the advantages of its own trees, since no step group crosses workers. What
crosses them is the number of trained tokens and steps, the gradients (summed) and statistics.
Every worker holds the whole model and makes the same update or, where it is sharded, a part of the
model and of the update.
"""

import json
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from safetensors.torch import load_file, save_file

from treerpo_ray.algo.advantages import has_baseline, step_advantages
from treerpo_ray.algo.backup import Values, mean_backup
from treerpo_ray.algo.groups import StepGroups, step_groups
from treerpo_ray.algo.loss import LossInputs, LossSums, policy_loss
from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.algo.packing import Forest, pack
from treerpo_ray.algo.tree import Tree
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import LearnerConfig, ModelConfig, TreeConfig
from treerpo_ray.learner.adapters import ADAPTER_FOLDER
from treerpo_ray.learner.policy import DTYPES, ForestTensors, Policy, load_policy
from treerpo_ray.learner.shards.moments import read_moments, write_moments
from treerpo_ray.learner.shards.sharding import Sharding
from treerpo_ray.learner.stats import BatchStats, count
from treerpo_ray.learner.update_result import TrainedTrees, UpdateResult
from treerpo_ray.prompts.prompt_set import resolve_model_path
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.checkpoints import BYTES_A_PARAMETER
from treerpo_ray.run_folder.files import MODEL_FOLDER


class _Addable(Protocol):
    def __add__(self, other: Self, /) -> Self: ...


T = TypeVar("T")
SumT = TypeVar("SumT", bound=_Addable)
STATE_FILE = "learner.json"
MOMENTS_FOLDER = "moments"
RNG_FILE = "rng.safetensors"
BASELINE_STEPS = 10
"""Learner steps that the baseline of `past_baseline` is the mean of: many enough for a small error,
few enough to follow a policy that learns."""
IDLE = Forest(
    token_ids=np.zeros(3, np.int64),
    position_ids=np.arange(3),
    segment_start=np.array([0, 1]),
    segment_length=np.array([1, 2]),
    segment_parent=np.array([-1, 0]),
    segment_depth=np.array([0, 1]),
    source=np.array([0, 1]),
    target=np.zeros(2, np.int64),
    advantage=np.zeros(2, np.float32),
    behaviour_logprob=np.zeros(2, np.float32),
    step=np.zeros(2, np.int32),
    origin=np.zeros(1, np.int64),
)
"""What a worker passes that has nothing to train while another one has."""


class Learner:
    """Policy and optimizer of one worker.

    Args:
        model: Where the model is found, and the type that its forward pass computes in.
        learner: Settings of the optimizer and of the training signal.
        loss: Settings of the loss.
        tree: Shape of the trees and the temperature that they are sampled at.
        max_staleness: Updates that a tree may be behind.
        max_tokens: Of the longest prompt with its answer, which engines have room for.
        device: Where this worker computes.
        sets: Names of the data sets that are trained on, where several are mixed.
        lora: Adapters that are trained in place of the model's own weights, if its rank is above 0.
        checkpoint: Folder that `write` filled, to go on from; None starts from `model.path`.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        learner: LearnerConfig,
        loss: LossConfig,
        tree: TreeConfig,
        max_staleness: int,
        max_tokens: int,
        device: torch.device,
        sets: Collection[str] = (),
        lora: LoraConfig | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.model, self.settings, self.loss, self.tree = model, learner, loss, tree
        self.max_staleness, self.max_tokens, self.device = max_staleness, max_tokens, device
        self.sets = sets
        if device.type == "cpu":
            torch.set_num_threads(learner.cpu_threads)
        start = resolve_model_path(model.path)
        self.sharding: Sharding | None = None
        if learner.shard:
            dtype = DTYPES[model.dtype]
            self.sharding = Sharding.over_workers(device, dtype, offload=learner.offload)
        self.form, self.pruning = learner.form, learner.pruning
        # What is never updated is held in the type that is computed in.
        frozen, recomputes = DTYPES[model.dtype], learner.gradient_checkpointing
        # The KL is to the model that the run started from, whatever it is resumed from.
        self.reference: Policy | None = None
        if lora is not None and lora.rank:
            folder = None if checkpoint is None else checkpoint / ADAPTER_FOLDER
            self.policy = self._load(
                start, frozen, gradient_checkpointing=recomputes, lora=lora, adapters_from=folder
            )
        else:
            place = start if checkpoint is None else str(checkpoint / MODEL_FOLDER)
            self.policy = self._load(place, torch.float32, gradient_checkpointing=recomputes)
            if loss.kl_coef:
                self.reference = self._load(start, frozen)
        self.optimizer = torch.optim.AdamW(
            self.policy.trained,
            lr=learner.learning_rate,
            weight_decay=learner.weight_decay,
            fused=True,  # what a GPU would take by itself needs one more copy of the gradients
        )
        self.version = self.optimizer_steps = 0
        self._past_values: deque[float] = deque(maxlen=BASELINE_STEPS)
        """Mean root values of the newest batches, of all workers."""
        if checkpoint is not None:
            self._restore(checkpoint)

    def _load(
        self,
        path: str,
        dtype: torch.dtype,
        *,
        gradient_checkpointing: bool = False,
        lora: LoraConfig | None = None,
        adapters_from: Path | None = None,
    ) -> Policy:
        load = partial(
            load_policy,
            path,
            dtype=dtype,
            device=self.device,
            gradient_checkpointing=gradient_checkpointing,
            compiled=self.settings.compile,
            sharding=self.sharding,
            trust_remote_code=self.model.trust_remote_code,
            max_tokens=self.max_tokens,
            lora=lora,
            adapters_from=adapters_from,
        )
        return load() if self.sharding is None else self.sharding.in_turn(load)

    # The update ------------------------------------------------------------------------------

    def learning_rate(self, progress: float) -> float:
        """Rate of the next optimizer step, when the share `progress` of the run is done."""
        settings = self.settings
        warm = min(1.0, (self.optimizer_steps + 1) / (settings.warmup_steps + 1))
        return settings.learning_rate * warm * (1 - (1 - settings.final_rate) * progress)

    @property
    def baseline(self) -> float:
        """Mean root value of the newest batches; 0 before the first."""
        return float(np.mean(self._past_values)) if self._past_values else 0.0

    def update(self, records: Sequence[TreeRecord], progress: float = 0.0) -> UpdateResult:
        """Train on this worker's share of a batch; every worker must call it.

        Args:
            records: Its trees.
            progress: Share of the run that was done before this batch.

        Raises:
            RuntimeError: a tree is staler than `gate.max_staleness` allows or newer than the
                policy, or the gradient is not finite.
        """
        form, pruning, start = self.form, self.pruning, time.monotonic()
        # Trees come as they finish; their order decides minibatches and how sums are rounded.
        order = sorted(range(len(records)), key=lambda place: records[place].ticket)
        records = [records[place] for place in order]
        trees = [record.tree for record in records]
        rate, baseline = self.learning_rate(progress), self.baseline

        values = [mean_backup(record.tree, record.rewards) for record in records]
        groups = [step_groups(tree, own) for tree, own in zip(trees, values, strict=True)]
        advantages = [
            step_advantages(
                tree, own, form=form, pruning=pruning, groups=siblings, baseline=baseline
            )
            for tree, own, siblings in zip(trees, values, groups, strict=True)
        ]
        stats = self._count(records, values, groups, baseline)
        self._check_staleness(stats)
        minibatches = self._minibatches(trees, advantages)
        steps = self._optimizer_steps(minibatches, progress)
        has_updated = any(step.norm is not None for step in steps)
        self.version += has_updated

        total = _summed(_gathered(stats), BatchStats())
        if total.num_valued:
            self._past_values.append(total.value_sum / total.num_valued)
        metrics = self._loss_metrics(steps)
        trained = metrics.get("tokens/trained", 0.0)
        metrics["tokens/trained_share"] = trained / max(total.num_sampled_tokens, 1)
        baselines = {"learner/baseline": baseline} if has_baseline(form) else {}
        return UpdateResult(
            has_updated=has_updated,
            stats=total,
            metrics={"learner/learning_rate": rate, **metrics, **baselines},
            seconds=time.monotonic() - start,
            trained=TrainedTrees(
                order=order,
                trees=trees,
                advantages=advantages,
                minibatches=minibatches,
                logprobs=[step.logprobs for step in steps],
            ),
        )

    def _count(
        self,
        records: Sequence[TreeRecord],
        values: Sequence[Values],
        groups: Sequence[Sequence[StepGroups]],
        baseline: float,
    ) -> BatchStats:
        """Statistics of this worker's trees."""
        counted = [
            count(
                record,
                own,
                siblings,
                form=self.form,
                pruning=self.pruning,
                baseline=baseline,
                sets=self.sets,
            )
            for record, own, siblings in zip(records, values, groups, strict=True)
        ]
        return _summed(counted, BatchStats())

    def _minibatches(
        self, trees: Sequence[Tree], advantages: Sequence[Float64[np.ndarray, " _"]]
    ) -> list[list[Forest]]:
        """Forests of each optimizer step; all of them have equally many trees."""
        size, budget = len(trees) // self.settings.minibatches, self.settings.token_budget
        return [
            pack(trees[i : i + size], advantages[i : i + size], budget)
            for i in range(0, len(trees), size)
        ]

    def _check_staleness(self, stats: BatchStats) -> None:
        """Invariant: admission bounds the age of every token; versions count updates."""
        staleness, limit = self.version - stats.min_version, self.max_staleness
        if stats.num_trees and staleness > limit:
            raise RuntimeError(
                f"a tree is {staleness} versions behind the learner, gate.max_staleness is {limit}"
            )
        if stats.max_version > self.version:
            raise RuntimeError(
                f"a tree has tokens of version {stats.max_version}, but the learner is at version "
                f"{self.version}: they were sampled before it was set back"
            )

    def _optimizer_steps(self, minibatches: list[list[Forest]], progress: float) -> "list[_Step]":
        """An optimizer step for each minibatch, all with the ratios to the policy before them."""
        # With one minibatch the policy of the iteration's start is the current one.
        old: list[list[torch.Tensor | None]] = [[None] * len(forests) for forests in minibatches]
        if len(minibatches) > 1:
            num_idle = self._idle_passes(sum(map(len, minibatches)))
            old = [[self._logprobs_now(forest) for forest in forests] for forests in minibatches]
            for _ in range(num_idle):
                self._logprobs_now(IDLE)
        return [
            self._optimize(forests, logprobs, progress)
            for forests, logprobs in zip(minibatches, old, strict=True)
        ]

    def _optimize(
        self, forests: list[Forest], old_logprobs: list[torch.Tensor | None], progress: float
    ) -> "_Step":
        """One optimizer step; none is made if no worker has anything to train."""
        counts = torch.tensor(
            [sum(len(f.target) for f in forests), sum(f.num_steps for f in forests)],
            device=self.device,
        )
        _all_reduce(counts)
        num_tokens, num_steps = counts.tolist()
        sums = LossSums.zeros(self.device)
        if not num_tokens:
            return _Step(sums=sums, norm=None, logprobs=[])
        num_idle = self._idle_passes(len(forests))
        self.optimizer.zero_grad(set_to_none=False)
        seen: list[torch.Tensor] = []
        for forest, old in zip(forests, old_logprobs, strict=True):
            inputs = self._loss_inputs(forest, old)
            seen.append(inputs.old_logprobs)
            output = policy_loss(
                inputs,
                num_batch_tokens=num_tokens,
                num_batch_steps=num_steps,
                max_answer_tokens=sum(self.tree.step_tokens),
                config=self.loss,
            )
            output.loss.backward()
            sums += output.sums
        for _ in range(num_idle):
            idle = self._loss_inputs(IDLE, None)
            (0.0 * (idle.logprobs.sum() + idle.entropy.sum())).backward()
        self._sum_gradients()
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.trained,
            self.settings.clip_grad_norm,
            error_if_nonfinite=True,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress)
        self.optimizer.step()
        self.optimizer_steps += 1
        return _Step(sums=sums, norm=float(norm), logprobs=seen)

    def _loss_metrics(self, steps: Sequence["_Step"]) -> dict[str, float]:
        """Metrics of the losses of all workers, of the optimizer steps that were made."""
        own = _summed([step.sums for step in steps], LossSums.zeros(self.device))
        parts = [LossSums.from_vector(vector) for vector in _gathered(own.vector().cpu())]
        norms = [step.norm for step in steps if step.norm is not None]
        if not norms:
            return {}
        total = _summed(parts, LossSums.zeros(torch.device("cpu")))
        metrics = total.metrics() | {
            "learner/grad_norm": float(np.mean(norms)),
            "tokens/trained": float(total.num_tokens),
        }
        for name in ("loss/total", "loss/policy"):  # each minibatch has a loss of its own
            metrics[name] /= len(norms)
        return metrics

    def _loss_inputs(self, packed: Forest, old: torch.Tensor | None) -> LossInputs:
        forest = ForestTensors.from_forest(packed, self.device)
        reference = self._reference_logprobs(forest) if self.loss.kl_coef else None
        logprobs, entropy = self._forward(self.policy, forest)
        return LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() if old is None else old,
            behaviour_logprobs=forest.behaviour_logprob,
            reference_logprobs=reference,
            entropy=entropy,
            advantages=forest.advantage,
            step=forest.step,
        )

    @torch.no_grad()
    def _reference_logprobs(self, forest: ForestTensors) -> torch.Tensor:
        if self.reference is not None:
            return self._forward(self.reference, forest)[0]
        assert self.policy.adapters is not None
        with self.policy.adapters.off():
            return self._forward(self.policy, forest)[0]

    def _forward(self, policy: Policy, forest: ForestTensors) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = DTYPES[self.model.dtype]
        # What is sharded is gathered in the type that is computed in.
        is_cast = dtype != torch.float32 and self.sharding is None
        with torch.autocast(self.device.type, dtype, enabled=is_cast):
            return policy.edge_logprobs(forest, self.tree.temperature)

    @torch.no_grad()
    def _logprobs_now(self, packed: Forest) -> torch.Tensor:
        return self._forward(self.policy, ForestTensors.from_forest(packed, self.device))[0]

    def _sum_gradients(self) -> None:
        """Sum, not mean: the loss of each forest is already divided by the batch's counts."""
        for parameter in self.policy.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.sharding is None:  # else it is the sum's own part
                _all_reduce(parameter.grad)

    def _idle_passes(self, num_own: int) -> int:
        """Passes that this worker makes besides its own, so that all make as many as any needs.

        Each pass gathers a sharded model from all.
        """
        if self.sharding is None:
            return 0
        most = torch.tensor(num_own, device=self.device)
        _all_reduce(most, dist.ReduceOp.MAX)
        return int(most) - num_own

    # Checkpoints -----------------------------------------------------------------------------

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes that `write` writes, about: what is trained and both moments in float32."""
        return BYTES_A_PARAMETER * sum(each.numel() for each in self.policy.trained)

    def write(self, folder: Path) -> None:
        """Write everything that a resumed run needs.

        Of a sharded learner all workers do so together, each its part, with the same number of
        workers or another one to go on from it.

        Raises:
            OSError: a disk refuses; on all workers, if it refuses the moments.
        """
        is_sharded = self.sharding is not None
        model = self.policy.model
        write_moments(folder / MOMENTS_FOLDER, model, self.optimizer, is_sharded=is_sharded)
        if self.policy.adapters is None:
            self.policy.save_pretrained(folder / MODEL_FOLDER)
        else:
            self.policy.save_adapters(folder / ADAPTER_FOLDER)
        if self.sharding is not None and not self.sharding.is_first:
            return
        save_file({"torch": torch.get_rng_state()}, folder / RNG_FILE)
        counts = {"version": self.version, "optimizer_steps": self.optimizer_steps}
        past = {"past_values": list(self._past_values)}
        (folder / STATE_FILE).write_text(json.dumps(counts | past))

    def _restore(self, folder: Path) -> None:
        """Take over moments, counts and the values of the newest batches.

        Rate, weight decay and the like are the configuration's, which may have been changed.
        """
        counts = json.loads((folder / STATE_FILE).read_text())
        self.version, self.optimizer_steps = counts["version"], counts["optimizer_steps"]
        moments = folder / MOMENTS_FOLDER
        read_moments(moments, self.policy.model, self.optimizer, self.optimizer_steps)
        torch.set_rng_state(load_file(folder / RNG_FILE)["torch"])
        self._past_values.extend(counts.get("past_values", []))  # older checkpoints have none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """What an optimizer step saw."""

    sums: LossSums
    norm: float | None
    """Of the gradient; None if there was nothing to train on."""
    logprobs: list[torch.Tensor]
    """Of each forest's edges: `LossInputs.old_logprobs`."""


def _all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op)


def _gathered(own: T) -> list[T]:
    """`own` of every worker, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    parts: list[T] = [own] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts


def _summed(parts: Sequence[SumT], zero: SumT) -> SumT:
    return sum(parts, start=zero)
