"""Sharding: a model whose weights, gradients and moments lie on all workers, a part on each.

This is torch's FSDP2. Each layer is a unit: its weights are gathered for as long as it computes.
What is not in a layer, as embedding, last norm and head, is one unit more. Weights are kept in
float32; they are gathered in the type that is computed in, and gradients are summed up in float32.

A gather needs all workers, so that all make the same number of passes in the same order.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sharding:
    """How models are sharded over the workers.

    Args:
        mesh: The workers.
        dtype: Floating type that is computed in.
        offload: Whether each worker keeps its part in main memory, and updates it there.
    """

    mesh: DeviceMesh
    dtype: torch.dtype
    offload: bool

    @classmethod
    def over_workers(cls, device: torch.device, dtype: torch.dtype, *, offload: bool) -> Self:
        """Over the workers of this process's group; a process without one is a group of its own."""
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, device.type)
        return cls(mesh=mesh, dtype=dtype, offload=offload)

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that speaks for all."""
        return self.mesh.get_rank() == 0

    def apply(self, root: nn.Module, layers: list[nn.Module]) -> None:
        """Shard `root`, which lies in main memory and goes to the device a unit at a time.

        Args:
            root: What is called for each pass.
            layers: The parts of it that are units of their own.
        """
        precision = MixedPrecisionPolicy(
            param_dtype=None if self.dtype == torch.float32 else self.dtype,
            reduce_dtype=torch.float32,
        )
        has_gpu = self.mesh.device_type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=has_gpu) if self.offload else OffloadPolicy()
        for unit in (*layers, root):
            fully_shard(unit, mesh=self.mesh, mp_policy=precision, offload_policy=offload)
            assert isinstance(unit, FSDPModule)
            # The sum over workers: the loss of each forest is divided by the batch's counts.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    def in_turn(self, load: Callable[[], T]) -> T:
        """Have the workers of each machine `load` one after the other.

        Each holds a whole model in main memory until it is sharded, and one machine need not have
        room for as many as it has workers.
        """
        turn = int(os.environ.get("LOCAL_RANK", 0))
        turns = torch.tensor(turn + 1, device=self.mesh.device_type)
        dist.all_reduce(turns, dist.ReduceOp.MAX)
        loaded: list[T] = []
        for number in range(int(turns)):
            if number == turn:
                loaded.append(load())
            dist.barrier()
        return loaded[0]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts, on every worker; one that is not sharded is that itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
