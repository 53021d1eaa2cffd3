"""The plan of a run: its numbers are those of the configuration, the data and the model."""

import json
import os
import shutil
import sys

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from tests.support.project import ROOT
from treerpo_ray.config import Config, load
from treerpo_ray.driver.plan import (
    Inputs,
    load_inputs,
    plan_lines,
    preflight,
)
from treerpo_ray.prompts.mixture import Mixture

QUICKSTART = [
    str(ROOT / "conf/quickstart.yaml"),
    *("run.root=/runs", "run.name=planned", "run.num_steps=30", "gate.trees_per_step=24"),
    *("tree.num_children=[4, 3]", "tree.step_tokens=[23, 20]", "gate.max_staleness=2"),
    *("prompts.num_problems=90", "evaluate.data.num_problems=40", "engine.num_engines=3"),
    *("learner.num_workers=2", "learner.minibatches=2", "engine.kv_cache_gib=0.25"),
    "engine.resources={CPU: 0.5}",
    "learner.resources={CPU: 0.25, train_slot: 1}",
]
"""The quickstart with every number of the plan set, so that they can be worked out by hand."""


def plan(*overrides: str) -> dict[str, str]:
    """The lines of a plan by their first words."""
    config = load([*QUICKSTART, *overrides])
    lines = plan_lines(config, preflight(config))
    assert all("\n" not in line for line in lines)
    return {line[:12].strip(): line[12:] for line in lines}


@pytest.fixture(scope="module")
def quickstart() -> dict[str, str]:
    return plan()


def saved_parameters() -> int:
    [path] = (ROOT / "treerpo_ray/quickstart/model").glob("*.safetensors")
    with safe_open(path, "np") as weights:
        return sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118


def test_the_parameters_counted_are_those_of_the_weights_that_are_saved() -> None:
    found = preflight(load(QUICKSTART))
    assert found.model is not None and found.model.num_parameters == saved_parameters()


def test_the_plan_says_where_the_run_is_written_and_what_is_trained(quickstart) -> None:
    millions = f"{saved_parameters() / 1e6:,.1f} M parameters"
    assert quickstart["run"] == "/runs/planned"
    assert quickstart["model"] == f"treerpo_ray/quickstart/model: {millions}"


def test_the_plan_reports_both_data_sets(quickstart) -> None:
    assert quickstart["data"].startswith("quickstart:train: ")
    assert "90 problems in use" in quickstart["data"]
    assert quickstart["data"].endswith("; 0 prompts too long")
    assert quickstart["held out"].startswith("quickstart:test: ")
    assert "40 problems in use" in quickstart["held out"]


def test_the_plan_counts_steps_tokens_trees_and_epochs(quickstart) -> None:
    assert quickstart["tree"] == (
        "[4, 3] children of at most [23, 20] tokens: up to 16 steps, 12 answers "
        "and 332 tokens a question"
    )
    assert quickstart["step"] == (
        "24 trees: up to 384 requests and 7,968 sampled tokens, 2 optimizer step(s)"
    )
    assert quickstart["staleness"] == "at most 2 versions: 72 trees in flight"
    assert quickstart["run length"] == (
        "30 learner steps, 720 trees, 8.0 epochs, up to 60 optimizer steps"
    )


def test_the_plan_counts_memory_and_resources(quickstart) -> None:
    assert quickstart["memory"].split() == ["GiB", "2", "worker(s)", "3", "engine(s)"]
    needs = dict(part.rsplit(" ", 1) for part in quickstart["resources"].split(", "))
    assert 3 * 0.5 + 2 * 0.25 < float(needs["CPU"]) <= 3 * 0.5 + 2 * 0.25 + 0.5
    assert needs["train_slot"] == "2"


def test_the_plan_of_a_pool_that_may_grow_says_from_where_to_where() -> None:
    shown = plan("engine.max_engines=5", "engine.max_trees=8")
    assert shown["memory"].endswith("3 to 5 engines")
    fewest, most = shown["resources"].split(",")[0].removeprefix("CPU ").split(" to ")
    assert float(most) - float(fewest) == pytest.approx(2 * 0.5)
    assert "train_slot 2" in shown["resources"].split(", ")


