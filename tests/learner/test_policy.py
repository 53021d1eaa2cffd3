"""The policy: log-probabilities of edges, weights under checkpoint names, loading and saving."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.learning.forests import lay_out, random_tree, row_logits
from tests.support.learning.tiny_models import TIED, VOCAB_SIZE, save_tiny_model
from treerpo_ray.learner.policy import ForestTensors, Policy, load_policy

CPU = torch.device("cpu")


def load(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Policy:
    return load_policy(str(path), dtype=dtype, device=CPU, gradient_checkpointing=False)


@pytest.fixture(scope="module")
def qwen2_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def ragged_forest() -> tuple[list, ForestTensors]:
    rng = np.random.default_rng(3)
    trees = [random_tree(rng, num_children=3, max_depth=2) for _ in range(3)]
    return trees, ForestTensors.from_forest(lay_out(trees), CPU)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("qwen2", {}),
        ("nanochat", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 2.5}),
        ("granite", {"logits_scaling": 3.0}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_logprobs_and_entropy_equal_the_dense_ones_at_temperature_0_6(
    tmp_path: Path, architecture: str, head: dict[str, float]
) -> None:
    path = save_tiny_model(tmp_path, architecture, **head)
    trees, forest = ragged_forest()
    logprobs, entropy = load(path).edge_logprobs(forest, 0.6)

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with torch.no_grad():
        dense = (row_logits(model, trees) / 0.6).log_softmax(-1)
    expected = dense[range(len(dense)), forest.target]
    torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(dense.exp() * dense).sum(-1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("num_sources", [1, 7])
def test_pieces_of_logits_change_neither_values_nor_gradients(
    qwen2_path: str, num_sources: int
) -> None:
    _, forest = ragged_forest()
    assert len(forest.source) < len(forest.target), "siblings share the source of their first token"
    results = []
    for budget in (None, num_sources * VOCAB_SIZE):
        loaded = load(qwen2_path)
        policy = Policy(loaded.model, loaded.tokenizer, logit_budget=budget)
        logprobs, entropy = policy.edge_logprobs(forest, 0.8)
        (logprobs * forest.advantage + entropy.square()).mean().backward()
        gradients = [parameter.grad for parameter in policy.model.parameters()]
        results.append((logprobs, entropy, gradients))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


def test_a_frozen_policy_gives_the_same_logprobs_without_a_graph(qwen2_path: str) -> None:
    _, forest = ragged_forest()
    policy = load(qwen2_path)
    with torch.no_grad():
        frozen, _ = policy.edge_logprobs(forest, 1.0)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, policy.edge_logprobs(forest, 1.0)[0].detach())


def test_sequence_logprobs_are_those_of_the_model_itself(qwen2_path: str) -> None:
    token_ids = [5, 17, 3, 3, 96, 41]
    model = AutoModelForCausalLM.from_pretrained(qwen2_path, attn_implementation="eager")
    with torch.no_grad():
        dense = model(input_ids=torch.tensor([token_ids])).logits[0].log_softmax(-1)
    expected = dense[range(5), token_ids[1:]]
    torch.testing.assert_close(
        load(qwen2_path).sequence_logprobs(token_ids), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("architecture", [*TIED, "qwen3_moe"])
def test_weights_have_the_names_and_values_of_the_checkpoint_in_layer_order(
    tmp_path: Path, architecture: str
) -> None:
    path = save_tiny_model(tmp_path, architecture)
    weights = list(load(path).named_weights())
    names = [name for name, _ in weights]
    stored = load_file(Path(path) / "model.safetensors")
    assert len(names) == len(set(names))
    assert set(names) == set(stored)
    for name, weight in weights:
        torch.testing.assert_close(weight, stored[name], atol=0, rtol=0)
    assert ("lm_head.weight" in names) == (not TIED.get(architecture, True))
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert not any(weight.requires_grad for _, weight in weights)


def test_a_saved_policy_loads_with_its_tokenizer_and_generation_config(
    qwen2_path: str, tmp_path: Path
) -> None:
    policy = load(qwen2_path)
    with torch.no_grad():
        policy.model.lm_head.weight += 0.5
    policy.save_pretrained(tmp_path)

    again = load(tmp_path)
    expected = policy.sequence_logprobs([1, 2, 3])
    torch.testing.assert_close(again.sequence_logprobs([1, 2, 3]), expected)
    assert again.model.generation_config.temperature == 0.6
    assert AutoTokenizer.from_pretrained(tmp_path)("cab").input_ids == [2, 0, 1]
    assert "attn" not in (tmp_path / "config.json").read_text(), "tree attention is ours alone"


def test_a_bfloat16_policy_scores_in_float32(qwen2_path: str) -> None:
    _, forest = ragged_forest()
    logprobs, entropy = load(qwen2_path, dtype=torch.bfloat16).edge_logprobs(forest, 1.0)
    exact, _ = load(qwen2_path).edge_logprobs(forest, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - exact).abs().mean() < 0.05


def test_a_folder_without_a_whole_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        load(tmp_path)
    save_tiny_model(tmp_path, "qwen2")
    weights = tmp_path / "model.safetensors"
    stored, whole = load_file(weights), weights.read_bytes()

    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"^model .* not fully covered"):
        load(tmp_path)
    save_file({n: w for n, w in stored.items() if n != "model.norm.weight"}, weights)
    with pytest.raises(ValueError, match=r"1 weights are missing .* model\.norm\.weight"):
        load(tmp_path)
    save_file(stored | {"model.norm.weight": torch.ones(3)}, weights)
    with pytest.raises(ValueError, match=r"another shape .* e\.g\. model\.norm\.weight"):
        load(tmp_path)
    weights.unlink()
    torch.save(stored, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"^model {tmp_path}: .*safetensors"):
        load(tmp_path)
