"""The commands that a finished run ends with."""

import math
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.project import PROJECT
from treerpo_ray.config import Config, load
from treerpo_ray.config.files import to_yaml
from treerpo_ray.config.sections import RAY_JOB
from treerpo_ray.driver.benchmarks import configure
from treerpo_ray.driver.next_steps import STARTED_IN, next_steps
from treerpo_ray.run_folder.files import CONFIG_FILE, RunFolder

TOKENS = 370_000
OTHER = "train it with GRPO on as many tokens, and compare"
ADAPTIVE = "train it with forks only where they pay on as many tokens, and compare"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    for name in (STARTED_IN, RAY_JOB):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)


def steps(*arguments: str) -> dict[str, str]:
    return dict(next_steps(load(list(arguments)), arguments, TOKENS))


def test_a_finished_run_ends_with_five_commands_of_one_line_each(tmp_path: Path) -> None:
    found = steps("conf/quickstart.yaml", f"run.root={tmp_path}")
    assert list(found.items()) == [
        (
            "see the mistakes that it fixed",
            f"python -m treerpo_ray.viewer {tmp_path}/quickstart",
        ),
        ("draw its figures", f"TREERPO_RUN={tmp_path}/quickstart bash jobs/notebook.sh"),
        (
            "evaluate it",
            f"python jobs/evaluate.py {tmp_path}/quickstart --benchmarks quickstart "
            "evaluate.max_tokens=46 evaluate.num_samples=4 evaluate.temperature=1.0 "
            "evaluate.top_p=1.0",
        ),
        (
            OTHER,
            f"python jobs/train.py conf/quickstart.yaml run.root={tmp_path} conf/methods/grpo.yaml "
            f"run.num_steps=54 run.max_sampled_tokens={TOKENS} "
            f"&& python jobs/evaluate.py --compare {tmp_path}/quickstart-grpo "
            f"{tmp_path}/quickstart",
        ),
        (
            ADAPTIVE,
            f"python jobs/train.py conf/quickstart.yaml run.root={tmp_path} "
            f"conf/methods/adaptive.yaml run.num_steps=432 run.max_sampled_tokens={TOKENS} "
            f"&& python jobs/evaluate.py --compare {tmp_path}/quickstart-adaptive "
            f"{tmp_path}/quickstart",
        ),
    ]


@pytest.mark.parametrize(
    "own",
    [
        [],
        # The run's prompts have other values, and the held-out data the defaults.
        [
            *("prompts.question_column=problem", "evaluate.data.question_column=question"),
            *("prompts.system_prompt=Think", "evaluate.data.system_prompt=null"),
            *("prompts.max_prompt_tokens=32", "evaluate.data.max_prompt_tokens=512"),
            *("prompts.answer_mark='A:'", "evaluate.data.answer_mark='####'"),
            *("prompts.prompt_template='Q {question}'", "evaluate.data.prompt_template=null"),
            "prompts.chat_template_args={enable_thinking: false}",
            "evaluate.data.chat_template_args={enable_thinking: true}",
        ],
        ["evaluate.data.path=quickstart:test", "evaluate.data.question_column=question"],
    ],
)
def test_the_evaluation_samples_as_the_run_does_whatever_its_held_out_data(
    tmp_path: Path, own: list[str]
) -> None:
    """Read back by the script's own reader."""
    data = tmp_path / "my rows.jsonl"
    data.write_text('{"q": "1+1", "answer": "2"}\n')
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model/model.safetensors").touch()
    config = load(
        [
            *("conf/quickstart.yaml", f"run.root={tmp_path}", "run.name=run"),
            *(f'evaluate.data.path="{data}"', "evaluate.data.question_column=q"),
            'evaluate.data.system_prompt="Think: step by step, {x}"',
            *("evaluate.data.answer_mark=null", "evaluate.data.num_problems=null"),
            *own,
        ]
    )
    RunFolder(config.folder).publish_file(CONFIG_FILE, to_yaml(config).encode())
    words = shlex.split(dict(next_steps(config, ["conf/quickstart.yaml"], TOKENS))["evaluate it"])
    assert words[:5] == ["python", "jobs/evaluate.py", str(run), "--benchmarks", "held_out"]
    read: Config = configure(words[2], [words[4]], words[5:])
    assert read.evaluate.benchmarks == {"held_out": config.evaluate.data}
    for name in ("num_samples", "temperature", "top_p"):
        assert getattr(read.evaluate, name) == getattr(config.evaluate, name)
    assert read.evaluate.max_tokens == config.max_evaluated_tokens


