"""The methods of `conf/methods`: each is what its source says, by configuration alone."""

from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from tests.support.learning.learner_runs import FREE, make_config, make_record, run_updates
from tests.support.learning.methods_by_hand import ROWS
from tests.support.learning.step_rows import gradients, plain_model, row
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.algo.loss_config import Normalisation
from treerpo_ray.config import Config, load
from treerpo_ray.records import TreeRecord

CONF = Path(__file__).parents[2] / "conf"
FLAT = {"tree.num_children": (8,), "tree.step_tokens": (46,)}
ALONE = {"tree.num_children": (1,), "tree.step_tokens": (46,)}
UNFILTERED = {"learner.prune": "range", "learner.prune_threshold": -1}
DEFINED_BY: dict[str, dict[str, object]] = {
    "grpo": FLAT
    | UNFILTERED
    | {"learner.advantage": "standard", "loss.normalisation": "sequence_mean"},
    "dr_grpo": FLAT
    | UNFILTERED
    | {"learner.advantage": "difference", "loss.normalisation": "constant"},
    "dapo": FLAT
    | {
        "learner.advantage": "standard",
        "learner.prune_threshold": 0,
        "gate.max_redraws": 10,
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.28,
        "loss.normalisation": "token_mean",
    },
    "gspo": FLAT
    | UNFILTERED
    | {
        "learner.advantage": "standard",
        "learner.minibatches": 4,
        "loss.ratio": "sequence",
        "loss.clip_low": 3e-4,
        "loss.clip_high": 4e-4,
        "loss.normalisation": "sequence_mean",
    },
    "rloo": FLAT
    | UNFILTERED
    | {"learner.advantage": "leave_one_out", "loss.normalisation": "constant"},
    "raft": ALONE | UNFILTERED | {"learner.advantage": "reward", "loss.normalisation": "constant"},
    "reinforce": ALONE
    | UNFILTERED
    | {"learner.advantage": "past_baseline", "loss.normalisation": "constant"},
    "shrunk_baseline": UNFILTERED
    | {
        "learner.advantage": "shrunk_baseline",
        "learner.baseline_share": 1,
        "loss.normalisation": "constant",
    },
    "adaptive": UNFILTERED
    | {
        "tree.adaptive": True,
        "tree.num_children": (1, 4),
        "tree.step_tokens": (23, 23),
        "learner.advantage": "shrunk_baseline",
        "learner.baseline_share": 1,
        "loss.normalisation": "constant",
    },
    "spo_tree": {"learner.advantage": "difference", "learner.prune_threshold": 0},
    "treerl": {
        "learner.advantage": "treerl",
        "learner.prune": "tree_range",
        "learner.prune_threshold": 0,
        "tree.entropy_window": 8,
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.26,  # 1 + 1.3 eps
    },
    "treepo": {
        "learner.advantage": "treepo",
        "learner.prune": "tree_range",
        "learner.prune_threshold": 0,
        "gate.max_redraws": 10,
        "loss.clip_high": 0.28,
        "loss.normalisation": "token_mean",
    },
    "treerpo": {
        "learner.advantage": "bernoulli",
        "learner.prune": "range",
        "learner.prune_threshold": 0.1,
        "loss.normalisation": "token_mean",
    },
}
"""Values that make each method."""
LONE_VERDICTS = "cwwcuw"
FLAT_VERDICTS = ("cwww", "wccw", "wwww", "cccw")
TREE_VERDICTS = ("ccwww", "wwccw", "cwwcw", "wwwww")
"""The last trees of both have a pruned group, or are pruned."""


@cache
def method(name: str) -> Config:
    return load([str(CONF / "quickstart.yaml"), str(CONF / "methods" / f"{name}.yaml")])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def records_of(name: str) -> list[TreeRecord]:
    if method(name).tree.num_children == (1,):
        return [make_record(i, v, parents=(-1,)) for i, v in enumerate(LONE_VERDICTS)]
    if method(name).tree.num_children == (8,):
        return [make_record(i, v, parents=(-1,) * 4) for i, v in enumerate(FLAT_VERDICTS)]
    return [make_record(i, v) for i, v in enumerate(TREE_VERDICTS)]


def kept(name: str, record: TreeRecord) -> set[int]:
    """Steps that are trained: the rule of the method's own file, by hand."""
    settings, steps = method(name).learner, record.tree.steps
    if settings.prune_threshold < 0:
        return set(range(len(steps)))
    if settings.prune == "tree_range":
        return set(range(len(steps))) if len(set(record.verdicts)) > 1 else set()
    moved = {step for step, advantage in ROWS[name](record) if advantage}
    return {i for i, step in enumerate(steps) if any(steps[j].parent == step.parent for j in moved)}


def test_every_method_has_a_file_a_definition_and_a_calculation_by_hand() -> None:
    files = {file.stem for file in (CONF / "methods").glob("*.yaml")}
    assert files == DEFINED_BY.keys() == ROWS.keys()


@pytest.mark.parametrize("name", DEFINED_BY)
def test_a_method_sets_what_defines_it_and_its_file_starts_with_its_command_and_source(
    name: str,
) -> None:
    for key, value in DEFINED_BY[name].items():
        assert attrgetter(key)(method(name)) == value, key
    command, source, *_ = (CONF / "methods" / f"{name}.yaml").read_text().splitlines()
    assert command == f"# python jobs/train.py conf/quickstart.yaml conf/methods/{name}.yaml"
    assert " (arXiv 2" in source


@pytest.mark.parametrize("name", DEFINED_BY)
def test_an_update_has_the_gradient_of_the_methods_own_training_rows(name: str, path: str) -> None:
    own, records = method(name), records_of(name)
    learner = replace(
        FREE,
        advantage=own.learner.advantage,
        prune=own.learner.prune,
        prune_threshold=own.learner.prune_threshold,
    )
    config = make_config(path, learner, own.loss)
    [(result, state)] = run_updates(config, [[records]], None)

    trained = {(r.ticket, step) for r in records for step in kept(name, r)}
    by_ticket = {r.ticket: r.tree.steps for r in records}
    lengths = {key: len(by_ticket[key[0]][key[1]].token_ids) for key in trained}
    assert result.metrics["tokens/trained"] == sum(lengths.values())
    model, loss = plain_model(path), torch.zeros(())
    for record in records:
        logprobs = {step: row(model, record, step, 0.7)[0] for step in kept(name, record)}
        for step, advantage in ROWS[name](record):
            if step in logprobs:
                behaviour = torch.from_numpy(record.tree.steps[step].logprobs)
                weight = (logprobs[step].detach() - behaviour).exp().clamp(max=2.0)
                share = {
                    Normalisation.TOKEN_MEAN: 1 / sum(lengths.values()),
                    Normalisation.SEQUENCE_MEAN: 1 / lengths[record.ticket, step] / len(trained),
                    Normalisation.CONSTANT: 1 / (5 + 5) / len(trained),
                }[own.loss.normalisation]
                surrogate = weight * logprobs[step]
                if own.loss.ratio == "sequence":  # d exp(mean) = mean of the tokens' d
                    surrogate = weight * logprobs[step].mean()
                loss = loss - share * advantage * surrogate.sum()
    loss.backward()
    expected = gradients(model)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3, "there is a signal"
    torch.testing.assert_close(state.gradients, expected, atol=1e-5, rtol=1e-4)
