"""Settings that are hardly ever meant."""

from tests.support.project import PROJECT
from treerpo_ray.config import load
from treerpo_ray.preflight.unusual import unusual

QUICKSTART = [
    str(PROJECT / "conf/quickstart.yaml"),
    *("run.root=/runs", "run.num_steps=30", "learner.minibatches=2"),
]


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


ADAPTIVE = [str(PROJECT / "conf/quickstart.yaml"), str(PROJECT / "conf/methods/adaptive.yaml")]


def test_pruning_with_a_form_that_trains_what_is_pruned_is_unusual() -> None:
    raft = [*QUICKSTART, str(PROJECT / "conf/methods/raft.yaml"), "tree.num_children=[1,4]"]
    assert list(unusual(load([*raft, "tree.step_tokens=[23,23]"]))) == []
    for form in ("reward", "past_baseline", "shrunk_baseline"):
        [line] = unusual(load([*QUICKSTART, f"learner.advantage={form}"]))
        assert line.startswith("learner.prune=range with learner.prune_threshold=0.1: siblings")
        assert f"learner.advantage={form} trains as well" in line
        own = [f"learner.advantage={form}", "learner.prune=shrinkage", "learner.prune_threshold=-1"]
        [line] = unusual(load([*QUICKSTART, *own]))
        assert line.startswith("learner.prune=shrinkage")
    assert list(unusual(load([*QUICKSTART, "learner.advantage=leave_one_out"]))) == []


def test_adaptive_trees_that_have_nothing_to_choose_by_or_for_are_unusual() -> None:
    own = [*ADAPTIVE, "run.root=/runs", "gate.trees_per_step=8", "gate.max_staleness=3"]
    assert list(unusual(load([*own, "run.num_steps=6"]))) == []
    [line] = unusual(load([*own, "run.num_steps=5"]))
    assert "gate.max_staleness=3" in line and "those of learner step 5, and the run has 5" in line
    [line] = unusual(load([*own, "run.num_steps=6", "gate.trees_per_step=7"]))
    assert line.startswith("gate.trees_per_step=7: ") and "fewer than 8" in line


def test_no_file_of_the_project_has_what_is_hardly_ever_meant() -> None:
    files = [*PROJECT.glob("conf/*.yaml"), *PROJECT.glob("conf/methods/*.yaml")]
    for file in files:
        if file.stem not in ("benchmarks", "sweep"):
            base = [] if file.parent.name == "conf" else [str(PROJECT / "conf/quickstart.yaml")]
            found = list(unusual(load([*base, str(file), "run.root=/runs"])))
            assert found == [], file


def test_own_data_for_the_small_model_of_the_project_is_unusual() -> None:
    own = [*QUICKSTART, "prompts.path=mine.jsonl", "evaluate.data.path="]
    [line] = unusual(load(own))
    assert line.startswith("model.path=treerpo_ray/quickstart/model: the small model of the pro")
    assert list(unusual(load([*own, "model.path=Qwen/Qwen2.5-0.5B"]))) == []
