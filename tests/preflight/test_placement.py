"""What each stage asks of Ray, and whether the nodes have it."""

import pytest

from treerpo_ray.config import Config, load
from treerpo_ray.preflight.placement import (
    Node,
    check_places,
    missing_resources,
    needed_resources,
    stages,
)


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


SPREAD = [
    *("engine.resources={CPU: 1}", "engine.num_engines=2"),
    *("learner.resources={CPU: 1}", "verifier.resources={CPU: 1}"),
]
"""Four processes of one CPU each."""


@pytest.mark.parametrize(
    ("overrides", "nodes", "told"),
    [
        (SPREAD, [4.0], None),
        (SPREAD, [2.0, 1.0, 1.0], None),
        (
            SPREAD,
            [1.9, 1.9, 1.9],
            r"^the nodes of the cluster .* 2 x engine\.resources=.*, 1 x l",
        ),
        ([*SPREAD, "engine.resources.CPU=2"], [3.0, 3.0], None),
        ([*SPREAD, "engine.resources.CPU=2"], [2.0, 1.5, 1.5, 1.5], "no way to place 2 x engine"),
        ([*SPREAD, "engine.resources.CPU=3"], [2.0] * 5, r"^engine\.resources=.*: no node has all"),
        ([*SPREAD, "learner.resources.CPU=3"], [2.0] * 5, r"^learner\.resources=.*: no node has "),
        ([*SPREAD, "verifier.resources.CPU=3"], [2.0] * 5, r"^verifier\.resources=.*: no node ha"),
        (
            [*SPREAD, "engine.labels={role: rollout}"],
            [9.0],
            r"labels .*rollout.* \(engine\.lab",
        ),
        (["learner.num_workers=64", "gate.trees_per_step=64"], [1.0] * 40, None),
    ],
)
def test_each_process_of_each_stage_needs_a_node_beside_all_others(overrides, nodes, told) -> None:
    config = load(overrides)
    starting = stages(config, config.engine.num_engines)
    there = [Node({"CPU": cpus}, {}) for cpus in nodes]
    if told is None:
        check_places(starting, there)
        return
    with pytest.raises(ValueError, match=told) as caught:
        check_places(starting, there)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "learner", "gpus", "is_told"),
    [
        (0.4, 0.6, [2], False),  # the engine beside one of the workers
        (0.5, 0.75, [2], True),  # a quarter of each GPU is left
        (0.5, 0.75, [2, 1], False),
        (1, 0.6, [2], True),  # the second worker has none
        (2, 0.6, [3], True),  # both workers on one
        (2, 0.6, [4], False),
        (2, 1, [2, 1, 1], False),
        (2, 1, [1, 1, 1, 1], True),  # the engine's are on one node
        (2, 0, [2], False),
    ],
)
def test_a_part_of_a_gpu_is_of_a_single_one(
    engine: float, learner: float, gpus: list[int], is_told: bool
) -> None:
    shares = [f"engine.resources.GPU={engine}", f"learner.resources.GPU={learner}"]
    config = load([*shares, "learner.num_workers=2", "gate.trees_per_step=4"])
    nodes = [Node({"CPU": 8.0, "GPU": float(count)}, {}) for count in gpus]
    if not is_told:
        check_places(stages(config, 1), nodes)
        return
    with pytest.raises(ValueError, match=r"no way to place|no node has all of that"):
        check_places(stages(config, 1), nodes)


def test_a_role_goes_to_nodes_with_its_labels() -> None:
    config = load([*SPREAD, "engine.labels={role: rollout}"])
    rollout = Node({"CPU": 2.0}, {"role": "rollout", "market": "spot"})
    check_places(stages(config, 2), [rollout, Node({"CPU": 2.0}, {})])
    with pytest.raises(ValueError, match="no way to place"):
        check_places(stages(config, 2), [rollout._replace(resources={"CPU": 1.0}), rollout])


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
