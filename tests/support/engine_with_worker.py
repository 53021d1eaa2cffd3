"""An engine whose worker is a process of its own, as vLLM has it with several GPUs."""

from treerpo_ray.config import Config
from treerpo_ray.engine import engine
from treerpo_ray.engine import vllm_args as engine_vllm_args
from treerpo_ray.engine.vllm_args import engine_args


class EngineWithWorker(engine.Engine):
    """An engine on a CPU whose core has a child that computes."""

    async def start(self) -> tuple[int, int]:
        def with_worker(config: Config):
            args = engine_args(config)
            args.distributed_executor_backend = "mp"
            return args

        engine_vllm_args.engine_args = (
            with_worker  # the actor's process has nothing but this engine
        )
        return await super().start()