def test_the_plan_says_what_this_machine_lacks(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert plan()["missing"] == "nothing (on this machine alone)"
    assert plan("engine.resources.special=2")["missing"] == "special 6 (on this machine alone)"


def test_a_run_without_held_out_data_has_no_line_for_it() -> None:
    assert "held out" not in plan("evaluate.data.path=''")


def test_the_plan_has_the_first_prompt_and_what_ends_an_answer(quickstart) -> None:
    problem = load_inputs(load(QUICKSTART)).prompts.problems[0]
    asked = f"{problem.question}\n"
    assert quickstart["prompt"] == f"{asked!r}, answered by {problem.answers[0]!r}"
    assert "stop" not in quickstart
    shown = plan("prompts.prompt_template='Go: {question}'", 'model.stop=["</a>", "\\n\\n"]',
                 "evaluate.data.prompt_template=null")  # fmt: skip
    assert shown["prompt"].startswith("'Go: ")
    assert shown["stop"] == "an answer ends with its end token or behind '</a>', '\\n\\n'"


def test_the_plan_of_a_mixture_has_a_line_and_the_epochs_of_each_set(tmp_path) -> None:
    for name, count in (("b", 20), ("a", 5)):
        rows = (json.dumps({"question": f"{i}+{len(name)}", "answer": i}) for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    mix = [f"prompts.mix.{name}={{path: {tmp_path}/{name}.jsonl}}" for name in ("b", "a")]
    mix += ["prompts.mix.b.weight=3", "prompts.path=''", "prompts.num_problems=null"]
    config = load([*QUICKSTART, *mix])
    found = preflight(config)
    lines = plan_lines(config, found)
    data = [line for line in lines if line.startswith("data")]
    assert data[0].startswith(f"data        25% a, {tmp_path}/a.jsonl: 5 rows, 5 problems in use;")
    assert data[1].startswith(f"data        75% b, {tmp_path}/b.jsonl: 20 rows, 15 problems in u")
    assert "; left out: 0 without an answer, 5 duplicates; 0 prompts too long" in data[1]
    [length] = [line for line in lines if line.startswith("run length")]
    assert "720 trees, 36.0 epochs of a, 36.0 epochs of b, up to" in length
    prompts = found.inputs().prompts
    assert prompts.mixture == Mixture(sizes=(5, 15), weights=(1.0, 3.0))
    assert [p.id for p in prompts.problems[:6]] == ["a/1", "a/2", "a/3", "a/4", "a/5", "b/6"]
    assert len(prompts) == len(prompts.token_ids) == 20


def inputs(*overrides: str) -> Inputs:
    config: Config = load([*QUICKSTART, *overrides])
    return load_inputs(config)


def test_the_delimiter_becomes_its_token() -> None:
    assert inputs().delimiters == ()
    [token] = inputs('tree.delimiter="\\n"').delimiters
    assert isinstance(token, int)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tree.delimiter=ab", r"^tree\.delimiter='ab' is 2 tokens"),
        ("prompts.path=gone.jsonl", r"^prompts\.path=gone\.jsonl"),
        ("evaluate.data.path=gone.jsonl", r"^evaluate\.data\.path=gone\.jsonl"),
        ("model.path=./gone", r"^model\.path='\./gone': no such folder"),
        ("prompts.max_prompt_tokens=1", r"^prompts\.max_prompt_tokens=1 leaves no prompt"),
    ],
)
def test_an_input_that_is_not_as_it_must_be_is_one_line_with_its_key(override, told) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        inputs(override)
    assert "\n" not in str(caught.value)


def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(
    tmp_path, monkeypatch
) -> None:
    modules = "transformers.dynamic_module_utils.HF_MODULES_CACHE"  # where code is copied to
    monkeypatch.setattr(modules, str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(ROOT / "treerpo_ray/quickstart/model", folder)
    odd = {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}
    named = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(named | {"model_type": "odd", "auto_map": odd}))
    (folder / "odd.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class Config(Qwen2Config): model_type = 'odd'\n"
        "class Model(Qwen2ForCausalLM): config_class = Config\n"
    )
    with pytest.raises(ValueError, match=r"model\.trust_remote_code=true") as caught:
        inputs(f"model.path={folder}")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="custom code"):  # and by whoever would load it
        AutoConfig.from_pretrained(folder)
    assert not marker.exists()
    inputs(f"model.path={folder}", "model.trust_remote_code=true")
    assert marker.exists()  # the code is what this test thinks that it is


def test_a_model_folder_without_a_model_is_one_line_with_its_key(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^model\.path=.*") as caught:
        preflight(load([*QUICKSTART, f"model.path={tmp_path}"]))
    assert "\n" not in str(caught.value)
