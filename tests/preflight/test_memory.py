"""What a run takes of its GPUs: counted by hand, measured, and refused where it does not fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.support.project import PROJECT, load_script
from tests.support.qwen import CONFIGS, COUNTS, model
from treerpo_ray.config import Config, load
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.preflight.machine import GIB, check_gpus
from treerpo_ray.preflight.memory import (
    MemoryPlan,
    misfit,
    needs_more_memory,
    number,
)
from treerpo_ray.preflight.model_sizes import ModelSizes, cache_bytes_a_token


def recipe(name: str, *arguments: str) -> Config:
    return load([str(PROJECT / f"conf/{name}.yaml"), *arguments])


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_parts_of_a_recipe_are_those_counted_by_hand(size: str, tmp_path: Path) -> None:
    count, sizes = model(size, tmp_path)
    assert count == COUNTS[size]
    config = recipe(f"treerpo_qwen2.5_math_{size}", "learner.shard=false")
    plan = MemoryPlan.of(config, count, sizes)
    counted = {"weights": 4, "gradients and AdamW": 12, "reference model": 2}
    counted["copies in bfloat16"] = 2
    assert {part: plan.worker[part] for part in counted} == pytest.approx(
        {part: factor * count / GIB for part, factor in counted.items()}
    )
    # Keys and values of 28 layers, in bfloat16: 2 heads of 128, or 2 of 4 on each of two GPUs.
    assert cache_bytes_a_token(config, sizes) == 2 * 2 * 28 * 2 * 128
    # The entries of all layers alone, float32, and all that the engine may take.
    entries = 4 * 28 * sizes.hidden * config.learner.token_budget / GIB
    assert entries < plan.worker["activations"] < 6 * entries
    gpu = config.engine.gpu_memory_gib
    assert sum(plan.engine.values()) == pytest.approx(0.85 * gpu)


def test_an_engine_in_fp8_has_a_byte_of_each_weight_of_its_layers(tmp_path: Path) -> None:
    count, sizes = model("7b", tmp_path)
    fp8 = ["engine.quantization=fp8", "sync.probe_tolerance=0.5", "loss.importance_cap=2"]
    config = recipe("treerpo_qwen2.5_math_7b", *fp8)
    ends = 2 * 152_064 * 3584  # embedding and head, in bfloat16 as before
    parts = MemoryPlan.of(config, count, sizes).engine
    assert parts["weights"] == pytest.approx((count - ends + 2 * ends) / 2 / GIB)
    assert MemoryPlan.of(config, 7e9, None).engine["weights"] == pytest.approx(3.5e9 / GIB)


def test_the_line_for_fp8_in_the_file_for_eight_gpus_leaves_more_for_the_cache(
    tmp_path: Path,
) -> None:
    file = PROJECT / "conf/hardware/eight_gpus.yaml"
    [said] = re.findall(r"^#   (engine\.quantization=fp8 .*)", file.read_text(), re.MULTILINE)
    found = model("7b", tmp_path)
    name = "treerpo_qwen2.5_math_7b"
    plain, fp8 = (recipe(name, str(file), *each) for each in ([], said.split()))
    assert misfit(fp8, *found) is None
    caches = [MemoryPlan.of(config, *found).engine["KV cache"] for config in (plain, fp8)]
    assert caches[1] - caches[0] == pytest.approx((COUNTS["7b"] - 2 * 152_064 * 3584) / GIB)


def test_of_adapters_a_worker_holds_gradients_and_moments_and_of_the_model_its_weights(
    tmp_path: Path,
) -> None:
    count, sizes = model("7b", tmp_path)
    rank, layers, hidden, inner, keys = 32, 28, 3584, 18_944, 4 * 128
    ins_and_outs = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)
    adapted = rank * layers * ins_and_outs
    lora = [f"lora.rank={rank}", "learner.shard=false"]
    config = recipe("treerpo_qwen2.5_math_7b", *lora)
    plan = MemoryPlan.of(config, count, replace(sizes, num_adapted=adapted))
    counted = {"weights": 2 * count + 4 * adapted, "gradients and AdamW": 12 * adapted}
    counted["copies in bfloat16"] = 2 * adapted
    assert {part: plan.worker[part] for part in counted} == pytest.approx(
        {part: size / GIB for part, size in counted.items()}
    )
    assert "reference model" not in plan.worker, "it is the model itself"
    by_name = MemoryPlan.of(config, count, None).worker
    assert not {"gradients and AdamW", "copies in bfloat16"} & by_name.keys(), "nothing told as 0"
    assert plan.engine["weights"] == pytest.approx((2 * count + 4 * adapted) / 2 / GIB)
    file = PROJECT / "conf/hardware/one_gpu_lora.yaml"
    on_one = recipe("treerpo_qwen2.5_math_7b", str(file))
    assert on_one.lora.rank == rank
    assert misfit(on_one, count, replace(sizes, num_adapted=adapted)) is None
    assert misfit(replace(on_one, lora=LoraConfig()), count, sizes) is not None


def test_the_small_recipe_fits_the_smaller_gpu_that_its_head_speaks_of(tmp_path: Path) -> None:
    name = "gsm8k_qwen2.5_0.5b"
    head = (PROJECT / f"conf/{name}.yaml").read_text()
    [said] = re.findall(r"24 GB is enough: (.*)", head)
    config = recipe(name, ONE_GPU, *said.split())
    assert config.learner.gpu_memory_gib == config.engine.gpu_memory_gib == 22
    assert misfit(config, *model("0.5b", tmp_path)) is None
    assert misfit(recipe(name, ONE_GPU, *said.split()[:2]), *model("0.5b", tmp_path)) is not None


@pytest.mark.parametrize(
    ("file", "overrides", "fixed", "advice"),
    [
        (
            "eight_gpus",
            ["learner.shard=false"],
            r"14\d\.\d",
            r"set learner\.shard=true, and learner",
        ),
        (
            "autoscaled",
            [],
            r"13\d\.\d",
            r"raise learner\.min_workers=1, .* or set learner\.offload=true",
        ),
        (
            "one_gpu",
            [],
            r"13\d\.\d",
            r"raise learner\.num_workers=1, .* or set learner\.offload=true",
        ),
    ],
)
def test_a_model_whose_optimizer_is_too_large_is_refused_with_the_reason(
    file: str, overrides: list[str], fixed: str, advice: str, tmp_path: Path
) -> None:
    hardware = str(PROJECT / f"conf/hardware/{file}.yaml")
    config = recipe("treerpo_qwen2.5_math_7b", hardware, *overrides)
    found = model("7b", tmp_path)
    told = r"^learner\.gpu_memory_gib=79: a worker of Qwen/Qwen2\.5-Math-7B needs 1\d\d\.\d GiB, "
    assert re.match(f"{told}{fixed} of them .* {advice}", misfit(config, *found))
    assert re.search(advice, misfit(config, 7e9, None)), "without a connection"


def test_the_elastic_file_fits_7b_with_as_many_workers_as_it_says(tmp_path: Path) -> None:
    file = PROJECT / "conf/hardware/autoscaled.yaml"
    [(fewest, most)] = re.findall(r"7B: (\d) of (\d)$", file.read_text(), re.MULTILINE)
    workers = [f"learner.min_workers={fewest}", f"learner.num_workers={most}"]
    config = recipe("treerpo_qwen2.5_math_7b", str(file), *workers)
    assert misfit(config, *model("7b", tmp_path)) is None


def test_a_sharded_worker_has_its_part_and_what_is_gathered(tmp_path: Path) -> None:
    count, sizes = model("7b", tmp_path)
    parts = MemoryPlan.of(recipe("treerpo_qwen2.5_math_7b"), count, sizes).worker
    counted = {"weights": 4, "gradients and AdamW": 12, "reference model": 2}
    assert {part: parts[part] for part in counted} == pytest.approx(
        {part: factor * count / 4 / GIB for part, factor in counted.items()}
    )
    layer = 2 * 3584 * (3584 + 512) + 3 * 3584 * 18_944  # the matrices of attention and MLP
    ends = 2 * 152_064 * 3584
    gathered = (2 * 2 * ends + 12 * layer) / GIB
    assert parts["gathered"] == pytest.approx(gathered, rel=1e-3)
    assert "copies in bfloat16" not in parts


def test_what_is_offloaded_is_counted_in_main_memory(tmp_path: Path) -> None:
    file = str(PROJECT / "conf/hardware/one_gpu_offloaded.yaml")
    config = recipe("treerpo_qwen2.5_math_7b", file)
    plan = MemoryPlan.of(config, *model("7b", tmp_path))
    assert plan.offloaded == pytest.approx(18 * COUNTS["7b"] / GIB)
    assert set(plan.worker) == {"gathered", "activations", "CUDA"}
    assert any(
        line.split()[:4] == ["in", "main", "memory", "127.67"] for line in plan.table(config)
    )
    assert needs_more_memory(config, plan, 128, "this machine") is None
    told = needs_more_memory(config, plan, 120, "this machine")
    assert re.search(
        r"1 worker\(s\) 127\.7, and this machine has 120\.0: lower learner\.num_wo", told
    )


ONE_GPU = str(PROJECT / "conf/hardware/one_gpu.yaml")


NO_GRADIENT_CHECKPOINTING = "learner.gradient_checkpointing=false"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["learner.gpu_memory_gib=33"], r"^learner\.gpu_memory_gib=33: .* lower learner\.token_b"),
        ([NO_GRADIENT_CHECKPOINTING], r"activations: set learner\.gradient_checkpointing=true$"),
        (["engine.gpu_memory_gib=4"], r"^engine\.gpu_memory_gib=4: an engine .* 2\.9 of them for"),
        (["engine.kv_cache_gib=0.01"], r"^engine\.kv_cache_gib=0\.01 is 0\.01 GiB .* needs 0\.04"),
        (
            ["engine.gpu_memory_utilization=0.07"],
            r"^engine\.gpu_memory_utilization=0\.07 of engine\.gpu_memory_gib=79 leaves 0\.00 GiB",
        ),
        (
            [ONE_GPU, "engine.kv_cache_gib=40"],
            r"^a GPU of 79 GiB .* cannot hold 1 worker\(s\) of .* and 1 engine\(s\) of 4\d\.\d GiB",
        ),
        (
            [ONE_GPU, "engine.num_engines=8", "engine.resources.GPU=0.125"],
            r"cannot hold 0 worker\(s\) of .* and 5 engine\(s\) of 1\d\.\d GiB",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_key(
    overrides: list[str], told: str, tmp_path: Path
) -> None:
    line = misfit(recipe("treerpo_qwen2.5_math_1.5b", *overrides), *model("1.5b", tmp_path))
    assert re.search(told, line) and "\n" not in line


def test_engines_that_sleep_and_learners_take_turns_at_a_gpu(tmp_path: Path) -> None:
    sizes = model("1.5b", tmp_path)
    crowded = recipe("treerpo_qwen2.5_math_1.5b", ONE_GPU, "engine.kv_cache_gib=40")
    assert "lower learner.token_budget or engine.kv_cache_gib, set engine.sleep=true, or" in str(
        misfit(crowded, *sizes)
    )
    asleep = ["engine.kv_cache_gib=40", "engine.sleep=true"]
    assert misfit(recipe("treerpo_qwen2.5_math_1.5b", ONE_GPU, *asleep), *sizes) is None
    # What a learner keeps while engines sample: all but what an update needs on its way.
    plan = MemoryPlan.of(crowded, *sizes)
    kept = sum(plan.worker.values()) - plan.worker["activations"]
    has = kept + sum(plan.engine.values())
    for gib, fits in ((has + 0.01, True), (has - 0.01, False)):
        on = [f"learner.gpu_memory_gib={gib}", f"engine.gpu_memory_gib={gib}"]
        config = recipe("treerpo_qwen2.5_math_1.5b", ONE_GPU, *asleep, *on)
        assert (misfit(config, *sizes) is None) == fits


def test_engines_of_adapters_that_sleep_have_their_weights_in_main_memory(tmp_path: Path) -> None:
    asleep = ["engine.sleep=true", "lora.rank=8"]
    config = recipe("treerpo_qwen2.5_math_1.5b", ONE_GPU, *asleep)
    plan = MemoryPlan.of(config, *model("1.5b", tmp_path))
    assert needs_more_memory(config, plan, plan.engine["weights"] + 0.01, "this machine") is None
    told = needs_more_memory(config, plan, plan.engine["weights"] - 0.01, "this machine")
    assert told is not None and told.endswith("set engine.sleep=false")
    awake = recipe("treerpo_qwen2.5_math_1.5b", ONE_GPU, "lora.rank=8")
    assert needs_more_memory(awake, plan, 0.0, "this machine") is None


def test_weights_that_are_sent_from_the_gpu_lie_there(tmp_path: Path) -> None:
    config = recipe("treerpo_qwen2.5_math_1.5b", "sync.transport=nccl")
    plan = MemoryPlan.of(config, *model("1.5b", tmp_path))
    assert plan.worker["weights to be sent"] == pytest.approx(2 * COUNTS["1.5b"] / GIB)


def test_what_nobody_named_is_not_checked(tmp_path: Path) -> None:
    found = model("7b", tmp_path)
    config = recipe("treerpo_qwen2.5_math_7b", "learner.gpu_memory_gib=null")
    config = replace(config, engine=replace(config.engine, gpu_memory_gib=None))
    assert misfit(config, *found) is None
    on_cpu = load(["learner.gpu_memory_gib=1", "engine.gpu_memory_gib=1"])
    assert misfit(on_cpu, *found) is None, "there is no GPU to fit"


def test_the_table_has_every_part_in_80_columns(tmp_path: Path) -> None:
    config = recipe("treerpo_qwen2.5_math_1.5b")
    lines = MemoryPlan.of(config, *model("1.5b", tmp_path)).table(config)
    assert all(len(line) + 12 <= 80 for line in lines)
    rows = {line[:22].strip(): line[22:].split() for line in lines}
    assert rows["GiB a GPU"] == ["1", "worker(s)", "1", "engine(s)"]
    assert rows["weights"] == ["5.75", "2.88"]
    assert rows["gradients and AdamW"] == ["17.25", "-"]
    assert rows["of gpu_memory_gib"] == ["79.00", "79.00"]
    assert rows["together"][1] == "67.15"
    by_name = MemoryPlan.of(config, 1.5e9, None).table(config)
    assert any(line.startswith("together, at least") for line in by_name)


def test_a_small_model_has_units_in_which_no_part_is_zero() -> None:
    config = load(["conf/quickstart.yaml"])
    plan = MemoryPlan.of(
        config, 870_000, ModelSizes.of(AutoConfig.from_pretrained(PROJECT / config.model.path))
    )
    head, *rows = plan.table(config)
    assert head.startswith("MiB ")
    cells = [cell for row in rows for cell in row[22:].split() if cell != "-"]
    assert len(cells) > 6 and all(float(cell) > 1 for cell in cells)
    assert float(cells[0]) == pytest.approx(4 * 870_000 / 2**20, abs=0.01)
    assert plan.engine_line().startswith("an engine takes 2") and " MiB: " in plan.engine_line()


@pytest.mark.parametrize(
    ("amount", "told"),
    [(0, "0.0"), (0.0123, "0.012"), (0.28, "0.28"), (1, "1.0"), (12.34, "12.3")],
)
def test_a_number_that_is_not_zero_is_not_told_as_zero(amount: float, told: str) -> None:
    assert number(amount) == told


def test_a_command_shows_the_table_and_refuses(capfd, tmp_path: Path) -> None:
    command = load_script("jobs/train.py").main
    arguments = [str(PROJECT / "conf/quickstart.yaml"), f"run.root={tmp_path}"]
    arguments += ["learner.resources={GPU: 1}", "learner.gpu_memory_gib=0.5"]
    arguments += ["prompts.num_problems=20", "evaluate.data.num_problems=20"]
    assert command(["--dry-run", *arguments]) == 2
    *plan, last = capfd.readouterr().err.splitlines()
    assert any("of gpu_memory_gib" in line for line in plan)
    assert last.startswith("error: learner.gpu_memory_gib=0.5: a worker of treerpo_ray/quickstart/")


GPUS = ["engine.resources={GPU: 0.5}", "learner.resources={GPU: 0.5}", "learner.gpu_memory_gib=79"]


@pytest.mark.parametrize(
    ("cuda", "printed", "overrides", "told"),
    [
        ("13.0", "580.65.06, 81559", GPUS, None),
        ("13.0", "581.1, 81559\n", GPUS, None),
        (
            "13.0",
            "580.64.99, 81559",
            GPUS,
            r"^the NVIDIA driver 580\.64\.99 .* CUDA 13\.0 .* 580\.",
        ),
        ("12.9", "550.54.15, 81559", GPUS, None),
        (
            "12.9",
            "470.82.01, 81559",
            GPUS,
            r"470\.82\.01 .* too old for CUDA 12\.9 .* 525\.60\.13",
        ),
        ("13.0", "580.65.06, 23034", GPUS, r"^learner\.gpu_memory_gib=79, but a .* 22\.5 GiB$"),
        ("13.0", "470.82.01, 23034", [], None),  # of no concern to a run on CPUs
        (None, "470.82.01, 81559", GPUS, None),  # that the build is for CPUs is told elsewhere
        ("13.0", "No devices were found", GPUS, None),
    ],
)
def test_gpus_that_cannot_be_used_are_one_line(
    cuda, printed, overrides, told, tmp_path, monkeypatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{printed}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if told is None:
        check_gpus(load(overrides), cuda)
        return
    with pytest.raises(ValueError, match=told) as caught:
        check_gpus(load(overrides), cuda)
    assert "\n" not in str(caught.value)


def test_a_job_without_a_learner_is_planned_and_refused_by_its_engines_alone() -> None:
    sizes = ModelSizes.of(AutoConfig.for_model(**CONFIGS["7b"]))
    evaluation = ["engine.resources={GPU: 1}", "engine.kv_cache_gib=null", "model.dtype=bfloat16"]
    evaluation += ["learner.resources={GPU: 1}", "learner.gpu_memory_gib=22"]
    fits, small = (load([*evaluation, f"engine.gpu_memory_gib={gib}"]) for gib in (40, 12))
    assert misfit(fits, 7.6e9, sizes, trains=False) is None
    assert str(misfit(fits, 7.6e9, sizes)).startswith("learner.gpu_memory_gib=22: ")
    told = misfit(small, 7.6e9, sizes, trains=False)
    assert told is not None and told.startswith("engine.gpu_memory_gib=12: an engine of ")
    plan = MemoryPlan.of(fits, 7.6e9, sizes)
    total = sum(plan.engine.values())
    assert plan.engine_line().startswith(f"an engine takes {total:.2f} GiB: weights 14.16, ")
