"""Random models of a few layers, made from configs, for exactness tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 97
SIZES: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Wide enough that attention is far from uniform and a wrong key moves every output.
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TIED = {"qwen2": True, "llama": False, "qwen3": False}
"""Architectures of the exactness tests, and whether they tie the head to the embedding."""


def save_tiny_model(folder: Path, architecture: str, **overrides: object) -> str:
    """Write a random model of `architecture` with its tokenizer; returns the folder's path."""
    torch.manual_seed(0)
    sizes = SIZES | {"tie_word_embeddings": TIED.get(architecture, True)} | overrides
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as constants
                parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config = GenerationConfig(eos_token_id=2, do_sample=True, temperature=0.6)
    model.save_pretrained(folder)
    save_letter_tokenizer(folder)
    return str(folder)


def save_letter_tokenizer(folder: Path) -> None:
    """Write a tokenizer in which the letters a to z are the ids 0 to 25."""
    letters = Tokenizer(models.BPE({chr(ord("a") + i): i for i in range(26)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="c").save_pretrained(folder)
