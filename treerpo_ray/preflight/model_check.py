"""Model check: what can be told of a model in seconds, without loading its weights.

What is wrong is one line that names the model and what to do. Engines and workers would find it
once they are started, with a trace, or never.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import ModelConfig
from treerpo_ray.errors import one_line
from treerpo_ray.learner.adapters.targets import num_adapter_parameters
from treerpo_ray.learner.layers import layers_of
from treerpo_ray.preflight.model_sizes import ModelSizes
from treerpo_ray.preflight.packing_check import PackingCheck
from treerpo_ray.prompts.hub import Unreachable, is_unreachable, offline_because, refusal
from treerpo_ray.prompts.prompt_set import resolve_model_path

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"
MOST_HEADER_BYTES = 100 * 2**20
"""Longer headers are refused by safetensors itself."""
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Names that architectures give to the number of positions."""
CPU_EXPERT_WIDTH = 32
"""Experts of other widths are padded by vLLM on a CPU."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a run needs to know of its model."""

    num_parameters: int
    num_embeddings: int
    """Rows of the embedding: token ids are below."""
    sizes: ModelSizes


def check_model(
    model: ModelConfig,
    longest: int,
    *,
    gradient_checkpointing: bool = False,
    has_cpu_engines: bool = False,
    layers_for: Collection[str] = (),
    lora: LoraConfig | None = None,
) -> ModelFacts:
    """Look at the files of a model, its configuration, its architecture and the shapes of its
    weights.

    Args:
        model: Which one.
        longest: Tokens of the longest prompt with its answer.
        gradient_checkpointing: Whether the learner computes activations again.
        has_cpu_engines: Whether engines compute on a CPU.
        layers_for: Keys of the configuration that do something to each of its layers.
        lora: Adapters that it is to be trained with, if their rank is above 0.

    Raises:
        ValueError: it cannot be trained, or not as these keys say, or not on paths of that length;
            `Unreachable` if a Hugging Face id could not be looked up.
    """
    path = resolve_model_path(model.path)
    try:
        folder = _folder(path)
        shapes = dict(_saved_shapes(folder)) if _holds_weights(folder, path) else None
        _check_own_code(path, model)
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        _check_config(config, longest)
        made = _make_empty(config, model)
        if shapes is not None:
            _check_shapes(made, shapes)
        for key in layers_for:
            layers_of(made, key)
        _check_generation_config(folder)
        if has_cpu_engines:
            _check_cpu_experts(made)
        num_adapted = num_adapter_parameters(made, lora) if lora is not None and lora.rank else 0
        PackingCheck(
            max_tokens=longest,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=model.trust_remote_code,
        ).run(config)
    except Exception as error:  # transformers has its own for whatever a configuration may hold
        if is_unreachable(error):
            raise Unreachable(f"model.path={model.path}") from error
        if (told := refusal(error)) is not None:
            raise ValueError(f"model.path={model.path}: {told}") from error
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"model.path={model.path}: {kind}{one_line(error)}") from error
    return ModelFacts(
        num_parameters=sum(parameter.numel() for parameter in made.parameters()),
        num_embeddings=len(cast("torch.Tensor", made.get_input_embeddings().weight)),
        sizes=replace(ModelSizes.of(config), num_adapted=num_adapted),
    )


def num_positions(model: ModelConfig) -> int | None:
    """Positions that a model knows; None: any number."""
    path = resolve_model_path(model.path)
    return _num_positions(
        AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    )


