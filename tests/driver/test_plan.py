"""The plan of a run: its numbers are those of the configuration, the data and the model."""

import json
from collections.abc import Callable

import pytest
from safetensors import safe_open

from tests.support.project import PROJECT
from treerpo_ray.config import Config, load
from treerpo_ray.driver import cluster
from treerpo_ray.driver.plan import plan_lines
from treerpo_ray.preflight.inputs import load_inputs, preflight
from treerpo_ray.preflight.placement import Node
from treerpo_ray.prompts.mixture import Mixture
from treerpo_ray.run_folder.disk import size

QUICKSTART = [
    str(PROJECT / "conf/quickstart.yaml"),
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


def plan(
    *overrides: str, look: Callable[[Config], cluster.Available] = cluster.look_at_resources
) -> dict[str, str]:
    """The lines of a plan by their first words."""
    config = load([*QUICKSTART, *overrides])
    lines = plan_lines(config, preflight(config), look)
    assert all("\n" not in line for line in lines)
    return {line[:12].strip(): line[12:] for line in lines}


@pytest.fixture(scope="module")
def quickstart() -> dict[str, str]:
    return plan()


def saved_parameters() -> int:
    [path] = (PROJECT / "treerpo_ray/quickstart/model").glob("*.safetensors")
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
        "1 asked by an earlier row, 1 beyond num_problems, 1 too long"
    )


def test_the_plan_counts_steps_tokens_trees_and_epochs(quickstart) -> None:
    assert quickstart["tree"] == (
        "[4, 3] children of at most [23, 20] tokens: up to 16 steps, 12 answers "
        "and 332 tokens a question"
    )
    assert quickstart["step"] == (
        "24 trees: up to 384 requests and 7,968 sampled tokens, 2 optimizer steps"
    )
    assert quickstart["staleness"] == "at most 2 versions: 72 trees in flight"
    assert quickstart["run length"] == (
        "30 learner steps, 720 trees, 8.0 epochs, up to 60 optimizer steps"
    )


def test_the_plan_of_a_shape_that_adapts_says_between_which_it_lies() -> None:
    """One answer has 23 + 20 tokens, [1, 16] 23 + 16 * 20."""
    shown = plan(str(PROJECT / "conf/methods/adaptive.yaml"))
    assert shown["tree"] == (
        "[1, 4] children of at most [23, 20] tokens measure forks, 8 trees in one learner step of "
        "10; all others are the best fork, up to [1, 16], or single answers, [1, 1], where none "
        "pays: at most 43 to 343 tokens a question, by shape"
    )
    assert shown["step"] == (
        "24 trees: up to 408 requests and 8,232 sampled tokens, 2 optimizer steps"
    )


def test_the_plan_counts_memory_and_resources(quickstart) -> None:
    assert quickstart["memory"].split() == ["MiB", "2", "worker(s)", "3", "engine(s)"]
    needs = dict(part.rsplit(" ", 1) for part in quickstart["resources"].split(", "))
    assert 3 * 0.5 + 2 * 0.25 < float(needs["CPU"]) <= 3 * 0.5 + 2 * 0.25 + 0.5
    assert needs["train_slot"] == "2"


def test_the_plan_says_what_is_trained_of_adapters_and_counts_it() -> None:
    lora = ["lora.rank=4", "lora.target_modules=[q_proj, o_proj]", "checkpoint.keep=1"]
    config = load([*QUICKSTART, *lora])
    found = preflight(config)
    assert found.model is not None
    sizes = found.model.sizes
    heads = sizes.num_heads * sizes.head_dim
    adapted = 4 * sizes.num_layers * 2 * (sizes.hidden + heads)
    lines = plan_lines(config, found)
    told = f"alpha 32 on q_proj, o_proj: {adapted:,} numbers are trained, sent and kept"
    assert told in next(line for line in lines if line.startswith("adapters    rank 4, "))
    [memory] = [line.split() for line in lines if line.split()[:3] == ["gradients", "and", "AdamW"]]
    assert float(memory[3]) == pytest.approx(12 * adapted / 2**20, abs=0.01)
    [disk] = [line for line in lines if line.startswith("disk")]
    assert f"2 checkpoints of {size(12 * adapted)}, model {size(4 * saved_parameters())}" in disk


def test_layers_that_the_model_has_not_are_refused_before_the_start() -> None:
    told = r"lora\.target_modules: Qwen\w+ has no linear layer w1 but the head; it has down_proj, "
    with pytest.raises(ValueError, match=told) as caught:
        plan("lora.rank=4", "lora.target_modules=[w1]")
    assert "\n" not in str(caught.value)


def test_the_plan_says_that_engines_compute_in_fp8() -> None:
    fp8 = ["engine.quantization=fp8", "engine.resources={GPU: 1}", "model.dtype=bfloat16"]
    told = plan(*fp8, "sync.probe_tolerance=0.5")["engines"]
    assert told.startswith("compute linear layers in fp8; ")
    assert told.endswith("by at most loss.importance_cap=2")


def test_the_plan_of_a_pool_that_may_grow_says_from_where_to_where() -> None:
    shown = plan("engine.max_engines=5", "engine.max_trees=8")
    assert shown["memory"].endswith("3 to 5 engines")
    fewest, most = shown["resources"].split(",")[0].removeprefix("CPU ").split(" to ")
    assert float(most) - float(fewest) == pytest.approx(2 * 0.5)
    assert "train_slot 2" in shown["resources"].split(", ")


