"""vLLM's arguments: how an engine is set up, on a GPU and on a CPU."""

import os
from typing import TYPE_CHECKING, get_args

from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import EngineConfig
from treerpo_ray.engine.types import EngineSetup
from treerpo_ray.prompts.prompt_set import resolve_model_path

if TYPE_CHECKING:
    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest


# Read by vLLM in the engine's actor and in its core, a spawned child that imports torch anew.
CPU_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",  # needs no compiler at the first request with log-probs
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every engine of a machine takes the same cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker lives in the core: one process less
}


CPU_BLOCK_SIZE = 32
"""Smallest block of the KV cache that vLLM's CPU kernel takes."""


GIB = 2**30
QUANTIZATION = {"fp8": "fp8_per_channel"}
"""vLLM's name of each type that linear layers are rounded to as their weights come: one scale for
each output channel and, of what goes in, for each token. Its `fp8` is for checkpoints in fp8."""


def environment(engine: EngineConfig, index: int) -> dict[str, str]:
    """Variables that must be set before vLLM is imported, for the engine of a number."""
    common = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if _is_gpu(engine):
        # vLLM lists what it has compiled in a file that it writes in place: another engine of the
        # machine, started at the same time, could read half of it.
        return common | {"VLLM_CACHE_ROOT": f"{_cache()}/engine-{index}"}
    return common | CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(engine.cpu_threads)}


def engine_args(setup: EngineSetup) -> "AsyncEngineArgs":
    """Arguments of the engine."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    from treerpo_ray.engine.bulk_logprobs import SCHEDULER
    from treerpo_ray.engine.vllm_worker import BACKEND

    model, engine, longest = setup.model, setup.engine, setup.max_tokens
    path = resolve_model_path(model.path)
    kv_bytes = None if engine.kv_cache_gib is None else int(engine.kv_cache_gib * GIB)
    args = AsyncEngineArgs(
        model=path,
        tokenizer=path,
        skip_tokenizer_init=not model.stop,  # it finds stop strings in texts
        trust_remote_code=model.trust_remote_code,
        dtype=model.dtype,
        seed=setup.seed,
        max_model_len=longest + 1,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=max(4096, longest + 1),
        kv_cache_memory_bytes=kv_bytes,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        scheduler_cls=SCHEDULER,
        worker_extension_cls="treerpo_ray.engine.vllm_worker.WorkerExtension",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
    )
    if setup.lora.rank:
        args.enable_lora, args.max_loras = True, 1
        args.max_lora_rank = served_rank(setup.lora.rank)
    if _is_gpu(engine):
        args.tensor_parallel_size = engine.tensor_parallel
        args.gpu_memory_utilization = engine.start_share
        if engine.quantization is not None:
            args.quantization = QUANTIZATION[engine.quantization]
        args.enable_sleep_mode = engine.sleep  # a CPU's memory it would not give back
        args.distributed_executor_backend = "mp" if engine.tensor_parallel > 1 else "uni"
    else:
        args.enforce_eager = True
        args.block_size = CPU_BLOCK_SIZE
        # A prompt prefilled in parts makes the runner wind a seeded request's generator
        # back, which torch cannot do on CPU: the core would die.
        args.enable_chunked_prefill = False
    return args


def adapter_request(lora: LoraConfig) -> "LoRARequest | None":
    """What each request asks for so that it is computed with the adapters served, if there are."""
    if not lora.rank:
        return None
    from vllm.lora.request import LoRARequest

    from treerpo_ray.weights.adapters import ADAPTER_ID

    return LoRARequest("adapters", ADAPTER_ID, "-")  # its worker reads no path


def served_rank(rank: int) -> "MaxLoRARanks":
    """The rank, of those that vLLM has room for, that adapters of a rank fit in."""
    from vllm.config.lora import MaxLoRARanks

    return next(each for each in get_args(MaxLoRARanks) if each >= rank)


def _cache() -> str:
    """Folder in which vLLM keeps what it has compiled, unless it is told another one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("VLLM_CACHE_ROOT") or f"{home}/vllm"


def _is_gpu(engine: EngineConfig) -> bool:
    return engine.resources.get("GPU", 0) > 0
