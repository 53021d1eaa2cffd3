"""Sharded learners of 1, 2 and 4 workers, in processes of their own, make the updates of a whole
one."""

from dataclasses import replace

import pytest
import torch

from tests.support.learning.learner_runs import FREE, all_wrong, make_config, mixed
from tests.support.learning.sharded_workers import Case, Found, run_case, run_workers
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.algo.loss_config import LossConfig

SHARDED = replace(FREE, shard=True)
WORKERS = (4, 2, 1)


def eight(*, first: int, version: int = 0) -> list:
    """Eight trees, each with a kept group."""
    return [*mixed(first=first, version=version), *mixed(first=first + 4, version=version)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    tied = save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")
    untied = save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")
    nothing = all_wrong(first=8, count=8)
    one_idle = [*mixed(first=16)[:3], *all_wrong(first=19, count=5)]
    all_of_it = replace(
        SHARDED,
        minibatches=2,
        clip_grad_norm=0.5,
        gradient_checkpointing=True,
        offload=True,
        warmup_steps=5,
    )
    config = make_config(tied, SHARDED)
    return {
        "tied": Case(config=config, batches=[eight(first=0), nothing, one_idle]),
        "untied": Case(
            config=make_config(untied, all_of_it, LossConfig(kl_coef=0.1, entropy_coef=0.01)),
            batches=[eight(first=0), eight(first=8)],
        ),
        "bfloat16": Case(
            config=replace(config, model=replace(config.model, dtype="bfloat16")),
            batches=[eight(first=0)],
        ),
    }


@pytest.fixture(scope="module")
def found(
    cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Found]]]:
    folder = tmp_path_factory.mktemp("sharded")
    return {count: run_workers(count, folder / f"{count}", cases) for count in WORKERS}


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case]) -> dict[str, Found]:
    return {name: run_case(case.whole()) for name, case in cases.items()}


@pytest.mark.parametrize("count", WORKERS)
@pytest.mark.parametrize("case", ["tied", "untied"])
def test_the_update_is_that_of_a_learner_with_the_whole_model(
    found: dict[int, list[dict[str, Found]]], alone: dict[str, Found], case: str, count: int
) -> None:
    expected = alone[case]
    for seen in found[count]:
        for state, whole in zip(seen[case].states, expected.states, strict=True):
            torch.testing.assert_close(state.gradients, whole.gradients, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(state.parameters, whole.parameters, atol=1e-5, rtol=1e-5)
            assert (state.version, state.num_steps) == (whole.version, whole.num_steps)
        for metrics, others in zip(seen[case].metrics, expected.metrics, strict=True):
            assert metrics == pytest.approx(others, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("count", WORKERS)
def test_each_worker_keeps_its_part(found: dict[int, list[dict[str, Found]]], count: int) -> None:
    shares = [seen["tied"].local_share for seen in found[count]]
    assert sum(shares) == pytest.approx(1) and max(shares) < 1.1 / count


@pytest.mark.parametrize("count", WORKERS)
def test_in_bfloat16_the_weights_stay_float32(
    found: dict[int, list[dict[str, Found]]], alone: dict[str, Found], count: int
) -> None:
    [state] = found[count][0]["bfloat16"].states
    assert {each.dtype for each in [*state.parameters.values(), *state.moments]} == {torch.float32}
    exact, ours, autocast = (
        torch.cat([gradient.flatten() for gradient in own.gradients.values()])
        for own in (alone["tied"].states[0], state, alone["bfloat16"].states[0])
    )
    off, others_off = (float((own - exact).norm() / exact.norm()) for own in (ours, autocast))
    assert 0 < off < 0.05 and off < 2 * others_off
