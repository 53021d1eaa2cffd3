"""Adapters (LoRA): they alone are trained, without them the model is the one at the start, and a
merged model computes what it computes with them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.support.learning.learner_runs import (
    CPU,
    FREE,
    State,
    assert_nothing_moved,
    make_config,
    make_learner,
    mixed,
)
from tests.support.learning.step_rows import bernoulli_by_hand, plain_model, row, row_gradients
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.config import Config
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.learner.adapters.targets import num_adapter_parameters
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.policy import Policy, load_policy
from treerpo_ray.run_folder.checkpoints import BYTES_A_PARAMETER
from treerpo_ray.run_folder.files import ADAPTER_FOLDER, MODEL_FOLDER

LORA = LoraConfig(rank=4, alpha=8)
IDS = [5, 17, 3, 3, 96, 41]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def lora_config(
    path: str, learner: LearnerConfig = FREE, loss: LossConfig | None = None, dtype: str = "float32"
) -> Config:
    config = make_config(path, learner, loss)
    return replace(config, lora=LORA, model=replace(config.model, dtype=dtype))


def load(path: str | Path, lora: LoraConfig | None = None, folder: Path | None = None) -> Policy:
    return load_policy(
        str(path),
        dtype=torch.float32,
        device=CPU,
        gradient_checkpointing=False,
        lora=lora,
        adapters_from=folder,
    )


def shake(policy: Policy) -> None:
    """Give adapters weights that are far from those at the start."""
    assert policy.adapters is not None
    torch.manual_seed(1)
    for _, weight in policy.adapters.named():
        weight.normal_(std=0.1)


@pytest.fixture
def trained(path: str) -> Learner:
    """A learner whose adapters do something."""
    learner = make_learner(lora_config(path))
    shake(learner.policy)
    return learner


def test_new_adapters_change_nothing_and_every_worker_makes_the_same(path: str) -> None:
    ours = load(path, LORA)
    assert torch.equal(ours.sequence_logprobs(IDS), load(path).sequence_logprobs(IDS))
    torch.manual_seed(7)
    again = load(path, LORA)
    assert torch.initial_seed() == 7, "who draws elsewhere draws the same"
    torch.testing.assert_close(
        dict(again.named_weights()), dict(ours.named_weights()), atol=0, rtol=0
    )
    names = [name for name, _ in ours.named_weights()]
    assert len(names) == 2 * 7 * 2, "two matrices for seven layers of two blocks"
    assert names[0] == "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert sum(weight.numel() for _, weight in ours.named_weights()) == num_adapter_parameters(
        plain_model(path), LORA
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_forest_are_those_of_rows_with_pefts_own_model(
    path: str, tmp_path: Path, checkpointing: bool
) -> None:
    settings = replace(FREE, gradient_checkpointing=checkpointing)
    config = lora_config(path, settings, LossConfig(entropy_coef=0.1))
    learner = make_learner(config)
    shake(learner.policy)
    learner.policy.save_adapters(tmp_path)
    plain = PeftModel.from_pretrained(plain_model(path), str(tmp_path), is_trainable=True)
    expected = row_gradients(plain.get_base_model(), mixed(), config)
    before = State.of(learner)
    learner.update(mixed())
    after = State.of(learner)
    assert min(float(each.abs().max()) for each in expected.values()) > 1e-4
    torch.testing.assert_close(after.gradients, expected, atol=1e-5, rtol=1e-4)
    assert after.gradients.keys() == {name for name in after.parameters if ".lora_" in name}
    moved = {
        name
        for name, weight in after.parameters.items()
        if not torch.equal(weight, before.parameters[name])
    }
    assert moved == after.gradients.keys()


def test_the_reference_is_the_model_itself_without_adapters(trained: Learner) -> None:
    config = replace(lora_config(trained.model.path), loss=LossConfig(kl_coef=0.1))
    learner = make_learner(config)
    shake(learner.policy)
    learner.policy.save_pretrained(folder := Path(trained.model.path) / "now")
    found = learner.update(mixed()).metrics["loss/kl"]
    start, now = plain_model(trained.model.path), plain_model(folder)
    terms = []
    with torch.no_grad():
        for record in mixed():
            for index in bernoulli_by_hand(record, 0.1):
                x = row(start, record, index, 0.7)[0] - row(now, record, index, 0.7)[0]
                terms.append(x.exp() - x - 1)
    expected = float(torch.cat(terms).mean())
    assert expected > 1e-4 and found == pytest.approx(expected, rel=1e-3)
    assert learner.optimizer.reference is None, "no second model"


def test_an_exported_model_has_them_merged_and_they_lie_beside_it(
    trained: Learner, tmp_path: Path
) -> None:
    policy = trained.policy
    policy.save_pretrained(tmp_path)
    expected = policy.sequence_logprobs(IDS)
    torch.testing.assert_close(load(tmp_path).sequence_logprobs(IDS), expected)
    assert not torch.allclose(load(trained.model.path).sequence_logprobs(IDS), expected, atol=0.1)
    again = load(trained.model.path, LORA, tmp_path / ADAPTER_FOLDER)
    assert torch.equal(again.sequence_logprobs(IDS), expected)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == load_file(Path(trained.model.path) / "model.safetensors").keys()
    assert policy.tokenizer.convert_ids_to_tokens([0]) == ["a"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_learner_goes_on_bitwise_from_adapters_alone(
    path: str, tmp_path: Path, dtype: str
) -> None:
    config = lora_config(path, loss=LossConfig(kl_coef=0.1), dtype=dtype)
    learner = make_learner(config)
    for k in range(2):
        learner.update(mixed(first=4 * k))
    learner.write(tmp_path)
    resumed = make_learner(config, tmp_path)
    assert_nothing_moved(State.of(learner), State.of(resumed))
    for one in (learner, resumed):
        one.update(mixed(first=8, version=2))
    assert_nothing_moved(State.of(learner), State.of(resumed))
    assert not (tmp_path / MODEL_FOLDER).exists()
    own = num_adapter_parameters(plain_model(path), LORA)
    assert learner.checkpoint_bytes == BYTES_A_PARAMETER * own
    weights = {weight.dtype for weight in learner.policy.trained}
    assert weights == {torch.float32}, "what is trained is kept so"
    held = {weight.dtype for weight in learner.policy.model.parameters()} - weights
    assert held == {getattr(torch, dtype)} - weights, "and what stays as it is computed in"


def test_adapters_of_another_rank_are_refused(trained: Learner, tmp_path: Path) -> None:
    trained.policy.save_adapters(tmp_path)
    with pytest.raises(ValueError, match=r"has adapters of other layers or of another rank"):
        load(trained.model.path, replace(LORA, rank=8), tmp_path)


def test_layers_that_a_model_has_not_are_refused_with_those_that_it_has(path: str) -> None:
    few = load(path, replace(LORA, target_modules=("q_proj", "v_proj")))
    assert len(few.trained) == 2 * 2 * 2
    for name in ("w1", "lm_head"):
        told = rf"^lora\.target_modules: Qwen2\w+ has no linear layer {name} but the head; it has "
        with pytest.raises(ValueError, match=told + r"down_proj, gate_proj, .* v_proj$") as caught:
            load(path, replace(LORA, target_modules=("q_proj", name)))
        assert not re.search("\n", str(caught.value))
