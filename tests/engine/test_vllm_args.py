"""How vLLM is set up: the lines that only a GPU runs are at least looked at here."""

import pytest

from treerpo_ray.config import load
from treerpo_ray.engine._vllm_args import CPU_BLOCK_SIZE, GIB, engine_args, environment
from treerpo_ray.engine.types import EngineSetup

GPUS = ("engine.resources={GPU: 2, CPU: 2}", "engine.tensor_parallel=2", "model.dtype=bfloat16")


def args_of(*overrides: str):
    return engine_args(EngineSetup.of(load(list(overrides))))


def test_variables_that_are_for_a_cpu_are_not_set_on_a_gpu() -> None:
    on_cpu = environment(load(["engine.cpu_threads=3"]).engine, 0)
    assert on_cpu["OMP_NUM_THREADS"] == "3" and on_cpu["TORCH_COMPILE_DISABLE"] == "1"
    on_gpu = environment(load(GPUS).engine, 0)
    assert not {"OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE"} & on_gpu.keys()


def test_each_engine_of_a_machine_lists_what_it_compiles_in_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value, root in (
        ("XDG_CACHE_HOME", "/cache", "/cache/vllm"),
        ("VLLM_CACHE_ROOT", "/disk", "/disk"),
    ):
        monkeypatch.setenv(variable, value)
        roots = [environment(load(GPUS).engine, index)["VLLM_CACHE_ROOT"] for index in range(2)]
        assert roots == [f"{root}/engine-0", f"{root}/engine-1"]


@pytest.mark.engine
def test_an_engine_on_gpus_gets_their_memory_and_as_many_workers() -> None:
    args = args_of(*GPUS, "engine.kv_cache_gib=null")
    assert (args.tensor_parallel_size, args.distributed_executor_backend) == (2, "mp")
    assert args.gpu_memory_utilization == 0.85 and args.kv_cache_memory_bytes is None
    assert args.dtype == "bfloat16" and not args.enforce_eager
    alone = args_of("engine.resources={GPU: 1, CPU: 2}")
    # Beside a learner that has grown, vLLM must not ask for the 0.85 that it leaves unused.
    assert alone.kv_cache_memory_bytes == GIB and alone.gpu_memory_utilization <= 0.05
    assert (alone.tensor_parallel_size, alone.distributed_executor_backend) == (1, "uni")


@pytest.mark.engine
def test_an_engine_has_room_for_one_adapter_of_the_rank_or_of_the_next_that_vllm_has() -> None:
    for asked, rank in ((1, 1), (3, 8), (16, 16), (65, 128), (512, 512)):
        args = args_of(f"lora.rank={asked}")
        assert (args.enable_lora, args.max_loras, args.max_lora_rank) == (True, 1, rank)
    assert not args_of().enable_lora


FP8 = ("engine.quantization=fp8", "sync.probe_tolerance=0.5")


@pytest.mark.engine
def test_weights_are_rounded_to_fp8_as_they_come_under_the_name_that_vllm_has_for_it() -> None:
    from vllm.config.quantization import _ONLINE_SHORTHANDS, QUANT_KEY_NAMES

    args = args_of(*GPUS, *FP8)
    kinds = _ONLINE_SHORTHANDS[args.quantization]
    for kind in (kinds.linear, kinds.moe):
        assert kind.weight == QUANT_KEY_NAMES["fp8_per_channel_static"]
    assert args_of(*GPUS).quantization is None


@pytest.mark.engine
def test_an_engine_on_a_cpu_gets_what_its_kernels_need() -> None:
    args = args_of("engine.kv_cache_gib=0.5")
    assert args.enforce_eager and args.block_size == CPU_BLOCK_SIZE
    assert args.enable_chunked_prefill is False
    assert args.kv_cache_memory_bytes == GIB // 2
    assert args.max_model_len == load([]).max_model_tokens + 1
    assert args.skip_tokenizer_init, "it is for stop strings alone"
    assert not args_of("model.stop=[x]").skip_tokenizer_init
