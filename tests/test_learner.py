"""The learner: exact gradients, however many workers; minibatches, checkpoints, refusals."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from learner_runs import (
    CPU,
    DEPTH_TWO,
    State,
    Updates,
    make_config,
    make_record,
    run_updates,
    run_worker,
    with_logprobs,
)
from tiny_models import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from treerpo_ray.algo.advantages import AdvantageForm
from treerpo_ray.algo.loss import LossConfig, Normalisation
from treerpo_ray.config import Config, LearnerConfig
from treerpo_ray.learner import Learner, UpdateResult
from treerpo_ray.records import TreeRecord

FREE = LearnerConfig(learning_rate=1e-3, clip_grad_norm=1e9, weight_decay=0.01)
MIXED = ("ccwww", "wwccw", "cwwcw", "wcwwc")
"""Verdicts of four trees, each with a kept group; the first has a pruned one."""
REWARDS = {"correct": 1.0, "wrong": 0.0, "cut_off": 0.0}

Seen = list[tuple[UpdateResult, State]]


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def plain_model(path: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


def mixed(*, first: int = 0, version: int = 0) -> list[TreeRecord]:
    return [make_record(first + i, v, version=version) for i, v in enumerate(MIXED)]


def all_wrong(*, first: int, count: int) -> list[TreeRecord]:
    return [make_record(first + i, "wwwuw") for i in range(count)]


# The reference: one plain row a step, advantages by hand ---------------------------------------


def row(
    model: PreTrainedModel, record: TreeRecord, index: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each token of a step, from a plain forward of its whole path."""
    tokens = [*record.tree.prompt_ids.tolist(), *record.tree.path_token_ids(index)]
    count = len(record.tree.steps[index].token_ids)
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    logprobs = (logits[-count - 1 : -1] / temperature).log_softmax(-1)
    return logprobs[range(count), tokens[-count:]], -(logprobs.exp() * logprobs).sum(-1)


def bernoulli_by_hand(record: TreeRecord, threshold: float) -> dict[int, float]:
    """Advantage of each trained step by arXiv 2506.05183, eq. 1-4."""
    steps = record.tree.steps
    values = [math.nan] * len(steps)
    for leaf, verdict in zip(record.tree.leaves, record.verdicts, strict=True):
        values[leaf] = REWARDS.get(verdict, math.nan)
    groups = {p: [i for i, s in enumerate(steps) if s.parent == p] for p in range(-1, len(steps))}
    advantages = {}
    for parent in sorted((p for p in groups if groups[p]), reverse=True):
        group = [values[i] for i in groups[parent]]
        mean = sum(group) / len(group)
        if parent >= 0:
            values[parent] = mean
        if max(group) - min(group) > threshold and not math.isnan(mean):
            advantages |= {i: (values[i] - mean) / (mean * (1 - mean)) for i in groups[parent]}
    return advantages


