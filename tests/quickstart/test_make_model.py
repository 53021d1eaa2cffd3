import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from tests.support.project import PROJECT
from treerpo_ray.config import load
from treerpo_ray.quickstart import exercises
from treerpo_ray.quickstart import make_model as script
from treerpo_ray.quickstart.tokenizer import make_tokenizer

SMALL = script.Recipe(num_layers=1, hidden_size=32, num_steps=20, batch_size=8)

CONF = PROJECT / "conf"
TASK_FILES = [
    ("countdown.yaml",),
    ("quickstart.yaml", "tasks/wordy4.yaml"),
    ("quickstart.yaml", "tasks/chains10.yaml"),
    ("quickstart.yaml", "tasks/chains10.yaml", "tasks/chains10_hard.yaml"),
]


def load_committed():
    return AutoModelForCausalLM.from_pretrained(script.MODEL_FOLDER)


def test_the_committed_model_is_a_small_fp32_qwen2_with_heads_that_vllm_has_on_a_cpu():
    model = load_committed()
    assert type(model) is Qwen2ForCausalLM
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    weights = list(script.MODEL_FOLDER.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 4 * 2**20


def test_the_committed_model_has_the_shape_that_the_script_makes():
    made = script.make_model(script.Recipe(), make_tokenizer())
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    committed = {name: tensor.shape for name, tensor in load_committed().state_dict().items()}
    assert committed == shapes


def test_the_committed_model_starts_between_15_and_35_percent_and_solves_most_in_8_samples():
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(script.MODEL_FOLDER)
    rates = script.sample_pass_rates(
        load_committed().eval(), script.RECIPES["chains4"], tokenizer, num_problems=60, k=8
    )
    assert 0.15 < rates.mean() < 0.35
    assert (rates > 0).float().mean() > 0.75


def test_prompts_and_padding_have_no_label_and_each_solution_ends_with_the_end_token():
    tokenizer = make_tokenizer()
    token_ids, labels = script.draw_batch(SMALL, tokenizer, random.Random(0))
    assert token_ids.shape == labels.shape
    for row, label in zip(token_ids, labels, strict=True):
        num_prompt_tokens = (label != script.NO_LABEL).nonzero()[0].item()
        solution = label[label != script.NO_LABEL]
        assert tokenizer.decode(row[:num_prompt_tokens]).endswith("=?\n")
        assert solution[-1] == tokenizer.eos_token_id
        assert row[num_prompt_tokens:][: len(solution)].equal(solution)
        assert (row[num_prompt_tokens + len(solution) :] == tokenizer.pad_token_id).all()


def test_the_warm_start_lowers_the_loss_and_a_seed_gives_the_same_losses():
    tokenizer = make_tokenizer()
    runs = []
    for _ in range(2):
        torch.manual_seed(SMALL.seed)
        runs.append(script.warm_start(script.make_model(SMALL, tokenizer), SMALL, tokenizer))
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.9 * runs[0][0]


@pytest.mark.parametrize("names", TASK_FILES)
def test_a_task_file_fits_the_model_that_it_names(names):
    config = load([str(CONF / name) for name in names])
    recipe = script.RECIPES[Path(config.model.path).name]
    assert config.verifier.check == recipe.check.__module__
    assert config.prompts.path == f"quickstart:{recipe.task}/train"
    assert config.evaluate.data.path == f"quickstart:{recipe.task}/test"
    rows = exercises.problems(recipe.task, "train", 300, 0)
    most = min(config.shape.max_answer_tokens, recipe.max_response_tokens)
    assert max(len(row.solution) for row in rows) < most
    assert max(len(row.question) for row in rows) < config.prompts.max_prompt_tokens


def test_a_recipe_with_a_start_goes_on_from_its_weights():
    made = script.make_model(script.RECIPES["chains10"], make_tokenizer()).state_dict()
    for name, tensor in load_committed().state_dict().items():
        assert tensor.equal(made[name])
