"""Learner: one Ray Train worker's part of the training; takes whole trees, makes updates.

Each worker computes the advantages of its own trees, since no step group crosses workers: their
statistics do, and what its optimizer says.
"""

import json
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from safetensors.torch import load_file, save_file

from treerpo_ray.algo.advantages.baselines import (
    PAST_STEPS,
    Baseline,
    PastStep,
    baseline_after,
    variance_sums,
)
from treerpo_ray.algo.advantages.errors import advantage_errors
from treerpo_ray.algo.advantages.forms import (
    AdvantageForm,
    all_advantages,
    has_baseline,
    single_baseline,
    trained_advantages,
)
from treerpo_ray.algo.advantages.length import token_price
from treerpo_ray.algo.backup import Values, mean_backup
from treerpo_ray.algo.groups import StepGroups, step_groups
from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.algo.packing import Forest, pack
from treerpo_ray.algo.tree import Tree
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import GateConfig, LearnerConfig, ModelConfig, TreeConfig
from treerpo_ray.learner.fork_probe import ForkProbe
from treerpo_ray.learner.optimizer import PolicyOptimizer, gathered
from treerpo_ray.learner.policy import DTYPES, Policy, load_policy
from treerpo_ray.learner.shards.sharding import Sharding
from treerpo_ray.learner.stats import BatchStats, Sums, count
from treerpo_ray.learner.update_result import TrainedTrees, UpdateResult
from treerpo_ray.metrics.fork_lines import shape_row
from treerpo_ray.metrics.rows import Row
from treerpo_ray.prompts.prompt_set import resolve_model_path
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.checkpoints import BYTES_A_PARAMETER
from treerpo_ray.run_folder.files import ADAPTER_FOLDER, MODEL_FOLDER

STATE_FILE = "learner.json"
MOMENTS_FOLDER = "moments"
RNG_FILE = "rng.safetensors"


