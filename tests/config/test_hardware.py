"""The hardware files: which recipes fit which, planned as `--dry-run` does for a cluster that is
described here, and where the numbers of their heads are from."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.project import PROJECT
from tests.support.qwen import CONFIGS, COUNTS, model
from treerpo_ray.config import Config, load
from treerpo_ray.driver.cluster import Available, Capacity, check_capacity, starting_stages
from treerpo_ray.driver.plan import plan_lines
from treerpo_ray.preflight.inputs import Preflight, preflight
from treerpo_ray.preflight.memory import MemoryPlan, misfit
from treerpo_ray.preflight.model_check import ModelFacts
from treerpo_ray.preflight.pace import Measured, Simulation
from treerpo_ray.preflight.placement import Node, total

HARDWARE = PROJECT / "conf/hardware"
RECIPES = sorted(path.stem for path in (PROJECT / "conf").glob("*qwen*.yaml"))
SMALL_NODE = Node({"GPU": 1.0, "CPU": 16.0}, {})
LARGE_NODE = Node({"GPU": 8.0, "CPU": 96.0}, {})
TRAIN_NODE = Node({"GPU": 1.0, "CPU": 8.0, "train_slot": 1.0, "score_slot": 1.0}, {})
ROLLOUT_NODE = Node({"GPU": 1.0, "CPU": 4.0, "rollout_slot": 1.0}, {"role": "rollout"})
SLOTS = {"rollout_slot": 4.0, "train_slot": 4.0}
CLUSTERS = {
    "one_gpu": (SMALL_NODE,),
    "one_gpu_colocated": (SMALL_NODE,),
    "one_gpu_lora": (SMALL_NODE,),
    "one_gpu_offloaded": (SMALL_NODE,),
    "two_gpus": (Node({"GPU": 2.0, "CPU": 16.0}, {}),),
    "eight_gpus": (Node(LARGE_NODE.resources | SLOTS, {}),),
    "four_by_eight": (LARGE_NODE,) * 4,
    "autoscaled": (TRAIN_NODE, TRAIN_NODE, ROLLOUT_NODE),
}
"""What each file is for."""
TOO_LARGE = (
    r"^learner\.gpu_memory_gib=79: a worker of Qwen/Qwen2\.5-Math-7B needs 1\d\d\.\d GiB, .* raise "
    r"learner\.{workers}=1, train adapters alone by lora\.rank=32, or set learner\.offload=true, "
    r"which needs main memory instead$"
)
REFUSED = {
    ("treerpo_qwen2.5_math_7b", "one_gpu"): TOO_LARGE.format(workers="num_workers"),
    ("treerpo_qwen2.5_math_7b", "one_gpu_colocated"): TOO_LARGE.format(workers="num_workers"),
    ("treerpo_qwen2.5_math_7b", "two_gpus"): TOO_LARGE.format(workers="num_workers"),
    ("treerpo_qwen2.5_math_7b", "autoscaled"): TOO_LARGE.format(workers="min_workers"),
}
"""What does not fit, and what is told of it; every other recipe fits every file."""
NAMED = {
    "0.5b": {"one_gpu"},
    "1.5b": {"autoscaled", "eight_gpus", "one_gpu", "one_gpu_colocated", "two_gpus"},
    "7b": {"eight_gpus", "four_by_eight", "one_gpu_lora", "one_gpu_offloaded"},
}
"""Files that a recipe's head speaks of, by the size of its model."""


def configured(recipe: str, *arguments: str) -> Config:
    return load([str(PROJECT / f"conf/{recipe}.yaml"), *arguments])


def size_of(recipe: str) -> str:
    return next(each for each in CONFIGS if recipe.endswith(each))


def looked_at(config: Config, size: str, folder: Path) -> Preflight:
    """What a start would know with a connection: the model, but not the data."""
    count, sizes = model(size, folder)
    facts = ModelFacts(num_parameters=count, num_embeddings=sizes.vocabulary, sizes=sizes)
    return replace(preflight(config), model=facts, misfit=misfit(config, count, sizes))


def test_every_hardware_file_is_planned_here() -> None:
    assert {path.stem for path in HARDWARE.glob("*.yaml")} == CLUSTERS.keys()


