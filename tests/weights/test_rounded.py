"""What vLLM's worker makes of new weights that it holds in fp8: rounded anew, in their place."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from treerpo_ray.config.config import FP8_TOLERANCE
from treerpo_ray.engine._vllm_args import QUANTIZATION
from treerpo_ray.learner.policy import Policy, load_policy
from treerpo_ray.prompts.prompt_set import load_tokenizer, resolve_model_path
from treerpo_ray.quickstart.make_model import MODEL_FOLDER
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.files import WeightFile
from treerpo_ray.weights.manifest import pack_weights

FP8_MOST = torch.finfo(torch.float8_e4m3fn).max


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Each row as multiples of a scale of its own that fp8 has."""
    scale = tensor.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / FP8_MOST
    return (tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale


class Kernel:
    """In place of the product, which takes a GPU."""

    def process_weights_after_loading(self, layer: nn.Module) -> None: ...

    def input_quant_key(self) -> None: ...


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model of one layer that vLLM rounds as it is loaded."""
    from vllm.config.quantization import _ONLINE_SHORTHANDS
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization.online import base, fp8
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    kind = base._ONLINE_LINEAR_METHODS[_ONLINE_SHORTHANDS[QUANTIZATION["fp8"]].linear.weight]
    method = kind.__new__(kind)  # there is no engine to make it for
    method.out_dtype = method.input_dtype = torch.bfloat16
    method.requantization_source, method.requantization_source_parameters = None, {}
    monkeypatch.setattr(fp8, "init_fp8_linear_kernel", lambda **_: Kernel())
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)

    class Layer(nn.Module):
        tp_size = 1
        input_size = input_size_per_partition = 64
        quant_method = method
        quant_config = SimpleNamespace(online_quantization_config=None)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def load_weights(self, weights) -> None:
            for name, weight in weights:
                own = self.get_parameter(name)
                own.weight_loader(own, weight)

    made = Model()
    load = {"weight_loader": lambda param, loaded: param.data.copy_(loaded)}
    method.create_weights(made.layer, 64, [32], 64, 32, torch.bfloat16, **load)
    record_metadata_for_reloading(made)
    return made


@pytest.mark.engine
def test_weights_that_come_in_bfloat16_are_rounded_to_fp8_each_time(model) -> None:
    from treerpo_ray.engine.vllm_worker import StoreInit, StoreTransfer, StoreUpdate

    transfer = StoreTransfer.__new__(StoreTransfer)
    transfer.model, transfer.device = model, torch.device("cpu")
    transfer.model_config = SimpleNamespace(dtype=torch.bfloat16)
    model.config = SimpleNamespace()
    transfer.init_transfer_engine(StoreInit())
    torch.manual_seed(0)
    places = set()
    for version in range(3):
        weight, file = torch.randn(32, 64), WeightFile()
        assert file.begin()
        manifest, _ = pack_weights(
            {"layer.weight": weight}.items(),
            version=version,
            dtype=torch.bfloat16,
            chunk_bytes=2**20,
            allocate=file.part,
        )
        place = file.seal()
        if version:  # the first ones come from the model's files, with nothing to put away
            transfer.start_weight_update()
        [(offset, num_bytes)] = place.parts
        info = manifest.update_info(0)
        update = StoreUpdate(path=place.path, offset=offset, num_bytes=num_bytes, **info)
        transfer.receive_weights(update)
        transfer.finish_weight_update()
        held, scale = model.layer.weight, model.layer.weight_scale
        assert held.dtype == torch.float8_e4m3fn
        found = held.T.float() * scale
        torch.testing.assert_close(found, rounded(weight.bfloat16()), rtol=1e-5, atol=1e-6)
        assert transfer.digests[-1:] == manifest.digests, "of the bytes as they came"
        places.add((held.data_ptr(), scale.data_ptr()))
    assert len(places) == 1, "CUDA graphs read where they were"


def test_a_model_in_fp8_is_within_the_least_tolerance_and_beyond_that_of_bfloat16() -> None:
    path = resolve_model_path(str(MODEL_FOLDER))

    def loaded(dtype: torch.dtype) -> Policy:
        return load_policy(
            path, dtype=dtype, device=torch.device("cpu"), gradient_checkpointing=False
        )

    learner, engine = loaded(torch.float32), loaded(torch.bfloat16)

    def round_input(module: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        return rounded(given[0]).to(given[0].dtype)

    for name, module in engine.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data).to(torch.bfloat16)
            module.register_forward_pre_hook(round_input)
    tokenizer = load_tokenizer(path, False)
    off = []
    for number in range(20, 40):
        ids = tokenizer.encode(f"{number}+17-{number}+25=?\n")
        probe = Probe(token_ids=ids, logprobs=learner.sequence_logprobs(ids).tolist())
        off.append(probe.distance(engine.sequence_logprobs(ids).tolist()))
    assert 0.1 < max(off) < FP8_TOLERANCE