def model_size(model: ModelConfig) -> tuple[int, ModelSizes | None]:
    """Number of parameters of a model that is only to be sampled from, and its sizes, which not
    every architecture has under the usual names.

    Raises:
        ValueError: its architecture is not known.
    """
    path = resolve_model_path(model.path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    number = sum(parameter.numel() for parameter in _make_empty(config, model).parameters())
    try:
        return number, ModelSizes.of(config)
    except AttributeError:
        return number, None


# Files -------------------------------------------------------------------------------------


def _folder(path: str) -> Path:
    """Where the files of a model folder or Hugging Face id lie on this machine."""
    if Path(path).is_dir():
        return Path(path)
    offline_because()
    found = cached_file(path, "config.json")
    assert found is not None  # else it raises
    return Path(found).parent


def _holds_weights(folder: Path, path: str) -> bool:
    """Whether weights are to be looked at: those of an id may be loaded from the Hub later.

    Raises:
        ValueError: those of an id are not here and cannot be loaded.
    """
    if str(folder) == path:
        return True
    index = folder / INDEX
    names = [SINGLE]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if all((folder / name).is_file() for name in names):
        return True
    if (why := offline_because()) is not None:
        raise ValueError(
            f"the cache of Hugging Face here has its config.json, but not all of its weights "
            f"({', '.join(names[:3])}), and {why}"
        )
    return False


def _saved_shapes(folder: Path) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every weight that the files of a model folder hold, whole.

    Raises:
        ValueError: a file is missing, a pointer, cut off or none of safetensors.
    """
    if not (folder / "config.json").is_file():
        raise ValueError("the folder has no config.json")
    if (folder / INDEX).is_file():
        placed: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        for name in sorted(set(placed.values())):
            if not (folder / name).is_file():
                raise ValueError(f"{name} is not there, but {INDEX} names it; download it")
            held = dict(_header(folder / name))
            for weight in (weight for weight, place in placed.items() if place == name):
                if weight not in held:
                    raise ValueError(f"{name} lacks {weight}, which {INDEX} names")
            yield from held.items()
    elif (folder / SINGLE).is_file():
        yield from _header(folder / SINGLE)
    else:
        raise ValueError(f"the folder has no *.safetensors weights: neither {SINGLE} nor {INDEX}")


def _header(file: Path) -> Iterator[tuple[str, Shape]]:
    """Name and shape of the weights in a file of safetensors: 8 bytes with the length of a JSON
    header, the header, and the bytes that it tells of."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(max(8, len(LFS_POINTER)))
        if start.startswith(LFS_POINTER):
            raise ValueError(f"{file.name} is a pointer of Git LFS: fetch it with `git lfs pull`")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > MOST_HEADER_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        opened.seek(8)
        header = opened.read(length)
    if len(header) < length:
        raise ValueError(f"{file.name} is cut off at {size:,} bytes; download it again")
    try:
        weights: dict[str, dict[str, Any]] = json.loads(header)
        weights.pop("__metadata__", None)
        end = 8 + length + max((each["data_offsets"][1] for each in weights.values()), default=0)
        shapes = [(name, tuple(each["shape"])) for name, each in weights.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is no safetensors file") from error
    if size < end:
        raise ValueError(f"{file.name} is cut off at {size:,} of {end:,} bytes; download it again")
    yield from shapes


def _check_shapes(model: PreTrainedModel, saved: Mapping[str, Shape]) -> None:
    """Compare the weights of a model with those that its files hold.

    Raises:
        ValueError: some are missing or have another shape.
    """
    prefix = f"{model.base_model_prefix}."
    weights = {name: weight.data for name, weight in model.named_parameters()}
    wrong = []
    for name, weight in revert_weight_conversion(model, weights).items():
        names = (name, name.removeprefix(prefix), prefix + name)  # with a head or without
        found = next((saved[each] for each in names if each in saved), None)
        if found is None and _is_tied(model, name) and "lm_head.weight" in saved:
            found = saved["lm_head.weight"]
        if found is None:
            wrong.append(f"{name}: not there")
        elif found != tuple(weight.shape):
            wrong.append(f"{name}: {list(found)}, should be {list(weight.shape)}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights are missing from the checkpoint or have another shape than "
            f"config.json says, e.g. {wrong[0]}"
        )


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight is the embedding of a model whose head has the same one."""
    embedding = model.get_input_embeddings().weight
    names = [own for own, weight in model.named_parameters() if weight is embedding]
    return bool(model.config.tie_word_embeddings) and name in names


# Configuration -----------------------------------------------------------------------------


def _check_own_code(path: str, model: ModelConfig) -> None:
    """Refuse a model that only Python code of its own can load, unless that may run."""
    if model.trust_remote_code:
        return
    found, _ = PreTrainedConfig.get_config_dict(path)
    if "auto_map" in found and found.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            "this model comes with Python code of its own; read it, and if you trust it set "
            "model.trust_remote_code=true"
        )


def _check_config(config: PreTrainedConfig, longest: int) -> None:
    """Refuse what no weight of the model can make good."""
    text = config.get_text_config()
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        raise ValueError(
            f"its weights are quantised ({method or 'quantization_config in config.json'}); "
            "training needs those of the model before that"
        )
    if text.pad_token_id is not None and text.pad_token_id >= text.vocab_size:
        raise ValueError(
            f"config.json has the pad_token_id {text.pad_token_id}, and an embedding of "
            f"{text.vocab_size} rows"
        )
    limit = _num_positions(config)
    if limit is not None and longest >= limit:
        raise ValueError(
            f"it has {limit} positions, and the longest prompt with its answer {longest} tokens: "
            "lower max_prompt_tokens, tree.step_tokens or evaluate.max_tokens"
            f"{_yarn_hint(text)}"
        )


def _yarn_hint(text: PreTrainedConfig) -> str:
    """What to do where YaRN is set, but the number of positions left as it was."""
    rope = getattr(text, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if rope.get("rope_type") != "yarn" or not original or not factor:
        return ""
    return f"; with YaRN, config.json must have {int(original * factor)} as max_position_embeddings"


def _num_positions(config: PreTrainedConfig) -> int | None:
    """Positions that a model knows, as its engines count them; None: any number.

    For vLLM, `max_position_embeddings` is what YaRN has made of it, but not what a linear scaling
    has. Dynamic scaling has more, with factors that the learner and the engines do not share.
    """
    text = config.get_text_config()
    known = [value for key in POSITION_KEYS if isinstance(value := getattr(text, key, None), int)]
    if not known:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    is_linear = rope.get("rope_type", rope.get("type")) == "linear"
    return int(known[0] * rope.get("factor", 1.0)) if is_linear else known[0]


def _make_empty(config: PreTrainedConfig, model: ModelConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    import torch

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    return made


def _check_cpu_experts(model: PreTrainedModel) -> None:
    """Refuse experts that vLLM on a CPU pads: it cannot load their weights again."""
    for name, weight in model.named_parameters():
        if name.endswith("experts.down_proj") and (width := weight.shape[-1]) % CPU_EXPERT_WIDTH:
            raise ValueError(
                f"its experts have a width of {width}, and vLLM takes new weights for experts on a "
                f"CPU only if that is a multiple of {CPU_EXPERT_WIDTH}: use engines on a GPU"
            )


def _check_generation_config(folder: Path) -> None:
    """Refuse one that is corrupt, or that could not be saved with the trained model."""
    if not (folder / GENERATION_CONFIG_NAME).exists():
        return  # the file is optional
    found = GenerationConfig.from_pretrained(folder)
    try:
        found.validate(strict=True)
    except ValueError as error:
        raise ValueError(
            f"its generation_config.json could not be saved again: {one_line(error)}"
        ) from error
