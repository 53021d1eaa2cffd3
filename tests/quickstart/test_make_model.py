import random
from dataclasses import replace
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
    ("quickstart.yaml", "tasks/restated4.yaml"),
    ("quickstart.yaml", "tasks/items6.yaml"),
    ("quickstart.yaml", "tasks/plan_first.yaml"),
    ("quickstart.yaml", "tasks/checked4.yaml"),
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
    rates = script.sample_rewards(
        load_committed().eval(), script.RECIPES["chains4"], tokenizer, num_problems=60, k=8
    ).mean(1)
    assert 0.15 < rates.mean() < 0.35
    assert (rates > 0).float().mean() > 0.75


def test_the_chances_of_lines_make_that_of_the_solution_and_those_of_a_chain_its_pass_rate():
    model, tokenizer = load_committed().eval(), make_tokenizer()
    recipe = script.RECIPES["chains4"]
    chances = script.line_chances(model, recipe, tokenizer, num_problems=60)
    rows = exercises.problems("chains4", "test", 60, 0)
    for row, chance in zip(rows[:5], chances, strict=False):
        prompt = script.encode_prompt(row.question, tokenizer)
        solution = [*tokenizer.encode(row.solution), tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *solution]])).logits[0]
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        total = logprobs.gather(1, torch.tensor(solution)[:, None]).sum()
        assert chance.log().sum().item() == pytest.approx(total.item(), abs=1e-3)
    slips, last = chances.mean(0)[:-1], chances.mean(0)[-1]
    assert slips.min() > 0.6 and slips.max() < 0.75 and last > 0.999
    torch.manual_seed(0)
    rewards = script.sample_rewards(model, recipe, tokenizer, num_problems=60, k=8)
    assert chances.prod(1).mean().item() == pytest.approx(rewards.mean().item(), abs=0.06)


def test_prompts_and_padding_have_no_label_and_each_solution_ends_with_the_end_token():
    tokenizer = make_tokenizer()
    token_ids, labels = script.draw_batch(SMALL, tokenizer, random.Random(0), slip_rate=0.0)
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


def test_the_first_three_quarters_of_the_steps_have_the_early_slip_rate():
    tokenizer, losses = make_tokenizer(), []
    for recipe in (replace(SMALL, slip_rate=1.0, early_slip_rate=0.0), replace(SMALL, slip_rate=0)):
        torch.manual_seed(0)
        losses.append(script.warm_start(script.make_model(recipe, tokenizer), recipe, tokenizer))
    assert losses[0][:15] == losses[1][:15]
    assert all(a != b for a, b in zip(losses[0][15:], losses[1][15:], strict=True))


@pytest.mark.parametrize("names", TASK_FILES)
def test_a_task_file_fits_the_model_that_it_names(names):
    config = load([str(CONF / name) for name in names])
    recipe = script.RECIPES[Path(config.model.path).name]
    assert config.verifier.check == recipe.check.__module__
    assert config.prompts.path == f"quickstart:{recipe.task}/train"
    assert config.evaluate.data.path == f"quickstart:{recipe.task}/test"
    rows = exercises.problems(recipe.task, "train", 300, 0)
    most = min(config.shape.max_answer_tokens, recipe.max_response_tokens)
    assert recipe.task == "checked4" or max(len(row.solution) for row in rows) < most
    assert max(len(row.question) for row in rows) < config.prompts.max_prompt_tokens


def solutions_with_configuration(task):
    config = load([str(CONF / "quickstart.yaml"), str(CONF / f"tasks/{task}.yaml")])
    return [row.solution for row in exercises.problems(task, "train", 300, 0)], config.tree


def test_the_tree_of_restated_chains_forks_where_the_restatement_ends():
    solutions, tree = solutions_with_configuration("restated4")
    for solution in solutions:
        sure, _, rest = solution.partition(tree.delimiter)
        assert sure.endswith("=") and rest.startswith("\n")
        assert len(sure) < tree.step_tokens[0] and len(rest) < tree.step_tokens[1]


def test_the_tree_of_graded_items_forks_before_the_last_and_that_of_plans_after_the_plan():
    solutions, tree = solutions_with_configuration("items6")
    cut = tree.step_tokens[0]
    assert all(each[cut - 1] == "\n" and each[cut:].count("=") == 1 for each in solutions)
    solutions, tree = solutions_with_configuration("plan_first")
    assert all(each.index("\n") < tree.step_tokens[0] < len(each) for each in solutions)


def test_the_cap_of_checked_chains_cuts_off_many_that_one_check_or_two_would_not():
    """As TreeRPO's: the cap is about 1.5 times the mean length of what it leaves."""
    solutions, tree = solutions_with_configuration("checked4")
    fork, cap = tree.step_tokens[0], sum(tree.step_tokens)
    lengths = [len(each) + 1 for each in solutions]  # with the end token
    assert sum(length > cap for length in lengths) / len(lengths) == pytest.approx(0.3, abs=0.05)
    mean = sum(min(length, cap) for length in lengths) / len(lengths)
    assert 1.3 < cap / mean < 1.5
    num_checks = [each.count(" ") // 4 for each in solutions]
    assert all((n <= 2) == (length <= cap) for n, length in zip(num_checks, lengths, strict=True))
    assert {each[fork] for each in solutions} == {"\n", " "}, "the first choice to check"
    assert all(each[:fork].count("=") == 4 for each in solutions)


def test_a_recipe_with_a_start_goes_on_from_its_weights():
    made = script.make_model(script.RECIPES["chains10"], make_tokenizer()).state_dict()
    for name, tensor in load_committed().state_dict().items():
        assert tensor.equal(made[name])