def row_gradients(model: PreTrainedModel, records: list[TreeRecord], config: Config) -> Seen:
    """Gradients at ratio 1 of the loss in eq. 5, one row for each trained step."""
    loss = config.loss
    trained = [
        (record, index, advantage)
        for record in records
        for index, advantage in bernoulli_by_hand(record, config.learner.prune_threshold).items()
    ]
    num_tokens = sum(len(record.tree.steps[index].token_ids) for record, index, _ in trained)
    model.zero_grad()
    for record, index, advantage in trained:
        logprobs, entropy = row(model, record, index, config.tree.temperature)
        behaviour = torch.from_numpy(record.tree.steps[index].logprobs)
        weight = (logprobs.detach() - behaviour).exp().clamp(max=loss.importance_cap)
        tokens = -weight * advantage * logprobs - loss.entropy_coef * entropy
        if loss.normalisation is Normalisation.TOKEN_MEAN:
            (tokens.sum() / num_tokens).backward()
        else:
            (tokens.mean() / len(trained)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01, "there is a signal"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()


def assert_nothing_moved(before: State, after: State) -> None:
    assert (after.version, after.num_steps) == (before.version, before.num_steps)
    assert after.learning_rate == before.learning_rate
    torch.testing.assert_close(after.parameters, before.parameters, atol=0, rtol=0)
    torch.testing.assert_close(after.moments, before.moments, atol=0, rtol=0)


# One worker ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalisation", Normalisation)
def test_gradients_equal_those_of_one_row_for_each_step(
    path: str, normalisation: Normalisation
) -> None:
    config = make_config(path, FREE, LossConfig(entropy_coef=0.1, normalisation=normalisation))
    [(result, state)] = run_updates(config, [[mixed()]], None)
    assert_same_gradients(state.gradients, row_gradients(plain_model(path), mixed(), config))
    assert result.has_updated
    assert state.version == 1
    norm = torch.stack([g.norm() for g in state.gradients.values()]).norm()
    assert result.metrics["learner/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("letter", ["e", "t"])
def test_groups_above_a_leaf_without_a_verdict_are_left_out_and_counted(
    path: str, letter: str
) -> None:
    records = [make_record(0, f"{letter}cwcw"), make_record(1, f"cc{letter}cw"), *mixed(first=2)]
    config = make_config(path, FREE)
    [(result, state)] = run_updates(config, [[records]], None)
    assert_same_gradients(state.gradients, row_gradients(plain_model(path), records, config))
    metrics = result.stats.metrics(0)
    assert metrics["groups/errored"] == 3, "the first tree's root group, two of the second"
    assert result.stats.num_valued == 4
    kept = {0: [3, 4, 5, 6], 1: [5, 6]} | {
        i: bernoulli_by_hand(records[i], 0.1) for i in (2, 3, 4, 5)
    }
    lengths = [len(records[i].tree.steps[s].token_ids) for i in kept for s in kept[i]]
    assert result.metrics["tokens/trained"] == sum(lengths)


@pytest.mark.parametrize("normalisation", Normalisation)
def test_a_tree_of_depth_one_is_grpo(path: str, normalisation: Normalisation) -> None:
    learner = replace(FREE, advantage=AdvantageForm.STANDARD, prune_threshold=0.0)
    config = make_config(
        path, learner, LossConfig(importance_cap=None, normalisation=normalisation)
    )
    verdicts = ("cwww", "cwcw")
    records = [make_record(i, v, parents=(-1,) * 4) for i, v in enumerate(verdicts)]
    [(_, state)] = run_updates(config, [[records]], None)

    model = plain_model(path)
    num_tokens = sum(record.tree.num_sampled_tokens for record in records)
    loss = torch.zeros(())
    for record, letters in zip(records, verdicts, strict=True):
        rewards = torch.tensor([float(letter == "c") for letter in letters])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for index, advantage in enumerate(advantages):  # the sampled answers of one question
            logprobs, _ = row(model, record, index, 0.7)
            surrogate = (logprobs - logprobs.detach()).exp() * advantage
            if normalisation is Normalisation.SEQUENCE_MEAN:
                loss = loss - surrogate.mean() / 8
            else:
                loss = loss - surrogate.sum() / num_tokens
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(state.gradients, grads)


@pytest.mark.parametrize(("shift", "weight", "share"), [(0.25, math.exp(0.25), 0), (1.0, 2.0, 1)])
def test_a_shift_of_the_behaviour_logprobs_is_weighed_up_to_the_cap(
    path: str, shift: float, weight: float, share: float
) -> None:
    model, states, results = plain_model(path), [], []
    for offset in (0.0, shift):
        records = []
        for record in mixed():
            own = {i: row(model, record, i, 0.7)[0].detach() for i in range(len(DEPTH_TWO))}
            records.append(with_logprobs(record, {i: lp - offset for i, lp in own.items()}))
        [(result, state)] = run_updates(make_config(path, FREE), [[records]], None)
        results.append(result.metrics)
        states.append(state)
    assert results[0]["mismatch/mean"] < 1e-5
    assert results[1]["mismatch/mean"] == pytest.approx(shift, abs=1e-5)
    assert results[1]["importance/mean"] == pytest.approx(weight, abs=1e-4)
    assert results[1]["importance/truncated_share"] == share
    expected = {name: weight * grad for name, grad in states[0].gradients.items()}
    torch.testing.assert_close(states[1].gradients, expected, atol=1e-5, rtol=1e-4)


def test_the_order_in_which_trees_arrive_changes_nothing(path: str) -> None:
    config = make_config(path, replace(FREE, minibatches=2))
    [(_, state)] = run_updates(config, [[mixed()]], None)
    [(_, shuffled)] = run_updates(config, [[[mixed()[i] for i in (2, 0, 3, 1)]]], None)
    torch.testing.assert_close(shuffled.parameters, state.parameters, atol=0, rtol=0)


def test_an_update_without_a_kept_group_moves_nothing(path: str) -> None:
    config = make_config(path, replace(FREE, warmup_steps=5))
    updates = [[mixed()], [all_wrong(first=4, count=4)]]
    (_, before), (result, after) = run_updates(config, updates, None)
    assert not result.has_updated
    assert result.stats.metrics(1)["groups/pruned"] == 12
    assert "loss/total" not in result.metrics
    assert_nothing_moved(before, after)


def test_two_minibatches_are_two_steps_against_the_logprobs_from_before_the_first(
    path: str, tmp_path: Path
) -> None:
    config = make_config(path, replace(FREE, minibatches=2, learning_rate=1e-2))
    first, second = mixed()[:2], mixed()[2:]
    [(result, state)] = run_updates(config, [[first + second]], None)
    assert state.version == 1
    assert {int(moment) for moment in state.moments if moment.dim() == 0} == {2}

    one = Learner(replace(config, learner=replace(config.learner, minibatches=1)), CPU, None)
    one.update(first)
    one.write(tmp_path)
    start, moved = plain_model(path), plain_model(tmp_path / "model")
    ratios = [
        torch.ones(sum(len(r.tree.steps[i].token_ids) for i in bernoulli_by_hand(r, 0.1)))
        for r in first
    ]
    num_clipped = 0
    with torch.no_grad():
        for record in second:
            for index, advantage in bernoulli_by_hand(record, 0.1).items():
                new, old = (row(model, record, index, 0.7)[0] for model in (moved, start))
                ratios.append((new - old).exp())
                is_clipped = ratios[-1] > 1.2 if advantage > 0 else ratios[-1] < 0.8
                num_clipped += int(is_clipped.sum()) if advantage else 0
    expected = torch.cat(ratios)
    assert abs(float(expected.mean()) - 1) > 0.01
    assert result.metrics["loss/ratio"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert result.metrics["loss/clip_share"] == pytest.approx(num_clipped / len(expected)) > 0


def test_a_minibatch_without_a_kept_group_makes_no_step(path: str) -> None:
    config = make_config(path, replace(FREE, minibatches=2))
    records = [*mixed()[:2], *all_wrong(first=2, count=2)]
    [(result, state)] = run_updates(config, [[records]], None)
    assert result.has_updated
    assert (state.version, state.num_steps) == (1, 1)


def test_the_learning_rate_rises_over_the_warm_up_and_the_rate_used_is_reported(path: str) -> None:
    config = make_config(path, replace(FREE, warmup_steps=3))
    seen = run_updates(config, [[mixed(first=4 * k)] for k in range(5)], None)
    rates = [result.metrics["learner/learning_rate"] for result, _ in seen]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    for (_, before), (_, after), rate in zip(seen[:1], seen[1:2], rates[1:2], strict=True):
        change = [after.parameters[n] - before.parameters[n] for n in after.parameters]
        assert max(float(c.abs().max()) for c in change) < 1.5 * rate, "Adam moves at most so far"


# Checkpoints -----------------------------------------------------------------------------------


def test_a_resumed_learner_goes_on_bitwise_as_if_nothing_had_happened(
    path: str, tmp_path: Path
) -> None:
    config = make_config(path, replace(FREE, warmup_steps=5))
    learner = Learner(config, CPU, None)
    for k in range(2):
        learner.update(mixed(first=4 * k))
    learner.write(tmp_path)
    resumed = Learner(config, CPU, tmp_path)
    assert_nothing_moved(State.of(learner), State.of(resumed))

    on, again = (one.update(mixed(first=8, version=2)) for one in (learner, resumed))
    assert_nothing_moved(State.of(learner), State.of(resumed))
    assert again == on
    assert resumed.version == 3
    assert again.metrics["learner/learning_rate"] == pytest.approx(3 / 6 * 1e-3)


def test_the_kl_is_to_the_model_that_the_run_started_from(path: str, tmp_path: Path) -> None:
    config = make_config(path, FREE, LossConfig(kl_coef=0.1))
    learner = Learner(config, CPU, None)
    assert learner.update(mixed()).metrics["loss/kl"] == pytest.approx(0, abs=1e-9)
    learner.write(tmp_path)
    found = Learner(config, CPU, tmp_path).update(mixed(first=4)).metrics

    start, now = plain_model(path), plain_model(tmp_path / "model")
    terms = []
    with torch.no_grad():
        for record in mixed(first=4):
            for index in bernoulli_by_hand(record, 0.1):
                x = row(start, record, index, 0.7)[0] - row(now, record, index, 0.7)[0]
                terms.append(x.exp() - x - 1)
    expected = float(torch.cat(terms).mean())
    assert expected > 1e-4
    assert found["loss/kl"] == pytest.approx(expected, rel=1e-2)
    assert found["loss/total"] - found["loss/policy"] == pytest.approx(0.1 * expected, rel=1e-2)


# Refusals --------------------------------------------------------------------------------------


def test_a_tree_staler_than_allowed_is_an_error(path: str) -> None:
    learner = Learner(make_config(path, FREE, max_staleness=1), CPU, None)
    for _ in range(2):
        assert learner.update(mixed()).has_updated, "0 and 1 versions behind"
    before = State.of(learner)
    with pytest.raises(RuntimeError, match=r"2 versions behind .* gate\.max_staleness is 1"):
        learner.update([*mixed(version=2)[:3], make_record(3, "cwwww", version=0)])
    assert_nothing_moved(before, State.of(learner))


def test_a_gradient_that_is_not_finite_is_an_error_before_anything_moves(path: str) -> None:
    learner = Learner(make_config(path, FREE), CPU, None)
    before = State.of(learner)
    broken = with_logprobs(
        make_record(3, "cwwww"),
        {
            i: torch.full((len(s.token_ids),), np.nan)
            for i, s in enumerate(make_record(3, "cwwww").tree.steps)
        },
    )
    with pytest.raises(RuntimeError, match="non-finite"):
        learner.update([*mixed()[:3], broken])
    assert_nothing_moved(before, State.of(learner))


# Two workers -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cases(path: str) -> dict[str, tuple[Config, Updates]]:
    a, b, c, d = mixed()
    halves = [[a, b], [c, d]]
    pruned = [all_wrong(first=4, count=2), all_wrong(first=6, count=2)]
    one_idle = [mixed(first=8)[:2], all_wrong(first=10, count=2)]
    return {
        "whole": (make_config(path, replace(FREE, warmup_steps=5)), [halves, pruned, one_idle]),
        "minibatches": (make_config(path, replace(FREE, minibatches=2)), [[[a, c], [b, d]]]),
    }


@pytest.fixture(scope="session")
def workers(
    cases: dict[str, tuple[Config, Updates]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Seen]]:
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(run_worker, args=(folder, cases), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", ["whole", "minibatches"])
def test_two_workers_make_the_update_of_one(
    cases: dict[str, tuple[Config, Updates]], workers: list[dict[str, Seen]], case: str
) -> None:
    alone = run_updates(*cases[case], None)
    for seen in workers:
        for (result, state), (expected, whole) in zip(seen[case], alone, strict=True):
            torch.testing.assert_close(state.gradients, whole.gradients, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(state.parameters, whole.parameters, atol=1e-5, rtol=1e-5)
            assert result.has_updated == expected.has_updated
            assert (state.version, state.num_steps) == (whole.version, whole.num_steps)
            assert result.stats.metrics(1) == pytest.approx(expected.stats.metrics(1))
            assert result.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    ours, theirs = (seen[case][-1][1].parameters for seen in workers)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_no_kept_group_on_any_of_two_workers_moves_nothing(workers: list[dict[str, Seen]]) -> None:
    for seen in workers:
        for (_, before), (result, after) in [list(pairwise(seen["whole"]))[0]]:
            assert not result.has_updated
            assert_nothing_moved(before, after)
        assert [result.has_updated for result, _ in seen["whole"]] == [True, False, True]
