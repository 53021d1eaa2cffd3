"""How vLLM is set up: the lines that only a GPU runs are at least looked at here."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from tests.support.gpu_build import GpuBuild, users_of
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


@pytest.fixture(scope="module")
def gpu_build(tmp_path_factory: pytest.TempPathFactory) -> GpuBuild:
    return GpuBuild.unpacked(tmp_path_factory.mktemp("gpu_build"))


@pytest.mark.slow
def test_the_gpu_build_has_every_name_and_argument_that_is_used(gpu_build: GpuBuild) -> None:
    """PyTorch has the same Python sources for a CPU and a GPU, but for `torch/version.py`, and Ray
    has one build: what is used of them is held against those installed, here and by mypy itself."""
    users = users_of("vllm")
    assert {"engine.py", "_vllm_args.py", "bulk_logprobs.py", "vllm_worker.py"} <= {
        path.name for path in users
    }
    assert gpu_build.faults(*users) == []


MISTAKES = {
    "import vllm.no_such": 'named "vllm.no_such"',
    "from vllm.sampling_params import NoSuch": 'no attribute "NoSuch"',
    "AsyncEngineArgs(no_such=1)": '"no_such" for "AsyncEngineArgs"',
    "AsyncEngineArgs().no_such = 1": '"AsyncEngineArgs" has no attribute "no_such"',
    "SamplingParams(no_such=1)": '"no_such" for "SamplingParams"',
    "WeightTransferConfig(no_such=1)": '"no_such" for "WeightTransferConfig"',
    "WeightTransferUpdateRequest(no_such=1)": '"no_such" for "WeightTransferUpdateRequest"',
    "PEFTHelper(no_such=1)": '"no_such" for "PEFTHelper"',
    "LoRAModel.from_lora_tensors(no_such=1)": '"no_such" for "from_lora_tensors"',
    "PyNcclCommunicator(no_such=1)": '"no_such" for "PyNcclCommunicator"',
    "tokens_input([1], no_such=1)": '"no_such" for "tokens_input"',
    "llm.no_such()": '"AsyncLLM" has no attribute "no_such"',
    "llm.pause_generation(no_such=1)": '"no_such" for "pause_generation" of "AsyncLLM"',
    "class _1(StoreTransfer):\n def receive_weights(self, a, b): ...": '"receive_weights" inc',
    "class _2(Scheduler):\n def update_from_output(self, a): ...": '"update_from_output" inco',
    "varlen_attn(*tensors, no_such=1)": '"no_such" for "varlen_attn"',
    "fully_shard(module, no_such=1)": '"no_such" for overloaded function "fully_shard"',
    "MixedPrecisionPolicy(no_such=1)": '"no_such" for "MixedPrecisionPolicy"',
    "CPUOffloadPolicy(no_such=1)": '"no_such" for "CPUOffloadPolicy"',
    "torch.backends.cuda.no_such": 'has no attribute "no_such"',
}
"""Lines that a GPU would stop at, of each kind of use that there is, and what is told of them."""
IMPORTS = """
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from treerpo_ray.engine.vllm_worker import StoreTransfer
tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int]
module: torch.nn.Module
llm: AsyncLLM
"""


@pytest.mark.slow
def test_what_the_gpu_build_lacks_is_found(gpu_build: GpuBuild, tmp_path: Path) -> None:
    for number, line in enumerate(MISTAKES):
        (tmp_path / f"mistake_{number}.py").write_text(f"{IMPORTS}{line}\n")
    found = gpu_build.faults(*tmp_path.glob("*.py"))
    for number, (line, told) in enumerate(MISTAKES.items()):
        own = [fault for fault in found if f"mistake_{number}.py" in fault]
        assert own and told in own[0], (line, own)


@pytest.mark.slow
def test_an_argument_that_a_gpu_build_has_lost_is_found(gpu_build: GpuBuild) -> None:
    engine = gpu_build.sources / "v1/engine/async_llm.py"
    text = engine.read_text()
    argument = "        clear_cache: bool = True,\n"
    assert text.count(argument) == 1
    engine.write_text(text.replace(argument, ""))
    try:
        [fault] = gpu_build.faults(*users_of("vllm"))
    finally:
        engine.write_text(text)
    assert "treerpo_ray/engine/engine.py:" in fault and '"clear_cache" for "pause_gen' in fault


@pytest.mark.slow
def test_torch_is_of_the_version_that_the_gpu_build_asks_for(gpu_build: GpuBuild) -> None:
    """Else its names and arguments are not those that a GPU machine would have."""
    version = importlib.metadata.version("torch").partition("+")[0]
    assert f"torch=={version}" in gpu_build.requires


@pytest.mark.slow
def test_what_is_tried_on_a_cpu_is_the_code_of_the_gpu_build(gpu_build: GpuBuild) -> None:
    version = gpu_build.wheel.name.split("-")[1]
    builds = importlib.metadata.packages_distributions()["vllm"]
    if importlib.metadata.version(builds[0]) != version:
        pytest.skip(f"installed is another version of vLLM than {version}")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parent
    differing = set()
    for file in installed.rglob("*.py"):
        other = gpu_build.sources / file.relative_to(installed)
        if not other.is_file() or other.read_bytes() != file.read_bytes():
            differing.add(str(file.relative_to(installed)))
    assert differing == {"_version.py", "platforms/__init__.py", "utils/cpu_triton_utils.py"}
