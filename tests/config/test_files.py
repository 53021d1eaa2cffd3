"""Configuration files: what they and overrides come to, and that every mistake is one line."""

import importlib
import itertools
import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

from tests.support.mistakes import mistake
from tests.support.project import PROJECT
from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.algo.loss_config import Normalisation
from treerpo_ray.config import files
from treerpo_ray.config.config import Config
from treerpo_ray.config.data import INHERITED, DataConfig
from treerpo_ray.config.files import (
    MOVED_MODULES,
    YAML,
    load,
    to_yaml,
    with_moved_modules,
)
from treerpo_ray.config.keys import describe
from treerpo_ray.evaluate.evaluation import Evaluation
from treerpo_ray.user_code import RAY_JOB, load_module, unpack

CONF = PROJECT / "conf"
FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml") if path.stem != "sweep")


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def all_keys(section: object, prefix: str = "") -> list[str]:
    assert is_dataclass(section)
    keys: list[str] = []
    for item in fields(section):
        value = getattr(section, item.name)
        inner = is_dataclass(value)
        keys += all_keys(value, f"{prefix}{item.name}.") if inner else [prefix + item.name]
    return keys


def test_nothing_given_is_the_defaults() -> None:
    assert load([]) == Config()


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_the_project_loads_alone_and_comes_back_from_its_resolved_form(
    name: str, tmp_path: Path
) -> None:
    config = load([str(CONF / name)])
    assert load([write(tmp_path, "resolved.yaml", to_yaml(config))]) == config


def test_a_resolved_configuration_reads_back_to_an_equal_one(tmp_path: Path) -> None:
    config = load(
        [
            *("learner.advantage=DIFFERENCE", "loss.normalisation=sequence_mean"),
            *('tree.delimiter="\\n"', "tree.num_children=[3, 2]", "tree.step_tokens=[5, 6]"),
            *("engine.resources={GPU: 1, rollout_slot: 0.5}", "prompts.system_prompt='a: b'"),
            *("loss.importance_cap=null", "metrics.wandb_project=null", "run.name='1e3'"),
        ]
    )
    assert config.tree.delimiter == "\n"
    assert config.run.name == "1e3"
    again = load([write(tmp_path, "resolved.yaml", to_yaml(config))])
    assert again == config
    assert again.learner.advantage is AdvantageForm.DIFFERENCE
    assert again.loss.normalisation is Normalisation.SEQUENCE_MEAN
    assert again.shape == config.shape


def test_evaluation_and_mixed_sets_have_the_settings_of_prompts_that_they_do_not_give() -> None:
    config = load(
        [
            *("prompts.question_column=q", "prompts.system_prompt=Think.", "prompts.split=dev"),
            *("prompts.chat_template_args={enable_thinking: false, depth: 2}", "prompts.path=''"),
            *("prompts.prompt_template='{question}!'", "prompts.max_prompt_tokens=99"),
            *("prompts.id_column=id", "evaluate.data={path: b.jsonl, system_prompt: null}"),
            "evaluate.benchmarks.mine={path: c.jsonl, chat_template_args: {depth: 3}}",
            "prompts.mix.some={path: a.jsonl, answer_column: null, weight: 3}",
        ]
    )
    data, mine = config.evaluate.data, config.evaluate.benchmarks["mine"]
    some = config.prompts.mix["some"]
    for each in (data, mine, some):
        assert (each.question_column, each.prompt_template) == ("q", "{question}!")
        assert each.max_prompt_tokens == 99
        assert (each.split, each.id_column, each.num_problems) == ("train", None, None)
    assert (data.system_prompt, mine.system_prompt, some.system_prompt) == (None, *2 * ["Think."])
    assert data.chat_template_args == {"enable_thinking": False, "depth": 2}
    assert mine.chat_template_args == {"depth": 3}
    assert (data.answer_column, some.answer_column, some.weight) == ("answer", None, 3.0)
    assert set(INHERITED) < {item.name for item in fields(DataConfig)}


def test_what_evaluation_has_of_prompts_is_what_they_are_in_the_end(tmp_path: Path) -> None:
    first = write(
        tmp_path, "first.yaml", "prompts: {system_prompt: a}\nevaluate: {data: {path: x}}"
    )
    config = load(["evaluate.data.answer_mark='A:'", first, "prompts.system_prompt=b"])
    assert (config.evaluate.data.system_prompt, config.evaluate.data.answer_mark) == ("b", "A:")
    assert load([write(tmp_path, "whole.yaml", to_yaml(config)), "prompts.system_prompt=c"]) == (
        replace(config, prompts=replace(config.prompts, system_prompt="c"))
    )


