"""The learner of one worker: exact gradients, minibatches, checkpoints, refusals."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.learning.learner_runs import (
    DEPTH_TWO,
    FREE,
    State,
    all_wrong,
    assert_nothing_moved,
    make_config,
    make_learner,
    make_record,
    mixed,
    run_updates,
    with_logprobs,
)
from tests.support.learning.step_rows import (
    bernoulli_by_hand,
    gradients,
    plain_model,
    row,
    row_gradients,
)
from tests.support.learning.tiny_models import save_tiny_model
from tests.support.user_files import CREDIT
from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.loss_config import LossConfig, Normalisation
from treerpo_ray.config import load
from treerpo_ray.config.data import MixedConfig
from treerpo_ray.metrics.rows import BY_SET
from treerpo_ray.verifier.verdict import Grade, Verdict

RIGHT = ("cccc", "ccww", "wwww")
"""Verdicts of flat trees; values tell the answers of the second apart alone."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01, "there is a signal"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()


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
    trained = [list(bernoulli_by_hand(record, 0.1)) for record in records]
    assert trained[:2] == [[5, 6, 3, 4], [5, 6]]
    num_trained = sum(
        len(record.tree.steps[index].token_ids)
        for record, indices in zip(records, trained, strict=True)
        for index in indices
    )
    assert result.metrics["tokens/trained"] == num_trained
    num_sampled = sum(record.tree.num_sampled_tokens for record in records)
    assert result.metrics["tokens/trained_share"] == num_trained / num_sampled < 1


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
            elif normalisation is Normalisation.TOKEN_MEAN:
                loss = loss - surrogate.sum() / num_tokens
            else:  # the longest answer of the shape has 5 + 5 tokens
                loss = loss - surrogate.sum() / 10 / 8
    loss.backward()
    assert_same_gradients(state.gradients, gradients(model))


