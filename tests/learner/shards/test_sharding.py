"""Sharded learners of 1, 2 and 4 workers, in processes of their own, make the updates of a whole
one, publish its weights, and go on from each other's checkpoints."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.learning.learner_runs import (
    FREE,
    State,
    all_wrong,
    make_config,
    make_learner,
    mixed,
)
from tests.support.learning.sharded_workers import PROBE, Case, Found, run_case, run_workers
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.learner.adapters.lora import ADAPTER_FILE
from treerpo_ray.learner.learner import MOMENTS_FOLDER
from treerpo_ray.learner.policy import load_policy
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.checkpoints import name_of
from treerpo_ray.run_folder.files import ADAPTER_FOLDER, MODEL_FOLDER

SHARDED = replace(FREE, shard=True)
WORKERS = (4, 2, 1)


def eight(first: int, *, version: int = 0) -> list[TreeRecord]:
    """Eight trees, each with a kept group."""
    return [*mixed(first=first, version=version), *mixed(first=first + 4, version=version)]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What was found by a learner with the whole model, and by so many workers."""

    alone: dict[str, Found]
    workers: dict[int, list[dict[str, Found]]]
    adapters: Case
    resumed: Case
    """One update more after those of the case `untied`."""
    folder: Path
    """Run folders lie in it: `from-4`, `from-2` and `from-1`."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    tied = save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")
    untied = save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")
    folder = tmp_path_factory.mktemp("sharded")
    all_of_it = replace(
        SHARDED,
        minibatches=2,
        clip_grad_norm=0.5,
        gradient_checkpointing=True,
        offload=True,
        warmup_steps=5,
    )
    plain = make_config(tied, SHARDED)
    nothing = all_wrong(first=8, count=8)
    one_idle = [*mixed(first=16)[:3], *all_wrong(first=19, count=5)]
    cases = {
        "tied": Case(config=plain, batches=[eight(first=0), nothing, one_idle]),
        "untied": Case(
            config=make_config(untied, all_of_it, LossConfig(kl_coef=0.1, entropy_coef=0.01)),
            batches=[eight(first=0), eight(first=8)],
        ),
        "adapters": Case(
            config=replace(
                make_config(untied, all_of_it, LossConfig(kl_coef=0.1)), lora=LoraConfig(rank=3)
            ),
            batches=[eight(first=0), eight(first=8)],
        ),
        "bfloat16": Case(
            config=replace(plain, model=replace(plain.model, dtype="bfloat16")),
            batches=[eight(first=0)],
        ),
    }
    after = [eight(first=16, version=2)]
    alone = {name: run_case(case.whole()) for name, case in cases.items()}
    untied_case = cases["untied"]
    resumed = replace(untied_case, batches=after)
    alone["resumed"] = run_case(
        replace(untied_case, batches=[*untied_case.batches, *after]).whole()
    )
    more = replace(cases["adapters"], batches=[*cases["adapters"].batches, *after])
    alone["adapters, one more"] = run_case(more.whole())
    run_case(replace(untied_case.whole(), end=folder / "whole"))
    workers = {}
    for count in WORKERS:
        own = dict(cases)
        fault = "full" if count > 1 else ""
        own["untied"] = replace(untied_case, end=folder / f"from-{count}", fault=fault)
        own["adapters"] = replace(cases["adapters"], end=folder / f"adapters-{count}")
        if count < 4:
            own["resumed"] = replace(resumed, start=folder / "from-4" / name_of(1))
        if count == 2:
            own["from_whole"] = replace(resumed, start=folder / "whole" / name_of(1))
            own["apart"] = replace(own["resumed"], end=Path("apart"))
            own["killed"] = replace(cases["bfloat16"], end=folder / "killed", fault="killed")
        workers[count] = run_workers(count, folder / f"{count}", own)
    return Runs(
        alone=alone, workers=workers, adapters=cases["adapters"], resumed=resumed, folder=folder
    )


def assert_near(state: State, expected: State) -> None:
    torch.testing.assert_close(state.gradients, expected.gradients, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.parameters, expected.parameters, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.moments, expected.moments, atol=1e-5, rtol=1e-4)
    assert (state.version, state.num_steps) == (expected.version, expected.num_steps)


@pytest.mark.parametrize("count", WORKERS)
@pytest.mark.parametrize("case", ["tied", "untied", "adapters"])
def test_the_update_is_that_of_a_learner_with_the_whole_model(
    runs: Runs, case: str, count: int
) -> None:
    expected = runs.alone[case]
    for seen in runs.workers[count]:
        for state, whole in zip(seen[case].states, expected.states, strict=True):
            assert_near(state, whole)
        for metrics, others in zip(seen[case].metrics, expected.metrics, strict=True):
            assert metrics == pytest.approx(others, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("count", WORKERS)
def test_each_worker_keeps_its_part(runs: Runs, count: int) -> None:
    shares = [seen["tied"].local_share for seen in runs.workers[count]]
    assert sum(shares) == pytest.approx(1) and max(shares) < 1.1 / count


@pytest.mark.parametrize("count", WORKERS)
def test_in_bfloat16_the_weights_stay_float32(runs: Runs, count: int) -> None:
    [state] = runs.workers[count][0]["bfloat16"].states
    assert {each.dtype for each in [*state.parameters.values(), *state.moments]} == {torch.float32}
    exact, ours, autocast = (
        torch.cat([gradient.flatten() for gradient in own.gradients.values()])
        for own in (runs.alone["tied"].states[0], state, runs.alone["bfloat16"].states[0])
    )
    off, others_off = (float((own - exact).norm() / exact.norm()) for own in (ours, autocast))
    assert 0 < off < 0.05 and off < 2 * others_off


@pytest.mark.parametrize("count", WORKERS)
@pytest.mark.parametrize("case", ["tied", "untied"])
def test_the_first_worker_publishes_all_weights(runs: Runs, case: str, count: int) -> None:
    seen, expected = runs.workers[count][0][case], runs.alone[case]
    assert list(seen.weights) == list(expected.weights)
    torch.testing.assert_close(seen.weights, seen.states[-1].parameters, atol=0, rtol=0)
    torch.testing.assert_close(seen.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", WORKERS)
def test_the_exported_model_and_that_of_a_checkpoint_are_the_published_one(
    runs: Runs, count: int
) -> None:
    run = runs.folder / f"from-{count}"
    published = runs.workers[count][0]["untied"].weights
    for folder in (run, run / name_of(1)):
        policy = load_policy(
            str(folder / MODEL_FOLDER),
            dtype=torch.float32,
            device=torch.device("cpu"),
            gradient_checkpointing=False,
        )
        torch.testing.assert_close(dict(policy.named_weights()), published, atol=0, rtol=0)
        assert policy.tokenizer.convert_ids_to_tokens([0, 25]) == ["a", "z"]


@pytest.mark.parametrize("count", WORKERS)
def test_adapters_that_are_sharded_are_exported_whole_and_resume_without_shards(
    runs: Runs, count: int
) -> None:
    run, seen = runs.folder / f"adapters-{count}", runs.workers[count][0]["adapters"]
    policy = load_policy(
        str(run / MODEL_FOLDER),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    torch.testing.assert_close(policy.sequence_logprobs(PROBE), seen.logprobs, atol=1e-4, rtol=1e-4)
    for folder in (run / MODEL_FOLDER, run / name_of(1)):
        stored = load_file(folder / ADAPTER_FOLDER / ADAPTER_FILE)
        torch.testing.assert_close(stored, seen.weights, atol=0, rtol=0)
    case = replace(runs.adapters.whole(), start=run / name_of(1), batches=[eight(16, version=2)])
    assert_near(run_case(case).states[0], runs.alone["adapters, one more"].states[-1])


@pytest.mark.parametrize("count", [2, 1])
def test_a_checkpoint_of_four_workers_resumes_on_fewer(runs: Runs, count: int) -> None:
    for seen in runs.workers[count]:
        assert_near(seen["resumed"].states[0], runs.alone["resumed"].states[-1])


@pytest.mark.parametrize("count", WORKERS)
def test_their_checkpoints_resume_with_the_whole_model(runs: Runs, count: int) -> None:
    start = runs.folder / f"from-{count}" / name_of(1)
    found = run_case(replace(runs.resumed.whole(), start=start))
    assert_near(found.states[0], runs.alone["resumed"].states[-1])


def test_a_checkpoint_with_the_whole_model_resumes_on_two_workers(runs: Runs) -> None:
    for seen in runs.workers[2]:
        assert_near(seen["from_whole"].states[0], runs.alone["resumed"].states[-1])


def test_a_disk_that_is_full_for_any_worker_is_waited_for(runs: Runs) -> None:
    for count in (4, 2):
        told = runs.workers[count][0]["untied"].told
        assert told.pop(1).startswith("checkpoint of step 1 waits: the disk ")
        assert told == [
            *("refused: write_data", "refused: save_file"),
            *("checkpoint of step 1 is written", "placed"),
        ]
        checkpoint = runs.folder / f"from-{count}" / name_of(1)
        assert len(list((checkpoint / MOMENTS_FOLDER).iterdir())) == count
    assert runs.workers[1][0]["untied"].told == ["placed"]


def test_what_a_worker_on_another_machine_wrote_comes_to_the_first(runs: Runs) -> None:
    left = runs.workers[2][0]["apart"].states[-1]
    start = runs.folder / "2" / "home-0" / "apart" / name_of(1)
    assert len(list((start / MOMENTS_FOLDER).iterdir())) == 2
    assert not list((runs.folder / "2" / "home-1").iterdir())
    state = State.of(make_learner(runs.resumed.whole().config, start))
    torch.testing.assert_close(state.parameters, left.parameters, atol=0, rtol=0)
    torch.testing.assert_close(state.moments, left.moments, atol=0, rtol=0)


@pytest.mark.parametrize(("count", "expected"), [(4, [0, 0, 2, 2]), (2, [0, 1]), (1, [0])])
def test_one_worker_of_each_machine_opens_what_all_of_it_read(
    runs: Runs, count: int, expected: list[int]
) -> None:
    for rank in range(count):
        assert torch.load(runs.folder / f"{count}" / f"opened-{rank}.pt") == expected


def test_a_worker_that_is_killed_as_it_writes_leaves_no_checkpoint(runs: Runs) -> None:
    assert list((runs.folder / "killed" / "checkpoints").iterdir()) == []
