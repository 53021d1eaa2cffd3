"""Optimizer: the optimizer steps of one worker's policy on packed trees, and their state.

What crosses workers are the numbers of trained tokens and steps, the gradients and the sums of the
loss. Every worker holds the whole model and makes the same step or, where it is sharded, a part of
the model and of the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from treerpo_ray.algo.loss import LossInputs, LossSums, policy_loss
from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.algo.packing import Forest
from treerpo_ray.config.sections import LearnerConfig, TreeConfig
from treerpo_ray.learner.policy import ForestTensors, Policy
from treerpo_ray.learner.shards.moments import read_moments, write_moments

T = TypeVar("T")
IDLE = Forest(
    token_ids=np.zeros(3, np.int32),
    position_ids=np.arange(3, dtype=np.int32),
    segment_start=np.array([0, 1]),
    segment_length=np.array([1, 2]),
    segment_parent=np.array([-1, 0]),
    segment_depth=np.array([0, 1]),
    source=np.array([0, 1], np.int32),
    target=np.zeros(2, np.int32),
    advantage=np.zeros(2, np.float32),
    behaviour_logprob=np.zeros(2, np.float32),
    step=np.zeros(2, np.int32),
    origin=np.zeros(1, np.int64),
)
"""What a worker passes that has nothing to train while another one has."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OptimizerStep:
    """What an optimizer step saw."""

    sums: LossSums
    norm: float | None
    """Of the gradient; None if there was nothing to train on."""
    logprobs: list[torch.Tensor]
    """Of each forest's edges: `LossInputs.old_logprobs`."""


class PolicyOptimizer:
    """AdamW for a policy, with the schedule of its rate.

    Args:
        policy: Is changed by each step.
        reference: Model that the KL is to, if the loss has one; None where it is the policy's own
            without its adapters.
        settings: Of the optimizer.
        loss: Settings of the loss.
        tree: Shape of the trees and the temperature that they are sampled at.
        dtype: Type that is computed in.
        device: Where this worker computes.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        reference: Policy | None,
        settings: LearnerConfig,
        loss: LossConfig,
        tree: TreeConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.policy, self.reference, self.settings = policy, reference, settings
        self.loss, self.tree, self.dtype, self.device = loss, tree, dtype, device
        self.is_sharded = policy.sharding is not None
        self.adamw = torch.optim.AdamW(
            policy.trained,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,  # what a GPU would take by itself needs one more copy of the gradients
        )
        self.num_steps = 0

    def learning_rate(self, progress: float) -> float:
        """Rate of the next optimizer step, when the share `progress` of the run is done."""
        settings = self.settings
        warm = min(1.0, (self.num_steps + 1) / (settings.warmup_steps + 1))
        return settings.learning_rate * warm * (1 - (1 - settings.final_rate) * progress)

    def steps(
        self, minibatches: Sequence[Sequence[Forest]], progress: float
    ) -> list[OptimizerStep]:
        """An optimizer step for each minibatch, all with the ratios to the policy before them."""
        # When the first one is trained on, the policy is still the one before them: the pass of its
        # own step gives the old log-probs, too.
        old: list[list[torch.Tensor | None]] = [[None] * len(forests) for forests in minibatches]
        if later := minibatches[1:]:
            num_idle = self._idle_passes(sum(map(len, later)))
            old[1:] = [[self._logprobs_now(forest) for forest in forests] for forests in later]
            for _ in range(num_idle):
                self._logprobs_now(IDLE)
        return [
            self._step(forests, logprobs, progress)
            for forests, logprobs in zip(minibatches, old, strict=True)
        ]

    def _step(
        self,
        forests: Sequence[Forest],
        old_logprobs: Sequence[torch.Tensor | None],
        progress: float,
    ) -> OptimizerStep:
        """One optimizer step; none is made if no worker has anything to train."""
        counts = torch.tensor(
            [sum(len(f.target) for f in forests), sum(f.num_steps for f in forests)],
            device=self.device,
        )
        _all_reduce(counts)
        num_tokens, num_steps = counts.tolist()
        sums = LossSums.zeros(self.device)
        if not num_tokens:
            return OptimizerStep(sums=sums, norm=None, logprobs=[])
        num_idle = self._idle_passes(len(forests))
        self.adamw.zero_grad(set_to_none=False)
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
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(progress)
        self.adamw.step()
        self.num_steps += 1
        return OptimizerStep(sums=sums, norm=float(norm), logprobs=seen)

    def pulls(self, forests: Sequence[Forest]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`Policy.edge_pulls` of each forest; every worker must ask, and go through all of them."""
        num_idle = self._idle_passes(len(forests))
        for packed in forests:
            yield self._pulls_now(packed)
        for _ in range(num_idle):
            self._pulls_now(IDLE)

    def logprobs(self, packed: Forest) -> torch.Tensor:
        """Log-probability (nats) of each edge's target, with its graph where gradients are on; of a
        sharded policy every worker must ask."""
        return self._forward(self.policy, ForestTensors.from_forest(packed, self.device))[0]

    def metrics(self, steps: Sequence[OptimizerStep]) -> dict[str, float]:
        """Metrics of the losses of all workers, of the optimizer steps that were made."""
        own = sum((step.sums for step in steps), start=LossSums.zeros(self.device))
        parts = [LossSums.from_vector(vector) for vector in gathered(own.vector().cpu())]
        norms = [step.norm for step in steps if step.norm is not None]
        if not norms:
            return {}
        total = sum(parts, start=LossSums.zeros(torch.device("cpu")))
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
        with self._computing():
            return policy.edge_logprobs(forest, self.tree.temperature)

    def _pulls_now(self, packed: Forest) -> tuple[torch.Tensor, torch.Tensor]:
        with self._computing():
            forest = ForestTensors.from_forest(packed, self.device)
            return self.policy.edge_pulls(forest, self.tree.temperature)

    def _computing(self) -> torch.autocast:
        """In the type of the settings."""
        # What is sharded is gathered in the type that is computed in.
        is_cast = self.dtype != torch.float32 and not self.is_sharded
        return torch.autocast(self.device.type, self.dtype, enabled=is_cast)

    @torch.no_grad()
    def _logprobs_now(self, packed: Forest) -> torch.Tensor:
        return self.logprobs(packed)

    def _sum_gradients(self) -> None:
        """Sum, not mean: the loss of each forest is already divided by the batch's counts."""
        for parameter in self.policy.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not self.is_sharded:  # else it is the sum's own part
                _all_reduce(parameter.grad)

    def _idle_passes(self, num_own: int) -> int:
        """Passes that this worker makes besides its own, so that all make as many as any needs.

        Each pass gathers a sharded model from all.
        """
        if not self.is_sharded:
            return 0
        most = torch.tensor(num_own, device=self.device)
        _all_reduce(most, dist.ReduceOp.MAX)
        return int(most) - num_own

    def write(self, folder: Path) -> None:
        """Write the moments; of a sharded policy all workers do so together."""
        write_moments(folder, self.policy.model, self.adamw, is_sharded=self.is_sharded)

    def restore(self, folder: Path, num_steps: int) -> None:
        """Take over the moments that `write` left after so many steps."""
        self.num_steps = num_steps
        read_moments(folder, self.policy.model, self.adamw, num_steps)


def _all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op)


def gathered(own: T) -> list[T]:
    """`own` of every worker, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    parts: list[T] = [own] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts
