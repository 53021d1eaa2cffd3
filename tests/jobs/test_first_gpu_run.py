"""The first minutes on a GPU, rehearsed on a CPU: every part runs, and what fails is told."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from jobs.gpu import measures, torch_parts
from jobs.gpu.ray_parts import make_runs, option_runs, quickstart_run, recipe_run
from jobs.gpu.workload import REAL, REHEARSAL, Tell, forest_of
from tests.support.project import PROJECT, load_script
from tests.support.whole_runs import processes_with
from treerpo_ray.config import load
from treerpo_ray.driver.cluster import local_resources, starting_stages
from treerpo_ray.learner.forest_layout import ForestLayout
from treerpo_ray.preflight.inputs import preflight
from treerpo_ray.preflight.placement import Node, check_places

SCRIPT = load_script("jobs/gpu/first_run.py")


def first_gpu_run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(PROJECT / "jobs/first_gpu_run.sh"), *arguments]
    environment = os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = first_gpu_run(PATH=path, OUT=str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: nvidia-smi finds no GPU here")
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()
    done = first_gpu_run("--rehearse", "maschine", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert "error: no part is called maschine" in done.stderr


def test_the_parts_take_no_longer_than_their_script_says() -> None:
    """In minutes: all on one GPU, what two or more add, and either half of the parts."""
    script = (PROJECT / "jobs/first_gpu_run.sh").read_text()
    [declared] = re.findall(r"declare -A limit_s=\((.+)\)", script)
    limits = {part: int(seconds) for part, seconds in re.findall(r"\[(\w+)\]=(\d+)", declared)}
    [with_more_gpus] = map(int, re.findall(r" limit_s\[options\]=(\d+)", script))
    assert list(limits) == list(SCRIPT.PARTS)
    told = " ".join(script.replace("\n#", " ").split())
    assert "at most 15 minutes" in told and sum(limits.values()) <= 15 * 60
    assert "at most 8 minutes more" in told and with_more_gpus - limits["options"] <= 8 * 60
    assert "up to four runs" in told and with_more_gpus > 4 * limits["options"]
    alone = sum(limits[part] for part in SCRIPT.TORCH_ALONE)
    assert "less than 8 minutes each" in told
    assert max(alone, sum(limits.values()) - alone) < 8 * 60


def test_what_becomes_of_each_part_is_one_line(tmp_path: Path, capsys) -> None:
    with SCRIPT.written(tmp_path / "machine.json") as tell:
        tell(cpus=3)
    with SCRIPT.written(tmp_path / "model.json"):
        raise RuntimeError("no\nspace")
    (tmp_path / "attention.json").write_text('{"status": "not finished", "kernel": "MATH"}')
    with SCRIPT.written(tmp_path / "engine.json") as tell:
        tell(status="left out: vllm not installed")

    def found(*parts: str) -> tuple[int, dict]:
        status = SCRIPT.verdict(tmp_path, list(parts))
        return status, json.loads(capsys.readouterr().out)

    status, told = found("machine", "engine")
    assert status == 0 and told["is_well"] and told["machine"]["cpus"] == 3
    assert told["parts"] == {"machine": "ok", "engine": "left out: vllm not installed"}
    status, told = found("machine", "model", "attention", "learner")
    assert status == 1 and not told["is_well"]
    assert told["parts"] == {
        "machine": "ok",
        "model": "RuntimeError: no space",
        "attention": "not finished",
        "learner": "not started",
    }
    assert told["attention"] == {"kernel": "MATH"}, "what it found before counts"


def test_the_attention_that_fails_in_cudnn_is_the_one_that_is_tried() -> None:
    """704 keys, whose last tile of 128 is half padding, and a logsumexp below -88.7."""
    sizes, tokens = REHEARSAL, measures.ALL_KEYS
    assert tokens % 128 == 64
    layout = ForestLayout.from_forest(forest_of(tokens - 64, [64]), torch.device("cpu"))
    assert max(bucket.num_keys for bucket in layout.buckets.members) == tokens
    scores = measures.LOW - torch.tensor(float(tokens)).log()
    width = abs(float(scores) * sizes.head_dim**0.5) ** 0.5
    logits = torch.full((tokens,), -(width**2) / sizes.head_dim**0.5)
    assert float(logits.logsumexp(0)) == pytest.approx(-120, abs=0.01)
    # Scores that are all alike: the output is the mean of the values, whatever the score.
    query, key, value = measures.attend(sizes, tokens - 64, 64, float(scores), None)
    assert float(key.abs().max()) < 0.5 and float(query.abs().max()) < 0.5
    assert value[0, 0, 0].sum() > value[0, 0, -1].sum() > 0


def test_the_runs_on_a_gpu_would_start(tmp_path: Path) -> None:
    """With its own hardware file, but a small model."""
    torch_parts.model(REHEARSAL, tmp_path, lambda **told: None)
    for arguments in (quickstart_run(REAL, tmp_path), recipe_run(tmp_path)):
        config = load(arguments)
        assert config.engine.resources["GPU"] == config.learner.resources["GPU"] == 0.5
        inputs = preflight(config).inputs()
        assert len(inputs.prompts) >= config.gate.trees_per_step
    assert config.learner.shard and config.model.path == f"{tmp_path}/model"


def test_runs_of_options_would_start_where_the_gpus_can_do_what_they_need(tmp_path: Path) -> None:
    old, new, every = "8.0", "9.0", ["two_workers", "fp8", "nccl", "tensor_parallel"]
    started: list[list[str]] = []
    for gpus, done in (
        ([], []), ([old], []), ([new], ["fp8"]), ([old] * 2, [*every[:1], *every[2:]]),
        ([new] * 2, every), ([new] * 3, every),
    ):  # fmt: skip
        runs = option_runs(REAL, tmp_path, gpus)
        assert [name for name, own in runs.items() if not isinstance(own, str)] == done
        for name, own in runs.items():
            if isinstance(own, str):
                assert own.startswith("needs ")
                continue
            config = load(own)
            learner, engine = config.learner, config.engine
            assert (engine.quantization == "fp8") == (name == "fp8")
            assert (config.sync.transport == "nccl") == (name == "nccl")
            is_split = name == "tensor_parallel" or (name == "nccl" and len(gpus) == 3)
            assert engine.tensor_parallel == 1 + is_split
            assert learner.shard == engine.sleep == (name == "two_workers")
            assert learner.num_workers == 1 + learner.shard
            there = local_resources(config, cpus=8, gpus=len(gpus))
            check_places(starting_stages(config, trains=True), [Node(there, {})])
            if own not in started:
                assert len(preflight(config).inputs().prompts) >= config.gate.trees_per_step
                started.append(own)


def test_an_option_that_fails_leaves_the_others_to_be_run(tmp_path: Path) -> None:
    ran: list[str] = []
    told: dict[str, object] = {}

    def run(name: str, arguments: list[str], tell: Tell) -> None:
        ran.append(name)
        if name in ("two_workers", "nccl"):
            raise RuntimeError(f"the {name} run ended with status 1")

    runs = option_runs(REAL, tmp_path, ["8.0"] * 2)
    with pytest.raises(RuntimeError, match="the two_workers run ended"):
        make_runs(runs, lambda **found: told.update(found), run)
    assert ran == ["two_workers", "nccl", "tensor_parallel"]
    assert {name: told[name] for name in ("two_workers", "nccl")} == {
        name: f"the {name} run ended with status 1" for name in ("two_workers", "nccl")
    }
    assert str(told["fp8"]).startswith("left out: needs a GPU")


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_all_parts_run_on_a_cpu_in_tiny_sizes(tmp_path: Path) -> None:
    mark = {"TREERPO_TEST": str(tmp_path)}
    done = first_gpu_run("--rehearse", OUT=str(tmp_path), PATIENCE="10", **mark)  # a busy machine
    logs = "\n".join(file.read_text()[-3000:] for file in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    told = json.loads(done.stdout)
    assert told["is_well"] and list(told["parts"]) == list(SCRIPT.PARTS)
    assert told["parts"].pop("options") == "left out: no GPU here can do any of it"
    assert set(told["parts"].values()) == {"ok"}
    assert told["attention"]["without_cudnn"]["low_scores_have_gradients"]
    assert told["attention"]["packed_against_rows"]["max"] < 0.05
    changes = ["as_is", "buckets_with_masks", "large_pieces_of_logits", "head_not_compiled"]
    changes += ["foreach_optimizer", "with_cudnn"]
    assert all(told["learner"][name]["s_a_forest"] > 0 for name in changes)
    assert told["sharded"]["gradient_off_in_float32"] < 1e-5
    assert told["sharded"]["gradient_off_with_offload"] < 0.1
    assert told["sharded"]["resumed_off"] < 1e-4 and "export_s" in told["sharded"]
    assert told["sharded"]["as_is"]["s_a_forest"] > 0
    assert told["engine"]["cached_share"] > 0.3
    assert all(told["engine"][f"by_{kind}"]["off"] < 0.01 for kind in ("file", "ipc"))
    assert told["engine"]["sampled_logprobs_off"] < 0.01
    assert told["train"]["quickstart"]["sampled_tokens"] > 0
    assert "of gpu_memory_gib" in logs, "the recipe's plan"
    assert "transport: nccl" in (tmp_path / "runs/quickstart/config.yaml").read_text()
    for name in ("two_workers", "fp8", "nccl", "tensor_parallel"):
        assert told["options"][name].startswith("left out: needs ")
    assert processes_with(f"TREERPO_TEST={tmp_path}") == [], "each run ends the Ray that it started"
