"""The one-file TreeRPO: it makes the learner's update, and its own trees are real ones."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.minimal import TreeRPO, train
from tests.support.learning.learner_runs import FREE, make_config, make_learner, mixed
from tests.support.learning.step_rows import gradients
from tests.support.learning.tiny_models import save_tiny_model
from tests.support.project import PROJECT
from treerpo_ray.algo.tree import StopReason
from treerpo_ray.config import Config, load

METHODS = sorted(path.stem for path in (PROJECT / "conf/methods").glob("*.yaml"))


@cache
def method(name: str) -> Config:
    return load([str(PROJECT / "conf/quickstart.yaml"), str(PROJECT / f"conf/methods/{name}.yaml")])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_trees_make_the_learners_update(name: str, path: str) -> None:
    """AdamW gives any gradient its full rate, rounding noise too: the rate is small for that."""
    own = method(name)
    settings = replace(
        FREE,
        learning_rate=1e-5,
        final_rate=0.5,
        warmup_steps=1,
        clip_grad_norm=1.0,
        advantage=own.learner.advantage,
        prune=own.learner.prune,
        prune_threshold=own.learner.prune_threshold,
        minibatches=own.learner.minibatches,
    )
    config = make_config(path, settings, replace(own.loss, entropy_coef=0.01))
    records = mixed()
    minimal, learner = TreeRPO(config), make_learner(config)
    before = weights(minimal.model)
    trained = minimal.update([r.tree for r in records], [r.rewards for r in records], 0.3)
    result = learner.update(records, 0.3)
    assert result.metrics["tokens/trained"] == trained > 0
    after = weights(minimal.model)
    assert max(float((after[n] - before[n]).abs().max()) for n in after) > 2e-6, "it moved"
    torch.testing.assert_close(after, weights(learner.policy.model), atol=1e-6, rtol=0)
    ours, theirs = gradients(minimal.model), gradients(learner.policy.model)
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_trees_have_the_configured_shape_and_the_log_probabilities_of_the_policy(path: str) -> None:
    """With this, importance weights are 1 in the first update."""
    policy = TreeRPO(make_config(path, FREE))
    torch.manual_seed(0)
    [tree, _] = policy.grow([[5, 6, 7], [8]])  # of different lengths: one is padded
    assert len(tree.children[-1]) == 3 and tree.prompt_ids.tolist() == [5, 6, 7]
    for index, step in enumerate(tree.steps):
        is_leaf = index in tree.leaves
        assert is_leaf == (step.stop is StopReason.END_OF_TEXT or tree.depths[index] == 2)
        assert 1 <= len(step.token_ids) <= 5
    rewards = np.full(len(tree.steps), np.nan)
    rewards[list(tree.leaves)] = np.arange(len(tree.leaves)) % 2
    for row in policy.rows(tree, rewards):
        with torch.no_grad():
            torch.testing.assert_close(policy.logprobs([row])[0], row.behaviour, atol=1e-4, rtol=0)


def test_the_command_trains_and_prints_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    train(
        load(
            [
                str(PROJECT / "conf/quickstart.yaml"),
                *("run.num_steps=2", "gate.trees_per_step=4", "prompts.num_problems=16"),
            ]
        )
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all("reward" in line and "trained" in line for line in lines)


def test_what_it_leaves_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not in jobs/minimal.py: \['gate.max_redraws'\]"):
        train(method("dapo"))
    with pytest.raises(ValueError, match=r"not in jobs/minimal.py: \['tree.adaptive'\]"):
        train(method("adaptive"))
    for override in (
        "model.dtype=bfloat16",
        "learner.advantage=past_baseline",
        "learner.advantage=shrunk_baseline",
    ):
        with pytest.raises(ValueError, match=r"not in jobs/minimal.py: bfloat16, a baseline of"):
            train(load([override]))
    for override in ("prompts.mix.a.path=quickstart:train", "model.stop=[END]"):
        section = override.partition("=")[0].split(".")
        with pytest.raises(ValueError, match=rf"not in jobs/minimal.py: .*{'.'.join(section[:2])}"):
            train(load([override]))


def test_a_check_is_given_all_that_it_asks_for_or_refused(tmp_path: Path) -> None:
    """Before a model is read: an empty question or row would make other rewards."""
    for asked, is_refused in {
        "def check_answer(text, references)": False,
        "def check_answer(text, is_cut_off)": False,
        "def check_answer(text, question)": True,
        "def check_answer(text, *, row)": True,
        "async def check_answer(text, references)": True,
    }.items():
        check = tmp_path / f"check_{len(list(tmp_path.iterdir()))}.py"
        check.write_text(f"{asked}:\n    return True\n\n\nSELF_TEST = [('4', ['4'], True)]\n")
        config = load([f"verifier.check={check}", f"model.path={tmp_path}/none"])
        told = r"not in jobs/minimal.py: a check with" if is_refused else "none"
        with pytest.raises((ValueError, OSError), match=told):
            TreeRPO(config)
