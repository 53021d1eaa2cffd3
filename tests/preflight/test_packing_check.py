"""Which architectures tree attention computes, told from their configurations."""

import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from treerpo_ray.learner.layers import fix_rotary
from treerpo_ray.preflight import packing_check
from treerpo_ray.preflight.packing_check import PackingCheck

LONGEST = 60
"""Tokens of the longest path."""
CHECK = PackingCheck(max_tokens=LONGEST, gradient_checkpointing=False, trust_remote_code=False)
SIZES: dict[str, object] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_config(kind: str, **settings: object) -> PreTrainedConfig:
    """A configuration of little size."""
    return CONFIG_MAPPING[kind](**SIZES | settings)


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
}
TRAINED: list[tuple[str, dict[str, object]]] = [
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": LONGEST, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 32}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("mistral", {"sliding_window": LONGEST}),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"head_dim": 16, "attn_logit_softcapping": None}),
    ("gemma3_text", {"head_dim": 16, "sliding_window": LONGEST, "num_hidden_layers": 6}),
    ("phi", {"num_key_value_heads": 4}),
    ("phi3", {"num_key_value_heads": 4, "sliding_window": LONGEST}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 64}),
    ("olmo2", {}),
    ("granite", {"attention_multiplier": 0.2, "logits_scaling": 8.0, "residual_multiplier": 0.2}),
    ("cohere", {"logit_scale": 0.1}),
    ("starcoder2", {}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("mixtral", {"num_local_experts": 4}),
    ("phimoe", {"num_local_experts": 4, "sliding_window": LONGEST}),
    ("qwen2_moe", EXPERTS),
    ("qwen3_moe", EXPERTS),
    ("deepseek_v3", LATENT),
]  # fmt: skip


def test_architectures_whose_attention_is_plain_are_trained() -> None:
    for kind, settings in TRAINED:
        config = make_config(kind, **settings)
        before = config.to_dict()
        CHECK.run(config)
        assert config.to_dict() == before, f"{kind}: the configuration is the model's own"


NARROW = LONGEST - 1
OF_WINDOW = rf"path of {LONGEST} tokens is longer than the window of {NARROW} "
NO_PLACE = r"the code of \w+ has no place for tree attention \(\w+: "
NOT_ITS_OWN = r"% of their spread off its own"
REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("gemma2", {"head_dim": 16}, "softcap"),
    ("gpt_oss", {"num_local_experts": 4}, "attention sinks"),
    ("mistral", {"sliding_window": NARROW}, OF_WINDOW),
    ("phi3", {"num_key_value_heads": 4, "sliding_window": NARROW}, OF_WINDOW),
    ("gemma3_text", {"head_dim": 16, "sliding_window": NARROW, "num_hidden_layers": 6}, OF_WINDOW),
    ("phimoe", {"num_local_experts": 4, "sliding_window": NARROW}, OF_WINDOW),
    (
        "qwen2_moe",
        EXPERTS | {"use_sliding_window": True, "sliding_window": NARROW, "max_window_layers": 2},
        OF_WINDOW,
    ),
    (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": NARROW,
            "num_hidden_layers": 30,
            "max_window_layers": 29,  # the last layer alone
        },
        OF_WINDOW,
    ),
    ("doge", {}, "masks its attention in a way of its own"),
    ("bloom", {"n_head": 4}, NOT_ITS_OWN),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, NOT_ITS_OWN),
    ("mamba", {}, NOT_ITS_OWN),
    ("falcon", {}, NO_PLACE),
    ("gptj", {"rotary_dim": 8}, NO_PLACE),
    ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, NO_PLACE),
    ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, NO_PLACE),
    (
        "llama4_text",
        {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 16},
        NO_PLACE,
    ),
]  # fmt: skip


def refusal(config: PreTrainedConfig, check: PackingCheck = CHECK) -> str:
    """What is said of a model that is refused; nothing of one that is not."""
    try:
        check.run(config)
    except ValueError as error:
        return str(error)
    return ""


def test_what_tree_attention_would_get_wrong_is_one_line() -> None:
    for kind, settings, told in REFUSED:
        said = refusal(make_config(kind, **settings))
        assert re.search(told, said) and "\n" not in said, (kind, said)


