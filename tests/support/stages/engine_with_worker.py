"""Engines whose workers are processes of their own, as vLLM has it with several GPUs."""

from treerpo_ray.engine.engine import Engine


class EngineWithWorker(Engine):
    """An engine on a CPU whose core has a child that computes."""

    def vllm_args(self):
        args = super().vllm_args()
        args.distributed_executor_backend = "mp"
        return args


class SplitEngine(EngineWithWorker):
    """An engine on a CPU whose weights are split over two workers: tensor parallelism."""

    def vllm_args(self):
        args = super().vllm_args()
        args.tensor_parallel_size = 2
        return args