def test_the_plan_says_what_this_machine_lacks() -> None:
    def large(config: Config) -> cluster.Available:
        have = cluster.local_resources(config, cpus=64, gpus=0)
        here = (Node(have, {}),)
        return cluster.Available(where="this machine", resources=have, nodes=here, memory_gib=40.0)

    shown = plan(look=large)
    assert shown["missing"] == "nothing"
    assert shown["there is"] == "CPU 64, train_slot 2, 40.0 GiB of memory (this machine)"
    assert plan("engine.resources.special=2", look=large)["missing"] == "special 6"


def test_the_plan_of_a_run_on_a_cluster_looks_at_that(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    nodes = (Node({"CPU": 0.5}, {}), Node({"CPU": 0.5, "memory": 9.0}, {}), Node({}, {}))
    there = cluster.Available(
        where="the cluster", resources={"CPU": 1.0}, nodes=nodes, memory_gib=0.3
    )
    config = load(QUICKSTART)
    found = preflight(config)
    lines = plan_lines(config, found, look=lambda config: there)
    assert "there is    CPU 1, train_slot 0, 0.3 GiB of memory (the cluster)" in lines
    assert "nodes       2 with CPU 0.5; 1 with none of that" in lines
    assert "missing     CPU 1.1, train_slot 2" in lines
    [memory] = [line for line in lines if "the largest node has 0.3" in line]
    assert memory.startswith("missing     1 engine(s) take 0.28 GiB and 1 worker(s) ")

    def refuse(config: Config) -> cluster.Available:
        raise ValueError("RAY_ADDRESS=10.0.0.1:6379: nothing answers there")

    lines = plan_lines(config, found, look=refuse)
    assert "missing     RAY_ADDRESS=10.0.0.1:6379: nothing answers there" in lines


def test_the_plan_says_what_no_node_has_room_for() -> None:
    """A cluster that has enough of everything, but not where a worker needs it."""
    halves = tuple(Node({"CPU": 0.3, "train_slot": 1.0}, {}) for _ in range(8))
    sums = {"CPU": 2.4, "train_slot": 8.0}
    there = cluster.Available(where="the cluster", resources=sums, nodes=halves, memory_gib=40.0)
    shown = plan(look=lambda config: there)
    assert shown["nodes"] == "8 with CPU 0.3, train_slot 1"
    assert shown["missing"].startswith("engine.resources={'CPU': 0.5}: no node has all of that")


def test_an_address_at_which_nothing_answers_is_told_at_once(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    [line] = [line for line in plan_of() if "nothing answers there" in line]
    assert line.startswith("missing     RAY_ADDRESS=127.0.0.1:9: ")


def test_an_evaluation_that_asks_something_else_or_what_is_trained_is_unusual(tmp_path) -> None:
    rows = [{"question": f"{n}+1=?", "answer": f"{n + 1}"} for n in range(6)]
    for name, own in (("train", rows[:4]), ("test", rows[3:])):
        text = "".join(json.dumps(row) + "\n" for row in own)
        (tmp_path / f"{name}.jsonl").write_text(text)
    trained = f"prompts.path={tmp_path}/train.jsonl"
    assert plan(trained)["unusual"].startswith(
        "evaluate.data.path=quickstart:test: evaluated is the small task, not what is trained on"
    )
    assert (
        "unusual     evaluate.data.path: 1 of its 3 problems are trained on, too; what comes out "
        "tells little of new ones"
    ) in plan_of(trained, f"evaluate.data.path={tmp_path}/test.jsonl")
    lines = plan_of(trained, "evaluate.data.path=''")
    assert not [line for line in lines if line.startswith("unusual     evaluate")]


def test_a_budget_of_tokens_that_no_step_fills_says_so() -> None:
    """A worker has 6 trees of 32 + 332 tokens in each of its two optimizer steps."""
    assert "pass" not in plan("learner.token_budget=2184")
    assert plan("learner.token_budget=2185")["pass"] == (
        "one forward pass takes a worker's whole optimizer step, at most 2,184 tokens: "
        "learner.token_budget=2,185 is not reached"
    )


def test_a_run_without_held_out_data_has_no_line_for_it() -> None:
    assert "held out" not in plan("evaluate.data.path=''")


def test_the_plan_says_of_code_of_ones_own_that_it_was_tried(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "def check_answer(text):\n    return True\nSELF_TEST = [('a', ['a'], True)]\n"
    )
    own = plan(f"verifier.check={tmp_path}/mine.py")["reward"]
    assert own.endswith(", which passed SELF_TEST") and "SELF_TEST" not in plan()["reward"]
    (tmp_path / "form.py").write_text("def mine(values):\n    return values\n")
    own = plan(f"learner.advantage={tmp_path}/form.py:mine")["credit"]
    assert own == f"advantage {tmp_path}/form.py:mine, tried on trees of every kind"
    assert "credit" not in plan()


def test_the_plan_has_the_first_prompt_and_what_ends_an_answer(quickstart) -> None:
    problem = load_inputs(load(QUICKSTART)).prompts.problems[0]
    asked = f"{problem.question}\n"
    assert quickstart["prompt"] == f"{asked!r}, expected answer {problem.answers[0]!r}"
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
    told = "15 problems in use of 20 rows; left out: 5 asked by an earlier row"
    assert data[1] == f"data        75% b, {tmp_path}/b.jsonl: {told}"
    [length] = [line for line in lines if line.startswith("run length")]
    assert "720 trees, 36.0 epochs of a, 36.0 epochs of b, up to" in length
    prompts = found.inputs().prompts
    assert prompts.mixture == Mixture(sizes=(5, 15), weights=(1.0, 3.0))
    assert [p.id for p in prompts.problems[:6]] == ["a/1", "a/2", "a/3", "a/4", "a/5", "b/6"]
    assert len(prompts) == len(prompts.token_ids) == 20