def test_a_window_is_told_with_its_own_length_however_long_the_run_is() -> None:
    config = make_config("mistral", sliding_window=4096, max_position_embeddings=2**17)
    replace(CHECK, max_tokens=4096).run(config)
    with pytest.raises(ValueError, match="path of 4097 tokens is longer than the window of 4096"):
        replace(CHECK, max_tokens=4097).run(config)


def test_an_architecture_that_cannot_be_made_small_is_one_line() -> None:
    config = make_config("qwen2")
    config.hidden_act = "no such function"
    with pytest.raises(ValueError, match=r"^a small model of qwen2 could not be computed"):
        CHECK.run(config)


def test_layers_that_are_computed_again_keep_their_dropout_off() -> None:
    recomputed = replace(CHECK, gradient_checkpointing=True)
    for kind, dropout in (("opt", {"dropout": 0.5}), ("gpt2", {"resid_pdrop": 0.5}), ("qwen2", {})):
        recomputed.run(make_config(kind, word_embed_proj_dim=64, ffn_dim=48, **dropout))


def test_a_small_model_has_every_listed_kind_of_layer_and_heads_of_the_models_size() -> None:
    kinds = ["full_attention"] * 40
    kinds[17] = kinds[39] = "sliding_attention"
    config = CONFIG_MAPPING["qwen3"](num_hidden_layers=40, layer_types=kinds, sliding_window=9)
    small = packing_check.small_config(config)
    assert small.num_hidden_layers == len(small.layer_types) == packing_check.FIRST_LAYERS + 1
    assert small.layer_types[-1] == "sliding_attention"
    assert (small.num_attention_heads, small.num_key_value_heads) == (2, 2)  # as many as each other
    assert (small.head_dim, config.num_hidden_layers) == (config.head_dim, 40)


# LongRoPE ----------------------------------------------------------------------------------

SHORT, LONG = [1.0, 1.5, 2.0, 2.5], [4.0, 5.0, 6.0, 7.0]
ORIGINAL = 64
"""Positions up to which the short factors hold."""


def longrope(kind: str = "phi3", **settings: object) -> PreTrainedConfig:
    return make_config(
        kind,
        **settings,
        hidden_size=32,
        num_key_value_heads=4,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": ORIGINAL,
            "short_mscale": 1.1,
            "long_mscale": 1.2,
        },
    )


@pytest.mark.parametrize(
    ("max_tokens", "factors"), [(ORIGINAL - 1, SHORT), (ORIGINAL, LONG), (200, LONG)]
)
def test_longrope_has_the_factors_of_an_engine_with_room_for_the_longest_path(
    max_tokens: int, factors: list[float]
) -> None:
    config = longrope()
    model = AutoModelForCausalLM.from_config(config).eval()
    fix_rotary(model, max_tokens)
    [rotary] = [part for part in model.modules() if hasattr(part, "inv_freq")]
    by_hand = [1 / (factor * 10000.0 ** (2 * i / 8)) for i, factor in enumerate(factors)]
    for longest in (3, 150):  # transformers would take its factors by these
        model(input_ids=torch.zeros(1, 3, dtype=int), position_ids=torch.tensor([[0, 1, longest]]))
        assert rotary.inv_freq.tolist() == pytest.approx(by_hand, rel=1e-5)
    scale = math.sqrt(1 + math.log(512 / ORIGINAL) / math.log(ORIGINAL))
    assert rotary.attention_scaling == pytest.approx(scale)


def test_longrope_is_trained_on_either_side_of_its_threshold() -> None:
    for max_tokens in (ORIGINAL - 1, ORIGINAL, 200):
        replace(CHECK, max_tokens=max_tokens).run(longrope())


def test_a_class_that_takes_the_short_factors_for_long_texts_is_refused_for_these() -> None:
    config = longrope("phimoe", num_local_experts=4, sliding_window=None)
    assert not refusal(config, replace(CHECK, max_tokens=ORIGINAL - 1))
    said = refusal(config, replace(CHECK, max_tokens=ORIGINAL))
    assert said.endswith(f"has {ORIGINAL}, make it shorter than {ORIGINAL}")