@pytest.mark.usefixtures("without_hub")
@pytest.mark.parametrize("file", CLUSTERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_a_file_or_is_one_line(
    recipe: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # of whose nodes we tell
    size, nodes = size_of(recipe), CLUSTERS[file]
    config = configured(recipe, str(HARDWARE / f"{file}.yaml"))
    assert config.learner.gpu_memory_gib and config.engine.gpu_memory_gib
    found = looked_at(config, size, tmp_path)
    if (told := REFUSED.get((recipe, file))) is not None:
        with pytest.raises(ValueError, match=told) as caught:
            found.check_memory()
        assert "\n" not in str(caught.value)
        return
    found.check_memory()
    resources: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.resources.items():
            resources[name] = resources.get(name, 0.0) + amount
    starting = starting_stages(config, trains=True)
    check_capacity(starting, Capacity(resources=resources, most=None, nodes=nodes))
    there = Available(where="here", resources=resources, nodes=nodes, memory_gib=256.0)
    lines = plan_lines(config, found, lambda config: there)
    assert "missing     nothing" in lines
    assert not [line for line in lines if "take" in line and line.startswith("missing")]
    [head] = [line for line in lines if line.startswith("memory")]
    assert head.startswith("memory      GiB a GPU")
    [sums] = [line.split() for line in lines if line.split()[0] == "together"]
    worker, engine = map(float, sums[1:])
    assert 2 < worker < 79 and 10 < engine < config.engine.gpu_memory_gib
    gpus = total(starting)["GPU"]
    [needs] = [line for line in lines if line.startswith("resources")]
    assert float(re.search(r"GPU ([\d.]+)", needs)[1]) >= gpus  # type: ignore[index]
    own = [line for line in lines if line.startswith("nodes")]
    if file == "four_by_eight":
        assert own == ["nodes       4 with CPU 96, GPU 8"] and gpus == resources["GPU"] == 32
    assert bool(own) == (len(nodes) > 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_head_names_files_that_it_fits(recipe: str, tmp_path: Path) -> None:
    size = size_of(recipe)
    assert misfit(configured(recipe), *model(size, tmp_path)) is None, "as it stands"
    head = (PROJECT / f"conf/{recipe}.yaml").read_text().partition("\nrun:")[0]
    named = set(re.findall(r"conf/hardware/(\w+)\.yaml", head))
    assert named == NAMED[size]
    assert not {(recipe, file) for file in named} & REFUSED.keys()


def test_7b_fits_two_gpus_with_what_the_files_head_says(tmp_path: Path) -> None:
    file = HARDWARE / "two_gpus.yaml"
    settings = re.findall(r"`([^`]+)`", file.read_text())[0].split()
    assert settings == ["learner.shard=true", "learner.offload=true"]
    config = configured("treerpo_qwen2.5_math_7b", str(file), *settings)
    found = model("7b", tmp_path)
    assert misfit(config, *found) is None
    assert round(MemoryPlan.of(config, *found).offloaded) == 128


def test_the_planner_counts_what_was_counted_by_hand(tmp_path: Path) -> None:
    """Weights, gradients, moments, reference model and copies: 20 bytes a parameter on a GPU that
    has the whole model; the first three of them 15 GB on each of eight."""
    for size, gib in (("1.5b", 28.75), ("7b", 141.85)):
        recipe, found = f"treerpo_qwen2.5_math_{size}", model(size, tmp_path)
        assert found[0] == COUNTS[size]
        whole = MemoryPlan.of(configured(recipe, "learner.shard=false"), *found).worker
        passing = ("activations", "CUDA")
        kept = sum(amount for part, amount in whole.items() if part not in passing)
        assert kept == pytest.approx(gib, abs=0.005)
    eight = configured("treerpo_qwen2.5_math_7b", "learner.num_workers=8")
    parts = MemoryPlan.of(eight, *model("7b", tmp_path)).worker
    assert parts["weights"] + parts["gradients and AdamW"] == pytest.approx(15.23e9 / 2**30, 1e-3)


def estimated(tokens_a_second: float, tree_s: float, update_s: float, load_s: float) -> Measured:
    """Of an H100: nothing of it was measured. 128 trees of a trained model on MATH have 2.4 M
    tokens, and are of lognormal sizes."""
    mean, spread = 2.4e6 / 128, 0.4
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - spread**2 / 2, spread, 512)
    return Measured(
        tree_tokens=tuple(drawn.tolist()),
        engine_rate=tokens_a_second,
        tree_s=tree_s,
        update_s=update_s,
        load_s=load_s,
    )


ESTIMATES = {"1.5B": estimated(20_000, 7, 75, 3), "7B": estimated(5_000, 12, 375, 12)}
"""By the size of the model; an update is one worker's, and others divide its time."""
SPLITS = {
    "two_gpus": ("1.5B", [(1, 1, 0), (1, 1, 1)]),
    "eight_gpus": ("7B", [(4, 4, 0), (2, 6, 0)]),
    "four_by_eight": ("7B", [(16, 16, 0), (8, 24, 0), (4, 28, 0), (8, 24, 1), (16, 16, 1)]),
}
"""Workers, engines and staleness of the seconds that a file's head has, in order."""


@pytest.mark.parametrize("file", SPLITS)
def test_the_seconds_of_a_head_are_simulated_and_its_split_is_the_best_of_them(file: str) -> None:
    size, splits = SPLITS[file]
    steps = {}
    for workers, engines, staleness in splits:
        measured = replace(ESTIMATES[size], update_s=ESTIMATES[size].update_s / workers)
        simulation = Simulation(
            measured=measured, num_engines=engines, trees_per_step=128, max_staleness=staleness
        )
        steps[workers, engines, staleness] = simulation.run().step_s
    text = (HARDWARE / f"{file}.yaml").read_text()
    head = text.partition("\nmodel:")[0].replace("\n# ", " ")
    assert f"imulated for {size} " in head and "no GPU has run it" in head
    assert [round(step) for step in steps.values()] == [
        int(seconds) for seconds in re.findall(r"\b(\d+) s\b", head)
    ]
    config = load([str(HARDWARE / f"{file}.yaml"), "gate.trees_per_step=128"])
    own = (config.learner.num_workers, config.engine.num_engines, 0)
    assert steps[own] == min(step for split, step in steps.items() if split[2] == 0)