def test_the_other_method_is_a_run_of_its_own_on_as_many_tokens() -> None:
    """A tree of [4, 4] steps of 23 tokens has at most 460 of them, 8 answers of 46 have 368."""
    named = steps("conf/quickstart.yaml", "run.name=mine", "run.num_steps=30")[OTHER]
    length = f"run.max_sampled_tokens={TOKENS}"
    assert math.ceil(1.2 * 30 * 460 / 368) == 45
    assert named.split(" && ")[0].endswith(
        f"conf/methods/grpo.yaml run.name=mine-grpo run.num_steps=45 {length}"
    )
    tree = steps("conf/quickstart.yaml", "conf/methods/grpo.yaml")
    back = tree["train it with TreeRPO on as many tokens, and compare"].split(" && ")[0]
    assert back.endswith(f" jobs/train.py conf/quickstart.yaml {length}"), "35 steps are fewer"


def test_the_other_method_of_a_run_whose_shape_adapts_has_one_shape() -> None:
    """[1, 16] steps of 23 tokens have at most 391 of them."""
    long = f"run.num_steps=39 run.max_sampled_tokens={TOKENS}"
    assert math.ceil(1.2 * 30 * 391 / 368) == 39
    found = steps("conf/quickstart.yaml", "conf/methods/adaptive.yaml", "run.num_steps=30")
    assert f" conf/quickstart.yaml conf/methods/grpo.yaml {long} && " in found[OTHER]
    own = (*("tree.adaptive=true", "learner.advantage=reward", "tree.num_children=[1,4]"),)
    found = steps("conf/quickstart.yaml", *own, "learner.prune_threshold=-1", "run.num_steps=30")
    assert f" conf/methods/grpo.yaml tree.adaptive=false {long} && " in found[OTHER]
    assert ADAPTIVE not in found


def test_forks_where_they_pay_are_measured_at_every_cut_of_a_run_that_has_one() -> None:
    """Single answers are the least that a learner step takes: 69 tokens of three steps of 23."""
    deep = steps(
        "conf/quickstart.yaml", "tree.num_children=[4,2,2]", "tree.step_tokens=[23,23,23]"
    )[ADAPTIVE]
    assert 4 * 23 + 8 * 23 + 16 * 23 == 644
    assert (
        " conf/methods/adaptive.yaml 'tree.num_children=[1,4,4]' "
        f"run.num_steps={math.ceil(1.2 * 36 * 644 / 69)} "
    ) in deep
    few = steps("conf/quickstart.yaml", "gate.trees_per_step=3")[ADAPTIVE]
    assert (
        f" gate.trees_per_step=24 run.num_steps={math.ceil(1.2 * 36 * 3 * 460 / (24 * 46))} " in few
    )
    for whole in ("grpo", "raft", "reinforce"):  # nothing that answers share, nothing to fork at
        found = steps("conf/quickstart.yaml", f"conf/methods/{whole}.yaml")
        assert ADAPTIVE not in found
    unmeasured = steps("conf/quickstart.yaml", "learner.fork_every=0")
    assert ADAPTIVE not in unmeasured, "what is never measured cannot be followed"


def test_what_a_run_has_of_one_method_is_not_left_in_another() -> None:
    """SPO-tree's file has a form that is not said to be another's."""
    found = steps("conf/quickstart.yaml", "conf/methods/spo_tree.yaml")
    assert " conf/quickstart.yaml conf/methods/grpo.yaml run." in found[OTHER]


def test_the_commands_do_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED_IN, str(tmp_path))  # by a script, which then went to the project
    for line in steps("conf/quickstart.yaml").values():
        assert line.startswith(f"(cd {PROJECT} && ") and " python " not in line
    monkeypatch.delenv(STARTED_IN)
    monkeypatch.chdir(tmp_path)
    found = steps(f"{PROJECT}/conf/quickstart.yaml")
    viewer = found["see the mistakes that it fixed"]
    assert viewer.startswith(f"(cd {PROJECT} && python -m treerpo_ray.viewer ")
    assert f" bash {PROJECT}/jobs/notebook.sh" in found["draw its figures"]
    assert found["evaluate it"].startswith(f"python {PROJECT}/jobs/evaluate.py ")
    assert f" {PROJECT}/conf/methods/grpo.yaml run." in found[OTHER]


def test_another_environment_than_the_active_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTUAL_ENV")
    monkeypatch.setattr(sys, "prefix", "/somewhere/else")
    assert steps("conf/quickstart.yaml")["draw its figures"].startswith(
        "TREERPO_VENV=/somewhere/else "
    )
    monkeypatch.setattr(sys, "prefix", f"{PROJECT}/.venv")
    assert steps("conf/quickstart.yaml")["draw its figures"].startswith("TREERPO_RUN=")


def test_a_ray_job_whose_folder_goes_and_a_run_in_a_store_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load(["conf/quickstart.yaml", "run.root=memory://runs"])
    assert next_steps(config, ["conf/quickstart.yaml"], TOKENS) == []
    config = load(["conf/quickstart.yaml"])
    monkeypatch.setenv(RAY_JOB, "{}")
    assert next_steps(config, ["conf/quickstart.yaml"], TOKENS) == []
