"""Model check: each kind of model that cannot be trained is one line before anything starts."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.support.learning.tiny_models import SIZES, save_tiny_model
from tests.support.project import PROJECT
from treerpo_ray.config import load
from treerpo_ray.config.sections import ModelConfig
from treerpo_ray.preflight.inputs import preflight
from treerpo_ray.preflight.model_check import check_model

SOURCE = PROJECT / "treerpo_ray/quickstart/model"
SETTINGS = [str(PROJECT / "conf/quickstart.yaml"), "prompts.num_problems=20"]
LONGEST = 80
"""Tokens of the longest path."""
Spoil = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model of the quickstart, to be spoilt."""
    shutil.copytree(SOURCE, tmp_path / "model")
    return tmp_path / "model"


def edit(name: str, **values: object) -> Spoil:
    """Sets values of a JSON file."""

    def spoil(folder: Path) -> None:
        fields = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(fields))

    return spoil


def weights_as(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    """Writes other weights."""

    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return spoil


def bytes_as(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Spoil:
    """Changes a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def split(folder: Path, *, with_last: bool, lists_more: bool = False) -> None:
    """Spreads the weights over two files, and perhaps forgets the second."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in parts.items():
        if part == "a.safetensors" or with_last:
            save_file({name: weights[name] for name in own}, folder / part, {"format": "pt"})
    place = {name: part for part, own in parts.items() for name in own}
    if lists_more:
        place["model.extra.weight"] = "b.safetensors"
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3491552\n"
WINDOW = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
DYNAMIC = {"rope_type": "dynamic"}
SPOILT: dict[str, tuple[Spoil, str]] = {
    "pointer": (bytes_as(lambda data: LFS), r"pointer of Git LFS: .*git lfs pull"),
    "half": (bytes_as(lambda data: data[: len(data) // 2]), r"cut off at [\d,]+ of [\d,]+ bytes"),
    "a byte less": (bytes_as(lambda data: data[:-1]), r"cut off at [\d,]+ of [\d,]+ bytes"),
    "in its header": (bytes_as(lambda data: data[:99]), r"cut off at 99 bytes"),
    "empty": (bytes_as(lambda data: b""), r"model\.safetensors is no safetensors file"),
    "text": (bytes_as(lambda data: b"Not found" * 9), r"model\.safetensors is no safetensors file"),
    "no header": (
        bytes_as(lambda data: (9).to_bytes(8, "little") + b"[1, 2, 3]"), r"no safetensors file",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors weights",
    ),
    "other weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "adapter.safetensors"),
        r"no \*\.safetensors weights",
    ),
    "shard": (lambda folder: split(folder, with_last=False), r"b\.safetensors is not there"),
    "listed": (
        lambda folder: split(folder, with_last=True, lists_more=True),
        r"b\.safetensors lacks model\.extra\.weight",
    ),
    "shape": (edit("config.json", intermediate_size=400), r"weights .* shape than config\.json"),
    "layers": (
        edit("config.json", num_hidden_layers=9, layer_types=["full_attention"] * 9),
        r"weights are missing .*: not there",
    ),
    "padding": (edit("config.json", pad_token_id=9999), r"pad_token_id 9999, .* \d+ rows"),
    "one missing": (
        weights_as(lambda w: {name: w[name] for name in w if "layers.1.mlp.up" not in name}),
        r"^model\.path=\S+: 1 weights are missing .*layers\.1\.mlp\.up_proj\.weight: not there",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "half a config": (bytes_as(lambda data: data[:60], "config.json"), r"config\.json"),
    "gptq": (
        edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised \(gptq\)",
    ),
    "fp8": (edit("config.json", quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "positions": (edit("config.json", max_position_embeddings=LONGEST), r"80 positions, .* 80 tok"),
    "yarn": (
        edit("config.json", max_position_embeddings=40, rope_parameters=YARN),
        r"40 positions, .* with YaRN, config\.json must have 160 as max_position_embeddings",
    ),
    "dynamic": (
        edit("config.json", max_position_embeddings=40, rope_parameters=YARN | DYNAMIC),
        r"40 positions, .*evaluate\.max_tokens$",
    ),
    "window": (
        edit("config.json", **WINDOW, layer_types=["sliding_attention"] * 4),
        r"path of 80 tokens is longer than the window of 40 ",
    ),
    "unknown type": (edit("config.json", model_type="nothing_known"), r"nothing_known"),
    "not saved again": (
        edit("generation_config.json", do_sample=False, temperature=0.6),
        r"generation_config\.json could not be saved again: .*temperature",
    ),
    "half a generation config": (
        bytes_as(lambda data: data[:20], "generation_config.json"), r"generation_config\.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_a_model_that_cannot_be_trained_is_one_line(kind: str, folder: Path) -> None:
    spoil, told = SPOILT[kind]
    spoil(folder)
    with pytest.raises(ValueError, match=told) as caught:
        check_model(ModelConfig(path=str(folder)), LONGEST)
    message = str(caught.value)
    assert message.startswith(f"model.path={folder}: ") and "\n" not in message


WHOLE: dict[str, Spoil] = {
    "as it is": lambda folder: None,
    "two files": lambda folder: split(folder, with_last=True),
    "a wide window": edit(
        "config.json", **WINDOW | {"sliding_window": LONGEST}, layer_types=["sliding_attention"] * 4
    ),
    "positions that are scaled": edit(
        "config.json",
        max_position_embeddings=40,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
    "a window that is off": edit("config.json", sliding_window=40, use_sliding_window=False),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_model_that_can_be_trained_is_counted(kind: str, folder: Path) -> None:
    WHOLE[kind](folder)
    facts = check_model(ModelConfig(path=str(folder)), LONGEST)
    saved = load_file(SOURCE / "model.safetensors")
    assert facts.num_parameters == sum(weight.numel() for weight in saved.values())
    assert facts.num_embeddings == len(saved["model.embed_tokens.weight"])


ARCHITECTURES: dict[str, dict[str, object]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"sliding_window": 999, "attn_logit_softcapping": None},
    "gemma3_text": {"sliding_window": 999},
    "mistral": {"sliding_window": None},
    "phi3": {"num_key_value_heads": 4},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
        **{"num_key_value_heads": 4, "first_k_dense_replace": 1, "head_dim": 64},
        **{"kv_lora_rank": 32, "q_lora_rank": None, "moe_intermediate_size": 32},
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_an_architecture_saves_is_what_is_looked_for(architecture: str, tmp_path) -> None:
    path = save_tiny_model(tmp_path, architecture, **ARCHITECTURES[architecture])
    facts = check_model(ModelConfig(path=path), LONGEST)
    assert facts.num_embeddings == SIZES["vocab_size"]
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = sorted(name for name in weights if re.search(r"\b(layers|h)\.1\.", name))[0]
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing"):
        check_model(ModelConfig(path=path), LONGEST)


def test_experts_that_vllm_pads_on_a_cpu_are_for_gpus(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    model = ModelConfig(path=save_tiny_model(tmp_path, "qwen3_moe", **experts))
    check_model(model, LONGEST)
    with pytest.raises(ValueError, match=r"width of 40, .* multiple of 32: use engines on a GPU"):
        check_model(model, LONGEST, has_cpu_engines=True)


def test_a_model_in_the_cache_of_the_hub_is_checked_as_a_folder_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stored = tmp_path / "hub/models--org--name"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs/main").write_text("c0ffee")
    shutil.copytree(folder, stored / "snapshots/c0ffee")
    weights = stored / "snapshots/c0ffee/model.safetensors"
    cached = ModelConfig(path="org/name")
    assert check_model(cached, LONGEST) == check_model(ModelConfig(path=str(folder)), LONGEST)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"^model\.path=org/name: model\.safetensors is cut off"):
        check_model(cached, LONGEST)
    weights.unlink()
    with pytest.raises(ValueError, match=r"not all of its weights \(model\.safetensors\)"):
        check_model(cached, LONGEST)
    bad = stored / "snapshots/c0ffee/generation_config.json"
    weights.write_bytes(whole)
    bad.write_text("{")
    with pytest.raises(ValueError, match=r"^model\.path=org/name: .*generation_config\.json"):
        check_model(cached, LONGEST)


def look(folder: Path, *overrides: str) -> None:
    """Look at all input of a run of the model."""
    preflight(load([*SETTINGS, f"model.path={folder}", *overrides]))


def test_a_tokenizer_whose_files_are_gone_is_no_empty_one(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"^model\.path=\S+: no tokenizer") as caught:
        look(folder)
    assert "\n" not in str(caught.value)


def test_an_end_token_that_only_the_models_configuration_names_counts(folder: Path) -> None:
    edit("tokenizer_config.json", eos_token=None)(folder)
    (folder / "generation_config.json").unlink()
    look(folder)
    edit("config.json", eos_token_id=None)(folder)
    with pytest.raises(ValueError, match="neither tokenizer nor model has an end token"):
        look(folder)


def test_tokens_beyond_the_embedding_are_refused(folder: Path) -> None:
    rows = len(load_file(folder / "model.safetensors")["model.embed_tokens.weight"])

    def cut(weights: dict[str, torch.Tensor], left: int) -> dict[str, torch.Tensor]:
        return {
            name: weight[:left].contiguous() if len(weight) == rows else weight
            for name, weight in weights.items()
        }

    edit("config.json", vocab_size=40, pad_token_id=None)(folder)
    weights_as(lambda weights: cut(weights, 40))(folder)
    with pytest.raises(ValueError, match=r"its end token has the id \d+, but the embedding has 40"):
        look(folder)
    edit("generation_config.json", eos_token_id=1)(folder)
    edit("tokenizer_config.json", eos_token=None)(folder)
    with pytest.raises(ValueError, match=r"the prompt of '.+' in prompts has the token \d+, but"):
        look(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] + tools }}{% endfor %}",
        "{{ messages[7]['content'] | upper }}",
        "{{ 1 // 0 }}",
        "{% for m in messages %}",
        "{{ raise_exception('no system') }}",
    ],
)
def test_a_chat_template_that_fails_is_one_line(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"chat template") as caught:
        look(folder)
    assert "\n" not in str(caught.value)


def test_a_template_that_writes_nothing_makes_no_empty_prompts(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ '' }}")
    with pytest.raises(ValueError, match=r"^prompts\.path=\S+: the prompt of '.+' has no tokens"):
        look(folder)