class Learner:
    """Policy and optimizer of one worker.

    Args:
        model: Where the model is found, and the type that its forward pass computes in.
        learner: Settings of the optimizer and of the training signal.
        loss: Settings of the loss.
        tree: Shape of the trees and the temperature that they are sampled at.
        gate: Trees of a learner step, of all workers, and how many updates they may be behind.
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
        gate: GateConfig,
        max_tokens: int,
        device: torch.device,
        sets: Collection[str] = (),
        lora: LoraConfig | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.model, self.settings = model, learner
        self.max_staleness = gate.max_staleness
        self.max_tokens, self.device = max_tokens, device
        self.sets = sets
        if device.type == "cpu":
            torch.set_num_threads(learner.cpu_threads)
        start = resolve_model_path(model.path)
        self.sharding: Sharding | None = None
        if learner.shard:
            dtype = DTYPES[model.dtype]
            self.sharding = Sharding.over_workers(device, dtype, offload=learner.offload)
        self.form, self.pruning = learner.form, learner.pruning
        self.token_price = token_price(learner.length_weight, tree.step_tokens)
        # What is never updated is held in the type that is computed in.
        frozen, recomputes = DTYPES[model.dtype], learner.gradient_checkpointing
        # The KL is to the model that the run started from, whatever it is resumed from.
        reference: Policy | None = None
        if lora is not None and lora.rank:
            folder = None if checkpoint is None else checkpoint / ADAPTER_FOLDER
            self.policy = self._load(
                start, frozen, gradient_checkpointing=recomputes, lora=lora, adapters_from=folder
            )
        else:
            place = start if checkpoint is None else str(checkpoint / MODEL_FOLDER)
            self.policy = self._load(place, torch.float32, gradient_checkpointing=recomputes)
            if loss.kl_coef:
                reference = self._load(start, frozen)
        self.optimizer = PolicyOptimizer(
            self.policy,
            reference=reference,
            settings=learner,
            loss=loss,
            tree=tree,
            dtype=DTYPES[model.dtype],
            device=device,
        )
        self.version = self.step = 0
        """Updates that moved the policy, and learner steps, with those that moved nothing."""
        self._past: deque[PastStep] = deque(maxlen=PAST_STEPS)
        """What the newest batches, of all workers, say of the next one."""
        size = gate.trees_per_step
        self.forks = ForkProbe(every=learner.fork_every, tree=tree, size=size, loss=loss)
        """Where trees would pay, by past batches."""
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

    @property
    def baseline(self) -> Baseline:
        """What the newest batches tell of the next one."""
        return baseline_after(self._past, self.settings.baseline_share)

    def update(self, records: Sequence[TreeRecord], progress: float = 0.0) -> UpdateResult:
        """Train on this worker's share of a batch; every worker must call it.

        Args:
            records: Its trees.
            progress: Share of the run that was done before this batch.

        Raises:
            RuntimeError: a tree is staler than `gate.max_staleness` allows or newer than the
                policy, or the gradient is not finite.
        """
        start = time.monotonic()
        rate, baseline = self.optimizer.learning_rate(progress), self.baseline
        trained, own = self.prepare(records)
        self._check_staleness(own)
        chosen_before = self.forks.choice
        forks = self._look_for_forks(records)
        chosen = None if forks is None else self.forks.choice
        steps = self.optimizer.steps(trained.minibatches, progress)
        has_updated = any(step.norm is not None for step in steps)
        self.version += has_updated
        self.step += 1

        stats = sum(gathered(own), start=BatchStats())
        if stats.num_valued:
            self._past.append(PastStep(stats.value_sum / stats.num_valued, stats.variances))
        metrics = self.optimizer.metrics(steps)
        num_trained = metrics.get("tokens/trained", 0.0)
        metrics["tokens/trained_share"] = num_trained / max(stats.num_sampled_tokens, 1)
        baselines = baseline.metrics() if has_baseline(self.form) else {}
        shapes = {} if chosen is None else shape_row(chosen.num_children)
        told = {**baselines, **(forks or {}), **shapes}
        return UpdateResult(
            has_updated=has_updated,
            stats=stats,
            metrics={"learner/learning_rate": rate, **metrics, **told},
            seconds=time.monotonic() - start,
            trained=replace(trained, logprobs=[step.logprobs for step in steps]),
            chosen=chosen,
            chosen_before=chosen_before,
        )

    def _look_for_forks(self, records: Sequence[TreeRecord]) -> Row | None:
        """Metrics of where trees would pay; None if these are not to be measured for it, or tell
        nothing. A baseline that does not depend on them needs a past."""
        if not self._past or not self.forks.is_due(self.step):
            return None
        return self.forks.look(
            self.optimizer,
            records,
            baseline=single_baseline(self.form, self.baseline),
            version=self.version,
            token_budget=self.settings.token_budget,
        )

    def prepare(self, records: Sequence[TreeRecord]) -> tuple[TrainedTrees, BatchStats]:
        """The forests of this worker's trees, before any forward pass, and their statistics."""
        # Trees come as they finish; their order decides minibatches and how sums are rounded.
        order = sorted(range(len(records)), key=lambda place: records[place].ticket)
        records = [records[place] for place in order]
        trees = [record.tree for record in records]
        values = [mean_backup(record.tree, record.rewards) for record in records]
        groups = [step_groups(tree, own) for tree, own in zip(trees, values, strict=True)]
        baseline = self.baseline
        found = [
            all_advantages(self.form, tree, own, siblings, baseline)
            for tree, own, siblings in zip(trees, values, groups, strict=True)
        ]
        advantages = [
            trained_advantages(own, siblings, self.pruning, self.token_price)
            for own, siblings in zip(found, groups, strict=True)
        ]
        trained = TrainedTrees(
            order=order,
            trees=trees,
            advantages=advantages,
            minibatches=self._minibatches(trees, advantages),
        )
        return trained, self._count(records, values, groups, found)

    def _count(
        self,
        records: Sequence[TreeRecord],
        values: Sequence[Values],
        groups: Sequence[Sequence[StepGroups]],
        advantages: Sequence[Float64[np.ndarray, " _"]],
    ) -> BatchStats:
        """Statistics of this worker's trees."""
        total, baseline = BatchStats(), self.baseline
        # Before the first step there is no baseline that values could be measured against.
        is_measured = self.form is AdvantageForm.SHRUNK_BASELINE and bool(self._past)
        for record, own, siblings, found in zip(records, values, groups, advantages, strict=True):
            errors = advantage_errors(
                record.tree,
                own,
                form=self.form,
                pruning=self.pruning,
                groups=siblings,
                baseline=baseline,
                token_price=self.token_price,
                advantages=found,
            )
            total += count(
                record, own, siblings, errors=errors, pruning=self.pruning, sets=self.sets
            )
            if is_measured:
                sums = variance_sums(record.tree, own, siblings, baseline)
                total += BatchStats(variances=Sums(sums))
        return total

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
        self.optimizer.write(folder / MOMENTS_FOLDER)
        if self.policy.adapters is None:
            self.policy.save_pretrained(folder / MODEL_FOLDER)
        else:
            self.policy.save_adapters(folder / ADAPTER_FOLDER)
        if self.sharding is not None and not self.sharding.is_first:
            return
        save_file({"torch": torch.get_rng_state()}, folder / RNG_FILE)
        counts = {
            "version": self.version,
            "step": self.step,
            "optimizer_steps": self.optimizer.num_steps,
        }
        past = {
            "past_values": [step.value for step in self._past],
            "past_variances": [step.variances for step in self._past],
        }
        (folder / STATE_FILE).write_text(json.dumps(counts | past | self.forks.state()))

    def _restore(self, folder: Path) -> None:
        """Take over moments, counts and the values of the newest batches.

        Rate, weight decay and the like are the configuration's, which may have been changed.
        """
        counts = json.loads((folder / STATE_FILE).read_text())
        self.version = counts["version"]
        self.step = counts.get("step", self.version)  # older checkpoints have none
        self.optimizer.restore(folder / MOMENTS_FOLDER, counts["optimizer_steps"])
        torch.set_rng_state(load_file(folder / RNG_FILE)["torch"])
        values = counts.get("past_values", [])  # older checkpoints have none
        variances = counts.get("past_variances", [{} for _ in values])
        self._past.extend(map(PastStep, values, variances))
        self.forks.restore(counts.get("fork_looks", []))
