"""Qwen2.5 in the sizes of the recipes, as far as memory depends on it."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from treerpo_ray.preflight.model_sizes import ModelSizes

QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "max_position_embeddings": 4096}
CONFIGS = {
    "0.5b": QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5b": QWEN
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": QWEN
    | {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    | {"vocab_size": 152_064},
}
"""The config.json of Qwen2.5 in three sizes, as far as memory depends on it."""
COUNTS = {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "7b": 7_615_616_512}


def model(size: str, folder: Path) -> tuple[int, ModelSizes]:
    """Parameters and sizes of a model, from its config.json alone."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[size]))
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    return made.num_parameters(), ModelSizes.of(config)
