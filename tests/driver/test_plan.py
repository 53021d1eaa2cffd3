"""The plan of a run: its numbers are those of the configuration, the data and the model."""

import json
import os
import shutil
import sys
import threading

import fsspec
import fsspec.implementations.memory
import pytest
from safetensors import safe_open
from transformers import AutoConfig

from tests.support.project import ROOT, load_script
from treerpo_ray.config import Config, load
from treerpo_ray.driver import cluster
from treerpo_ray.driver.plan import (
    Inputs,
    load_inputs,
    plan_lines,
    preflight,
)
from treerpo_ray.driver.unusual import unusual
from treerpo_ray.prompts.mixture import Mixture
from treerpo_ray.quickstart.exercises import MODELS, MODELS_FOLDER
from treerpo_ray.quickstart.make_model import RECIPES

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


def plan_of(*overrides: str) -> list[str]:
    config = load([*QUICKSTART, *overrides])
    return plan_lines(config, preflight(config))


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
    assert quickstart["data"] == "quickstart:train: 90 problems in use of 90 rows"
    assert quickstart["held out"] == "quickstart:test: 40 problems in use of 40 rows"


def test_the_rows_in_use_are_those_after_all_filters(tmp_path) -> None:
    questions = ["1+1=?", "1+1=?", "2+2=?", "9" * 60 + "=?", "3+3=?", "4+4=?"]
    answers = ["2", "2", "", "9", "6", "8"]
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = plan(f"prompts.path={tmp_path}/rows.jsonl", "prompts.num_problems=3")["data"]
    assert shown == (
        f"{tmp_path}/rows.jsonl: 2 problems in use of 6 rows; left out: 1 without an answer, "
        "1 duplicates, 1 beyond num_problems, 1 prompts too long"
    )


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
    assert quickstart["memory"].split() == ["MiB", "2", "worker(s)", "3", "engine(s)"]
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
    monkeypatch.setattr(cluster, "machine_gib", lambda: 40.0)
    shown = plan()
    assert shown["missing"] == "nothing"
    assert shown["there is"] == "CPU 64, train_slot 2, 40.0 GiB of memory (this machine)"
    assert plan("engine.resources.special=2")["missing"] == "special 6"