@pytest.mark.parametrize(("shift", "weight", "share"), [(0.25, math.exp(0.25), 0), (1.0, 2.0, 1)])
def test_a_shift_of_the_behaviour_logprobs_is_weighed_up_to_the_cap(
    path: str, shift: float, weight: float, share: float
) -> None:
    model, states, results = plain_model(path), [], []
    for offset in (0.0, shift):
        records = []
        for record in mixed():
            own = [row(model, record, i, 0.7)[0].detach() - offset for i in range(len(DEPTH_TWO))]
            records.append(with_logprobs(record, own))
        [(result, state)] = run_updates(make_config(path, FREE), [[records]], None)
        results.append(result.metrics)
        states.append(state)
    assert results[0]["mismatch/mean"] < 1e-5
    assert results[1]["mismatch/mean"] == pytest.approx(shift, abs=1e-5)
    assert results[1]["importance/mean"] == pytest.approx(weight, abs=1e-4)
    assert results[1]["importance/truncated_share"] == share
    expected = {name: weight * grad for name, grad in states[0].gradients.items()}
    torch.testing.assert_close(states[1].gradients, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_update_tells_what_each_trained_token_had_before_its_first_step(
    path: str, minibatches: int
) -> None:
    config = make_config(path, replace(FREE, minibatches=minibatches, learning_rate=1e-2))
    records = [mixed()[i] for i in (2, 0, 3, 1)]  # not in the order of their tickets
    [(result, _)] = run_updates(config, [[records]], None)
    start = plain_model(path)
    differences = []
    for record, made in zip(records, result.trained.training(), strict=True):
        advantages = np.full(len(record.tree), np.nan)
        by_hand = bernoulli_by_hand(record, 0.1)
        advantages[list(by_hand)] = list(by_hand.values())
        np.testing.assert_allclose(made.advantages, advantages)
        expected = np.full(len(record.tree.token_ids), np.nan, np.float32)
        for index in by_hand:
            first, count = record.tree.starts[index], record.tree.lengths[index]
            with torch.no_grad():
                expected[first : first + count] = row(start, record, index, 0.7)[0].numpy()
        np.testing.assert_allclose(made.logprobs, expected, atol=1e-5)
        differences.append(made.logprobs - record.tree.logprobs)
    mismatch = float(np.nanmean(np.abs(np.concatenate(differences))))
    assert result.metrics["mismatch/mean"] == pytest.approx(mismatch, rel=1e-5)


def test_the_order_in_which_trees_arrive_changes_nothing(path: str) -> None:
    config = make_config(path, replace(FREE, minibatches=2))
    [(_, state)] = run_updates(config, [[mixed()]], None)
    [(_, shuffled)] = run_updates(config, [[[mixed()[i] for i in (2, 0, 3, 1)]]], None)
    torch.testing.assert_close(shuffled.parameters, state.parameters, atol=0, rtol=0)


def test_rewards_are_told_by_data_set_where_several_are_mixed(path: str) -> None:
    names = ("a", "a", "b", "b")
    records = [
        replace(each, prompt_id=f"{name}/{each.prompt_id}")
        for name, each in zip(names, mixed(), strict=True)
    ]
    found = []
    for sets in (("a", "b"), ("a",)):
        config = make_config(path, FREE)
        mix = {name: MixedConfig(path=name, max_prompt_tokens=8) for name in sets}
        config = replace(config, prompts=replace(config.prompts, mix=mix))
        [(result, _)] = run_updates(config, [[records]], None)
        metrics = result.stats.metrics(0)
        found.append({name for name in metrics if name.startswith(BY_SET)})
        values = [mean_backup(record.tree, record.rewards).root for record in records]
        for name, own in (("a", values[:2]), ("b", values[2:])):
            if f"{BY_SET}{name}" in metrics:  # an errored tree has no value
                assert metrics[f"{BY_SET}{name}"] == pytest.approx(np.nanmean(own))
    assert found == [{f"{BY_SET}a", f"{BY_SET}b"}, set()]


def test_an_update_without_a_kept_group_moves_nothing(path: str) -> None:
    config = make_config(path, replace(FREE, warmup_steps=5))
    updates = [[mixed()], [all_wrong(first=4, count=4)]]
    (_, before), (result, after) = run_updates(config, updates, None)
    assert not result.has_updated
    assert result.metrics["tokens/trained_share"] == 0
    assert result.stats.metrics(1)["groups/pruned"] == 12
    assert "loss/total" not in result.metrics
    assert all(np.isnan(own.logprobs).all() for own in result.trained.training())
    assert_nothing_moved(before, after)


def test_two_minibatches_are_two_steps_against_the_logprobs_from_before_the_first(
    path: str, tmp_path: Path
) -> None:
    config = make_config(path, replace(FREE, minibatches=2, learning_rate=1e-2))
    first, second = mixed()[:2], mixed()[2:]
    [(result, state)] = run_updates(config, [[first + second]], None)
    assert state.version == 1
    assert {int(moment) for moment in state.moments if moment.dim() == 0} == {2}

    one = make_learner(replace(config, learner=replace(config.learner, minibatches=1)))
    one.update(first)
    one.write(tmp_path)
    start, moved = plain_model(path), plain_model(tmp_path / "model")
    ratios = [
        torch.ones(len(record.tree.steps[index].token_ids))
        for record in first
        for index in bernoulli_by_hand(record, 0.1)
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
    assert num_clipped > 0
    assert result.metrics["loss/clip_share"] == pytest.approx(num_clipped / len(expected))


def test_only_minibatches_after_the_first_are_passed_before_any_step(path: str) -> None:
    learner = make_learner(make_config(path, replace(FREE, minibatches=2)))
    passes: list[bool] = []
    learner.policy.model.base_model.register_forward_hook(
        lambda *_: passes.append(torch.is_grad_enabled())
    )
    first, second = map(len, learner.update(mixed()).trained.minibatches)
    assert passes == [False] * second + [True] * (first + second)


def test_a_minibatch_without_a_kept_group_makes_no_step(path: str) -> None:
    config = make_config(path, replace(FREE, minibatches=2))
    records = [*mixed()[:2], *all_wrong(first=2, count=2)]
    [(result, state)] = run_updates(config, [[records]], None)
    assert result.has_updated
    assert (state.version, state.num_steps) == (1, 1)


def test_the_learning_rate_rises_over_the_warm_up_and_the_rate_used_is_reported(path: str) -> None:
    config = make_config(path, replace(FREE, warmup_steps=3))
    seen = run_updates(config, [[mixed(version=k)] for k in range(5)], None)
    rates = [result.metrics["learner/learning_rate"] for result, _ in seen]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    start, first = plain_model(path).state_dict(), seen[0][1].parameters
    largest = max(float((first[name] - start[name]).abs().max()) for name in first)
    assert largest == pytest.approx(rates[0], rel=0.02), "Adam's first step is as long as the rate"


def test_the_learning_rate_falls_linearly_to_what_is_left_of_it_at_the_end(path: str) -> None:
    config = make_config(path, replace(FREE, warmup_steps=1, final_rate=0.2))
    learner = make_learner(config)
    rates = []
    for k, progress in enumerate((0.0, 0.25, 0.5, 1.0)):
        before = {n: p.detach().clone() for n, p in learner.policy.model.named_parameters()}
        metrics = learner.update(mixed(version=k), progress).metrics
        rates.append(metrics["learner/learning_rate"])
        assert learner.optimizer.adamw.param_groups[0]["lr"] == rates[-1]
        moved = learner.policy.model.named_parameters()
        assert any(not torch.equal(p, before[name]) for name, p in moved)
    assert rates == pytest.approx([0.5e-3, 0.8e-3, 0.6e-3, 0.2e-3])


@pytest.mark.parametrize("other", [{"foreach": False}, {"foreach": True}])
def test_the_fused_optimizer_steps_as_the_others_do(path: str, other: dict[str, bool]) -> None:
    learner = make_learner(make_config(path, FREE))
    assert learner.optimizer.adamw.defaults["fused"]
    trained = list(learner.policy.model.parameters())
    copies = [parameter.detach().clone() for parameter in trained]
    decay = FREE.weight_decay
    plain = torch.optim.AdamW(copies, lr=FREE.learning_rate, weight_decay=decay, **other)
    for k in range(3):
        learner.update(mixed(version=k))
        for copy, parameter in zip(copies, trained, strict=True):
            copy.grad = parameter.grad.clone()
        plain.step()
        found = [parameter.detach() for parameter in trained]
        torch.testing.assert_close(found, copies, atol=1e-8, rtol=1e-6)


# Checkpoints -----------------------------------------------------------------------------------


def test_a_resumed_learner_goes_on_bitwise_as_if_nothing_had_happened(
    path: str, tmp_path: Path
) -> None:
    config = make_config(path, replace(FREE, warmup_steps=5))
    learner = make_learner(config)
    for k in range(2):
        learner.update(mixed(first=4 * k))
    learner.write(tmp_path)
    resumed = make_learner(config, tmp_path)
    assert_nothing_moved(State.of(learner), State.of(resumed))

    on, again = (one.update(mixed(first=8, version=2)) for one in (learner, resumed))
    assert_nothing_moved(State.of(learner), State.of(resumed))
    for ours, theirs in zip(again.trained.training(), on.trained.training(), strict=True):
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
    assert replace(again, trained=on.trained) == on
    assert resumed.version == 3
    assert again.metrics["learner/learning_rate"] == pytest.approx(3 / 6 * 1e-3)


def test_the_past_baseline_is_the_mean_root_value_of_the_steps_before_also_after_a_resume(
    path: str, tmp_path: Path
) -> None:
    """A right answer is worth 1, a wrong one 0; the trees have one answer each."""
    batches = [
        [make_record(4 * k + i, letter, parents=(-1,)) for i, letter in enumerate(letters)]
        for k, letters in enumerate(("cwww", "ccww", "cccc"))
    ]
    config = make_config(
        path, replace(FREE, advantage=AdvantageForm.PAST_BASELINE, prune_threshold=-1), None, 3
    )
    learner = make_learner(config)
    found = [learner.update(batch).metrics["learner/baseline"] for batch in batches[:2]]
    learner.write(tmp_path)
    found.append(make_learner(config, tmp_path).update(batches[2]).metrics["learner/baseline"])
    assert found == [0, 1 / 4, (1 / 4 + 2 / 4) / 2]


def test_a_shrunk_baseline_is_measured_on_the_steps_before_also_after_a_resume(
    path: str, tmp_path: Path
) -> None:
    """Trees of two answers each, from the second step on measured against the past.

    The first step says 1/2. The trees of the second have 1, 1/2, 1/2 and 0 as their values: s^2 is
    0, 1/2, 1/2 and 0, the squares less s^2 / 2 come to 1/4 - 1/4 - 1/4 + 1/4: no correlation. Those
    of the third have 1, 1, 0 and 1/2, against 1/2: 3/4 - 1/4 = 1/2 beside 1/2 more, and 3/2 in all.
    """
    batches = [
        [make_record(4 * k + i, pair, parents=(-1, -1), version=k) for i, pair in enumerate(pairs)]
        for k, pairs in enumerate((("cw", "cc", "ww", "cw"),) * 2 + (("cc", "cc", "ww", "cw"),) * 2)
    ]
    free = replace(FREE, advantage=AdvantageForm.SHRUNK_BASELINE, prune_threshold=-1)
    config = make_config(path, replace(free, baseline_share=0.3), None, 3)
    learner = make_learner(config)
    results = [learner.update(batch) for batch in batches[:3]]
    learner.write(tmp_path)
    resumed = make_learner(config, tmp_path)
    assert resumed.baseline == learner.baseline
    results.append(resumed.update(batches[3]))
    named = {"learner/baseline", "learner/correlation_depth_1"}
    found = [{name: r.metrics[name] for name in named & r.metrics.keys()} for r in results]
    past = {"learner/baseline": 1 / 2}
    assert found[:3] == [{"learner/baseline": 0}, past, past | {"learner/correlation_depth_1": 0}]
    assert found[3] == pytest.approx(
        {"learner/baseline": (1 / 2 + 1 / 2 + 5 / 8) / 3, "learner/correlation_depth_1": 1 / 4}
    )
    # The others' mean weighs 1/4 of 1, the past's 13/24 the rest, and 0.3 of that is taken off.
    expected = 1 - 0.3 * (1 / 4 + 3 / 4 * 13 / 24)
    np.testing.assert_allclose(results[3].trained.advantages[0], expected)


def test_right_answers_are_trained_by_their_lengths_too_in_units_of_the_longest(path: str) -> None:
    """A weight of 1/2 with 5 + 5 tokens at most: a token costs 0.05."""
    records = [make_record(k, verdicts, parents=(-1,) * 4) for k, verdicts in enumerate(RIGHT)]
    learner = make_learner(make_config(path, replace(FREE, length_weight=0.5)))
    trained, stats = learner.prepare(records)
    assert stats.groups == {"kept": 2, "kept_depth_1": 2, "pruned": 1, "pruned_depth_1": 1}
    for record, verdicts, found in zip(records, RIGHT, trained.advantages, strict=True):
        lengths, expected = record.tree.lengths.tolist(), np.full(4, np.nan)
        right = [place for place, letter in enumerate(verdicts) if letter == "c"]
        if verdicts == "ccww":
            expected[:] = [2, 2, -2, -2]  # over the Bernoulli variance of 1/4
        elif right:
            expected[:] = 0
        for place in right:
            others = [lengths[other] for other in right if other != place]
            expected[place] -= 0.05 * (lengths[place] - sum(others) / len(others))
        np.testing.assert_allclose(found, expected)
    lengths = records[0].tree.lengths
    assert learner.update(records).metrics["tokens/trained"] == sum(
        int(record.tree.lengths.sum()) for record in records[:2]
    )
    assert len(set(lengths.tolist())) > 1


def test_a_resumed_learner_takes_rate_and_decay_from_its_configuration(
    path: str, tmp_path: Path
) -> None:
    learner = make_learner(make_config(path, replace(FREE, warmup_steps=3)))
    learner.update(mixed())
    learner.write(tmp_path)
    changed = replace(FREE, warmup_steps=3, learning_rate=8e-3, weight_decay=0.5)
    resumed = make_learner(make_config(path, changed), tmp_path)
    assert resumed.optimizer.adamw.param_groups[0]["weight_decay"] == 0.5
    assert State.of(resumed).moments, "they are the checkpoint's"
    rates = [resumed.update(mixed(version=k)).metrics["learner/learning_rate"] for k in (1, 2, 3)]
    assert rates == pytest.approx([4e-3, 6e-3, 8e-3]), "the warm-up goes on where it was"


def test_the_kl_is_to_the_model_that_the_run_started_from(path: str, tmp_path: Path) -> None:
    config = make_config(path, FREE, LossConfig(kl_coef=0.1))
    learner = make_learner(config)
    assert learner.update(mixed()).metrics["loss/kl"] == pytest.approx(0, abs=1e-9)
    learner.write(tmp_path)
    found = make_learner(config, tmp_path).update(mixed(first=4)).metrics

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


def test_the_reference_has_the_weights_of_the_type_that_is_computed_in(path: str) -> None:
    found, ids = {}, list(range(3, 23))
    for dtype in ("float32", "bfloat16"):
        checkpointed = replace(FREE, gradient_checkpointing=True)
        config = make_config(path, checkpointed, LossConfig(kl_coef=0.1))
        learner = make_learner(replace(config, model=replace(config.model, dtype=dtype)))
        policy, reference = learner.policy, learner.optimizer.reference
        assert reference is not None and policy.model.dtype == torch.float32
        assert reference.model.dtype == getattr(torch, dtype)
        first, other = (model.model.model.layers[0].forward for model in (policy, reference))
        assert isinstance(first, partial) and not isinstance(other, partial), "it computes once"
        difference = policy.sequence_logprobs(ids) - reference.sequence_logprobs(ids)
        assert float(difference.abs().max()) < 0.2
        found[dtype] = learner.update(mixed()).metrics["loss/kl"]
    assert found["float32"] == pytest.approx(0, abs=1e-9)
    assert 0 < found["bfloat16"] < 1e-2, "rounding alone"


def test_cudnn_computes_no_attention_once_there_is_a_policy(path: str) -> None:
    """It is never chosen on a CPU: what is looked at is the switch that a GPU reads."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_learner(make_config(path, FREE))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# Refusals --------------------------------------------------------------------------------------


def test_a_tree_staler_than_allowed_is_an_error(path: str) -> None:
    learner = make_learner(make_config(path, FREE, max_staleness=1))
    for _ in range(2):
        assert learner.update(mixed()).has_updated, "0 and 1 versions behind"
    before = State.of(learner)
    with pytest.raises(RuntimeError, match=r"2 versions behind .* gate\.max_staleness is 1"):
        learner.update([*mixed(version=2)[:3], make_record(3, "cwwww", version=0)])
    assert_nothing_moved(before, State.of(learner))


def test_a_tree_of_a_version_that_the_learner_does_not_have_is_an_error(path: str) -> None:
    learner = make_learner(make_config(path, FREE))
    before = State.of(learner)
    with pytest.raises(RuntimeError, match=r"tokens of version 1, but the learner is at version 0"):
        learner.update([*mixed()[:3], make_record(3, "cwwww", version=1)])
    assert_nothing_moved(before, State.of(learner))


def test_a_gradient_that_is_not_finite_is_an_error_before_anything_moves(path: str) -> None:
    learner = make_learner(make_config(path, FREE))
    before = State.of(learner)
    *sound, last = mixed()
    unknown = [torch.full((len(step.token_ids),), math.nan) for step in last.tree.steps]
    with pytest.raises(RuntimeError, match="non-finite"):
        learner.update([*sound, with_logprobs(last, unknown)])
    assert_nothing_moved(before, State.of(learner))


def test_a_form_and_a_rule_of_the_users_make_the_same_update_as_those_of_the_package(
    path: str, tmp_path: Path
) -> None:
    """From a file whose source travels: it is not there any more when the learner is made."""
    file = tmp_path / "own.py"
    file.write_text(CREDIT)
    for own, builtin in (
        (("scaled", "spread"), replace(FREE, prune_threshold=0.1)),
        (
            ("over_baseline", "spread"),
            replace(FREE, advantage=AdvantageForm.PAST_BASELINE, prune_threshold=-1.0),
        ),
    ):
        file.write_text(CREDIT)
        named = [
            f"learner.{k}={file}:{v}" for k, v in zip(("advantage", "prune"), own, strict=True)
        ]
        loaded = load(named).learner
        file.unlink()
        ours = replace(
            builtin, advantage=loaded.advantage, prune=loaded.prune, sources=loaded.sources
        )
        batches = [[mixed()], [mixed(first=4, version=1)]]
        found, expected = (
            run_updates(make_config(path, each), batches, None) for each in (ours, builtin)
        )
        for (result, state), (other, right) in zip(found, expected, strict=True):
            torch.testing.assert_close(state.gradients, right.gradients, atol=0, rtol=0)
            ignored = "groups/advantage_se"  # of a form that gives no errors there are none
            assert result.metrics == other.metrics
            metrics = other.stats.metrics(1)
            assert ignored in metrics
            metrics.pop(ignored)
            assert result.stats.metrics(1) == metrics


def test_partial_credit_is_trained_with_the_advantages_by_hand(path: str) -> None:
    """One step group with the rewards .12, .28 and .8: A = -7/6, -1/2 and 5/3 (mean .4)."""
    grades = [Grade(Verdict.PARTIAL, reward) for reward in (0.12, 0.28, 0.8)]
    record = make_record(0, "www", parents=(-1,) * 3).graded(grades)
    others = [make_record(n, "www", parents=(-1,) * 3) for n in (1, 2, 3)]
    config = make_config(path, FREE, LossConfig(importance_cap=None))
    [(_, state)] = run_updates(config, [[[record, *others]]], None)
    model = plain_model(path)
    loss = torch.zeros(())
    num_tokens = record.tree.num_sampled_tokens
    for index, advantage in enumerate((-7 / 6, -1 / 2, 5 / 3)):
        logprobs, _ = row(model, record, index, 0.7)
        loss = loss - ((logprobs - logprobs.detach()).exp() * advantage).sum() / num_tokens
    loss.backward()
    assert_same_gradients(state.gradients, gradients(model))