def test_later_arguments_win_and_keep_what_they_do_not_name(tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", "run: {seed: 1, name: first}\ngate: {max_staleness: 3}\n")
    second = write(tmp_path, "second.yml", "run: {seed: 2}\n")
    config = load([first, second])
    assert (config.run.seed, config.run.name, config.gate.max_staleness) == (2, "first", 3)
    assert load([second, first]).run.seed == 1
    assert load([first, "run.seed=5", "run.seed=6"]).run.seed == 6
    assert load(["run.seed=5", first]).run.seed == 1
    assert load([write(tmp_path, "empty.yaml", "")]) == Config()


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("gate.max_stalenes=0", "gate.max_staleness"),
        ("learner.learning_rat=1", "learner.learning_rate"),
        ("evaluate.data.paht=x", "evaluate.data.path"),
        ("gates.max_staleness=0", "gate.max_staleness"),
        ("loss.normalization=token_mean", "loss.normalisation"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_one(argument: str, near: str) -> None:
    message = mistake(argument)
    assert message.startswith(f"{argument}: unknown key {argument.split('.')[0]}")
    assert message.endswith(f"; did you mean {near}?")


def test_an_unknown_key_in_a_file_is_told_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "typo.yaml", "learner:\n  learning_rat: 1\n")
    assert mistake(path) == (
        f"{path}: unknown key learner.learning_rat; did you mean learner.learning_rate?"
    )


def test_an_unknown_key_like_no_other_points_to_the_list() -> None:
    assert mistake("zzz=1") == "zzz=1: unknown key zzz; --help lists them all"


def test_an_entry_of_a_list_that_is_none_is_told_in_words() -> None:
    for key in ("tree.step_tokens", "evaluate.pass_ks"):
        told = f"{key}=[1, a]: an entry could not be converted to Integer"
        assert mistake(f"{key}=[1, a]") == told


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("run.seed=1.5", r"run\.seed=.*: Value '1\.5' .*Integer"),
        ("run.seed=null", r"run\.seed=.*: .*None"),
        ("gate.trees_per_step=many", r"gate\.trees_per_step=.*: Value 'many' .*Integer"),
        ("model.dtype=float16", r"model\.dtype=.*: .*'float32', 'bfloat16'"),
        ("learner.advantage=foo", r"learner\.advantage: .*BERNOULLI, .*STANDARD"),
        ("tree.num_children=8", r"tree\.num_children=.*: "),
        ("tree.num_children=[a]", r"tree\.num_children=.*Integer"),
        ("engine.resources.GPU=x", r"engine\.resources\.GPU=x: .*Float"),
        ("engine.resources=[1]", r"a list stands where keys belong"),
        ("run.seed=${nowhere}", r"run\.seed: .*nowhere"),
        ("run.name=[", r"^run\.name=\[ must not have"),
        (
            "tree.num_children=[4,",
            r"num_children takes a list such as '\[4, 2\]', and this is",
        ),
        ("verifier.checks={a", r"verifier\.checks takes a mapping such as '{a: 1"),
        (
            "data.prompt_template={question} x",
            r"data\.prompt_template; did you mean prompts\.pro",
        ),
        ("prompts.seed={a", r"unknown key prompts\.seed; did you mean run\.seed\?"),
        ("model.stop=abc", r"model\.stop=.*: .*list"),
        ("prompts.path=[1]", r"prompts\.path=.*: "),
        ("prompts.mix.a=3", r"prompts\.mix\.a=.*: .*MixedConfig"),
        ("prompts.chat_template_args={a: null}", r"prompts\.chat_template_args\.a: "),
        ("model.trust_remote_code=perhaps", r"model\.trust_remote_code=.*: .*bool"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_with_its_key(argument: str, told: str) -> None:
    message = mistake(argument)
    assert re.search(told, message)
    assert message.startswith(argument.partition("=")[0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run: [\n", "not YAML"),
        ("- 1\n- 2\n", "a list stands where keys belong"),
        ("3\n", "not YAML"),
        ("run: 3\n", "RunConfig"),
        ("run:\n  seed: 1\n  seed: 2\n", "duplicate key seed"),
        (bytes(range(128, 255)), "not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_told_with_its_name(
    text: str | bytes, told: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "bad.yaml", text)
    message = mistake(path)
    assert message.startswith(f"{path}: ")
    assert told in message


def test_a_missing_file_is_told_with_the_folder_it_was_looked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mistake("gone.yaml") == f"gone.yaml: no such configuration file in {tmp_path}"
    there = ", ".join(sorted(path.stem for path in (CONF / "hardware").glob("*.yaml")))
    assert "four_by_eight, " in there
    assert mistake("conf/hardware/two_gpu.yaml") == (
        f"conf/hardware/two_gpu.yaml: no such configuration file in {tmp_path}; conf/hardware has "
        f"{there}"
    )


def test_a_file_of_the_project_is_found_from_anywhere_unless_one_of_that_name_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(["conf/quickstart.yaml"]).run.name == "quickstart"
    (tmp_path / "conf").mkdir()
    write(tmp_path, "conf/quickstart.yaml", "run: {name: mine}\n")
    assert load(["conf/quickstart.yaml"]).run.name == "mine"


def test_an_argument_that_is_neither_file_nor_override_is_refused() -> None:
    assert mistake("run") == "run: neither a .yaml file nor an override section.key=value"


@pytest.mark.parametrize(
    ("arguments", "step_tokens"),
    [
        (["tree.num_children=[8]"], (1152,)),
        (["tree.num_children=[2, 2, 2, 2, 2]"], (231, 231, 230, 230, 230)),
        (["tree.num_children=[4, 4, 4]"], (384, 384, 384)),
        (["tree.num_children=[8]", "tree.step_tokens=[50]"], (50,)),
        (["tree.num_children=[8]", "tree.num_children=[4, 2]"], (576, 576)),
        (["conf/quickstart.yaml", "conf/methods/grpo.yaml"], (46,)),
        (["conf/quickstart.yaml", "conf/tasks/chains10.yaml", "conf/methods/grpo.yaml"], (104,)),
        (["conf/quickstart.yaml", "conf/tasks/restated4.yaml", "conf/methods/raft.yaml"], (288,)),
        (["conf/quickstart.yaml", "conf/few_tokens.yaml"], (23, 23)),
        (
            ["conf/tasks/restated4.yaml", "conf/methods/raft.yaml", "tree.num_children=[1, 8]"],
            (240, 48),
        ),
        (
            ["tree.num_children=[2, 2]", "tree.step_tokens=[100, 50]", "tree.num_children=[8]"],
            (150,),
        ),
        (
            [
                *("tree.num_children=[2, 2]", "tree.step_tokens=[100, 50]"),
                *("tree.num_children=[8]", "tree.step_tokens=[99]", "tree.num_children=[2, 2]"),
            ],
            (50, 49),
        ),
        (["conf/treerpo_qwen2.5_math_1.5b.yaml", "conf/methods/rloo.yaml"], (1152,)),
    ],
)
def test_an_answer_is_as_long_as_before_where_only_the_branches_change(
    arguments: list[str], step_tokens: tuple[int, ...]
) -> None:
    found = load([str(PROJECT / a) if a.endswith(".yaml") else a for a in arguments])
    assert found.tree.step_tokens == step_tokens


def test_every_key_is_described_with_its_default_and_a_note() -> None:
    lines = describe().splitlines()
    described = {}
    for line, note in itertools.pairwise(lines):
        if found := re.fullmatch(r"  (\w+\.\w+) = (.*)", line):
            key, default = found.groups()
            assert re.match(r" {6}\w.*\.?", note), f"{key} has no note"
            described[key] = default
    top = {".".join(key.split(".")[:2]) for key in all_keys(Config())}
    assert described.keys() == top
    evaluated = {key.removeprefix("evaluate.data.") for key in all_keys(Config())}
    assert json.loads(described["evaluate.data"]).keys() <= evaluated


def test_every_section_is_described_with_what_it_is_for() -> None:
    text = describe()
    for item in fields(Config):
        assert re.search(rf"^{item.name}: \w.*\.$", text, re.MULTILINE)


def test_the_defaults_as_described_can_be_given_as_they_stand() -> None:
    shown = re.findall(r"^  (\w+\.\w+) = (.*)$", describe(), re.MULTILINE)
    assert len(shown) > 50
    assert load([f"{key}={default}" for key, default in shown]) == Config()


@pytest.mark.parametrize(("before", "now"), MOVED_MODULES.items())
def test_a_module_that_has_moved_is_found_from_files_overrides_and_stored_results(
    before: str, now: str, tmp_path: Path
) -> None:
    importlib.import_module(now)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load([])).replace(Config().verifier.check, before))
    assert before in file.read_text()
    assert load([str(file)]).verifier.check == now
    assert load([f"verifier.check={before}"]).verifier.check == now


def test_no_stored_result_names_a_module_that_is_not_there() -> None:
    paths = sorted((CONF.parent / "jobs/comparisons").glob("*/*/*-*.json"))
    results = [json.loads(path.read_text()) for path in paths]
    checks = {yaml.load(result["config"], YAML)["verifier"]["check"] for result in results}
    graded = {
        verifier
        for result in results
        for part in ("before", "after")
        if (verifier := Evaluation.from_fields(result[part]).verifier) is not None
    }
    assert checks & MOVED_MODULES.keys(), "there are results of before the move"
    for check in {*with_moved_modules([*checks]), *graded}:
        importlib.import_module(check)


def test_the_source_of_the_users_files_travels_with_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in the working folder of whoever starts; used without the file, wherever that is."""
    (tmp_path / "my dir").mkdir()
    (tmp_path / "my dir" / "a.py").write_text("X = '${run.seed} \\\\${not}'\n")
    (tmp_path / "b.py").write_text("# -*- coding: latin-1 -*-\nX = '\xe9'\n", encoding="latin-1")
    monkeypatch.chdir(tmp_path)
    config = load(
        [
            "verifier.checks={my dir/a.py: 2, b.py: 1.5, some.module: 1}",
            *("learner.advantage=b.py:form", "learner.prune=tree_range"),
        ]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    for file in ("my dir/a.py", "b.py"):
        (tmp_path / file).unlink()
    monkeypatch.chdir("/")
    again = load([str(tmp_path / "config.yaml"), "run.seed=5", "run.name=treerpo"])
    assert again.verifier == config.verifier and again.learner == config.learner
    found = {name: unpack(source) for name, source in again.verifier.sources.items()}
    assert found["my dir/a.py"] == "X = '${run.seed} \\\\${not}'\n" and set(found) == {
        "my dir/a.py",
        "b.py",
    }
    assert load_module("b.py", again.learner.sources).X == "\xe9"
    assert again.verifier.weights == {"my dir/a.py": 2, "b.py": 1.5, "some.module": 1}
    assert re.fullmatch(
        r"2 my dir/a\.py \([0-9a-f]{8}\) \+ 1\.5 b\.py \(\w{8}\) \+ 1 some\.module",
        again.verifier.identity,
    )
    # What is named anew is read anew.
    only_b = "verifier.checks={my dir/a.py: 0, some.module: 0}"
    with pytest.raises(ValueError, match=r"^verifier\.checks=b\.py: no such file \(/b\.py\)$"):
        load([str(tmp_path / "config.yaml"), only_b])
    with pytest.raises(ValueError, match=r"sees what its --working-dir holds"):
        monkeypatch.setenv(RAY_JOB, "{}")
        load(["verifier.check=gone.py"])


def test_one_check_that_is_named_behind_several_takes_their_place() -> None:
    several = "verifier.checks={a.b: 1, c.d: 2}"
    assert load([several, "verifier.check=e.f"]).verifier.weights == {"e.f": 1.0}
    assert load(["verifier.check=e.f", several]).verifier.weights == {"a.b": 1, "c.d": 2}
    again = load([several, "verifier.check=e.f", several])
    assert again.verifier.weights == {"a.b": 1, "c.d": 2}
    with pytest.raises(ValueError, match="one of them must have a weight above 0"):
        load(["verifier.checks={a.b: 0}"])


def test_an_entropy_window_that_comes_with_branches_gets_its_room_behind_the_tasks_lengths() -> (
    None
):
    task = ["tree.num_children=[2,2]", "tree.step_tokens=[100,50]"]
    shape = load([*task, "conf/methods/treerl.yaml"]).tree
    assert shape.step_tokens == (100, 58), "8 tokens may be taken of the first step"
    deeper = load(["tree.num_children=[8]", "tree.step_tokens=[90]", "conf/methods/treerl.yaml"])
    assert deeper.tree.step_tokens == (45, 53)


def test_a_run_is_the_same_in_every_home_and_in_every_job_of_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(folder: Path, *more: str) -> dict[str, object]:
        (folder / "model").mkdir(parents=True)
        for name in ("a.jsonl", "b.jsonl"):
            (folder / name).touch()
        monkeypatch.chdir(folder)
        config = load(["model.path=model", "prompts.mix.x.path=[a.jsonl, b.jsonl]", *more])
        return files.placeless(files.flat_settings(to_yaml(config)))

    first, second = (
        settings(tmp_path / f"session_{n}/runtime_resources/working_dir_files/_ray_pkg_{n * 'a'}")
        for n in (1, 2)
    )
    assert first == second
    assert first["model.path"] == "model"