def test_the_plan_of_a_run_on_a_cluster_looks_at_that(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    there = cluster.Available(where="the cluster", resources={"CPU": 1.0}, memory_gib=0.5)
    monkeypatch.setattr("treerpo_ray.driver.plan.look_at_resources", lambda config: there)
    lines = plan_of()
    assert "there is    CPU 1, train_slot 0, 0.5 GiB of memory (the cluster)" in lines
    assert "missing     CPU 1.1, train_slot 2" in lines
    [memory] = [line for line in lines if "the largest node has 0.5" in line]
    assert memory.startswith("missing     1 engine(s) take 0.28 GiB and 1 worker(s) ")

    def refuse(config: Config) -> cluster.Available:
        raise ValueError("RAY_ADDRESS=10.0.0.1:6379: nothing answers there")

    monkeypatch.setattr("treerpo_ray.driver.plan.look_at_resources", refuse)
    assert "missing     RAY_ADDRESS=10.0.0.1:6379: nothing answers there" in plan_of()


def test_an_address_at_which_nothing_answers_is_told_at_once(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    [line] = [line for line in plan_of() if "nothing answers there" in line]
    assert line.startswith("missing     RAY_ADDRESS=127.0.0.1:9: ")


def test_what_one_machine_cannot_hold_in_memory_is_refused_with_the_key(monkeypatch) -> None:
    monkeypatch.setattr("treerpo_ray.driver.plan.machine_gib", lambda: 4.0)
    for overrides, key in (
        (["engine.kv_cache_gib=3", "engine.num_engines=2"], "lower engine.kv_cache_gib=3"),
        (["learner.token_budget=90000", "gate.trees_per_step=480"], "lower learner.token_budget="),
    ):
        with pytest.raises(ValueError, match=r"this machine has 4\.0") as caught:
            inputs(*overrides)
        assert key in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # nodes have their own
    inputs("engine.kv_cache_gib=3", "engine.num_engines=2")


def test_what_is_hardly_ever_meant_is_a_line_with_what_is_usual() -> None:
    assert list(unusual(load(QUICKSTART))) == []
    cases = {
        "learner.learning_rate=0.5": "learner.learning_rate=0.5: usual are 1e-07 to 0.002",
        "learner.learning_rate=1e-9": "usual are 1e-07 to 0.002",
        "loss.clip_low=0": "loss.clip_low=0: usual are 0.05 to 0.5",
        "loss.kl_coef=5": "loss.kl_coef=5: usual are 0 to 0.2",
        "tree.temperature=0.05": "tree.temperature=0.05: usual are 0.3 to 1.5",
        "learner.prune_threshold=1": "nothing would be trained",
        "learner.warmup_steps=60": "the run has 60 optimizer steps",
    }
    for override, told in cases.items():
        [line] = unusual(load([*QUICKSTART, override]))
        assert line.startswith(override.partition("=")[0]) and told in line


def test_an_evaluation_that_asks_something_else_or_what_is_trained_is_unusual(tmp_path) -> None:
    rows = [{"question": f"{n}+1=?", "answer": f"{n + 1}"} for n in range(6)]
    for name, own in (("train", rows[:4]), ("test", rows[3:])):
        text = "".join(json.dumps(row) + "\n" for row in own)
        (tmp_path / f"{name}.jsonl").write_text(text)
    trained = f"prompts.path={tmp_path}/train.jsonl"
    assert plan(trained)["unusual"].startswith(
        "evaluate.data.path=quickstart:test: evaluated is the small task, not what is trained on"
    )
    assert plan(trained, f"evaluate.data.path={tmp_path}/test.jsonl")["unusual"] == (
        "evaluate.data.path: 1 of its 3 problems are trained on, too; what comes out tells little "
        "of new ones"
    )
    assert "unusual" not in plan(trained, "evaluate.data.path=''")


def test_a_budget_of_tokens_that_no_step_fills_says_so() -> None:
    """A worker has 6 trees of 32 + 332 tokens in each of its two optimizer steps."""
    assert "pass" not in plan("learner.token_budget=2184")
    assert plan("learner.token_budget=2185")["pass"] == (
        "one forward pass takes a worker's whole optimizer step, at most 2,184 tokens: "
        "learner.token_budget=2,185 is not reached"
    )


def test_no_file_of_the_project_has_what_is_hardly_ever_meant() -> None:
    files = [*ROOT.glob("conf/*.yaml"), *ROOT.glob("conf/methods/*.yaml")]
    for file in files:
        if file.stem not in ("benchmarks", "sweep"):
            base = [] if file.parent.name == "conf" else [str(ROOT / "conf/quickstart.yaml")]
            found = list(unusual(load([*base, str(file), "run.root=/runs"])))
            assert found == [], file


def test_a_run_inside_the_folder_of_another_one_is_refused(tmp_path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").touch()
    for name in ("other/mine", "other/checkpoints/mine"):
        with pytest.raises(ValueError, match=r"in the folder of another run: .*/other$"):
            inputs(f"run.root={tmp_path}", f"run.name={name}")
    inputs(f"run.root={tmp_path}", "run.name=other")
    inputs(f"run.root={tmp_path}", "run.name=group/mine")


class Store(fsspec.implementations.memory.MemoryFileSystem):
    """A store of buckets, which may refuse or never answer."""

    protocol = "s3"
    cachable = False
    buckets: tuple[str, ...] = ()
    fault: Exception | None = None
    answers = threading.Event()

    def exists(self, path: str, **more: object) -> bool:
        assert self.answers.wait(60)
        if self.fault:
            raise self.fault
        return path.removeprefix("s3://").strip("/").split("/")[0] in self.buckets


def test_a_store_that_cannot_be_written_to_is_told_before_anything_starts(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Store)
    monkeypatch.setattr(Store, "buckets", ("mine",))
    Store.answers.set()
    inputs("run.root=s3://mine/runs")
    with pytest.raises(ValueError, match=r"^run\.root=s3://yours/runs: there is no bucket yours"):
        inputs("run.root=s3://yours/runs")
    monkeypatch.setattr(Store, "fault", PermissionError("no key"))
    for command in (inputs, lambda root: load_script("jobs/train.py").train([*QUICKSTART, root])):
        with pytest.raises(ValueError, match=r"the store refuses: PermissionError: no key$"):
            command("run.root=s3://mine/runs")
    Store.answers.clear()
    monkeypatch.setattr("treerpo_ray.driver.plan.STORE_S", 0.1)
    with pytest.raises(ValueError, match=r"the store has not answered for 0\.1 s$"):
        inputs("run.root=s3://mine/runs")
    Store.answers.set()


def test_a_small_model_that_is_not_made_yet_is_named_with_its_command(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where nothing is made
    for name in MODELS:
        with pytest.raises(ValueError, match=rf"quickstart\.make_model {name}$"):
            inputs(f"model.path={MODELS_FOLDER}/{name}")
    assert set(MODELS) == set(RECIPES)


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
    assert data[0].startswith(f"data        25% a, {tmp_path}/a.jsonl: 5 problems in use of 5 rows")
    told = "15 problems in use of 20 rows; left out: 5 duplicates"
    assert data[1] == f"data        75% b, {tmp_path}/b.jsonl: {told}"
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
