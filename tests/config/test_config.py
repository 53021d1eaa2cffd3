"""Configuration: files and overrides merge, and every mistake is one line with its key."""

import importlib
import itertools
import json
import pickle
import re
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.support.project import ROOT
from treerpo_ray.algo.advantages import AdvantageForm
from treerpo_ray.algo.loss_config import Normalisation
from treerpo_ray.config import files
from treerpo_ray.config.config import Config, credential_keys, numbers
from treerpo_ray.config.data import INHERITED, DataConfig
from treerpo_ray.config.files import MOVED_MODULES, describe, load, to_yaml, with_moved_modules
from treerpo_ray.evaluate.evaluation import Evaluation
from treerpo_ray.user_code import RAY_JOB, load_module, unpack

CONF = ROOT / "conf"
ALONE = ["tree.num_children=[1]", "tree.step_tokens=[9]"]
FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml") if path.stem != "sweep")


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def mistake(*arguments: str) -> str:
    """The message about a mistake; it must be one line."""
    with pytest.raises(ValueError) as caught:
        load(list(arguments))
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


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


@pytest.mark.parametrize("key", ["prompts.path", "evaluate.data.path", "prompts.mix.a.path"])
def test_a_list_of_files_comes_back_as_it_was_given(key: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(
        OmegaConf.to_yaml(OmegaConf.from_dotlist([f"{key}=[a b.csv, 'c,d']"]))
    )
    for given in (f"{key}=[a b.csv, 'c,d']", str(tmp_path / "list.yaml")):
        config = load([given])
        [paths] = [data.paths for data in config.data_sections.values() if data.path]
        assert paths == ("a b.csv", "c,d")
        assert load([write(tmp_path, "whole.yaml", to_yaml(config))]) == config
    assert load(["prompts.path=one.csv"]).prompts.paths == ("one.csv",)
    assert load(["prompts.path="]).prompts.path == ""


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


def test_a_number_beyond_its_limits_is_told_with_its_key() -> None:
    limited = {key: limits for key, _, limits in numbers(Config())}
    assert limited["run.num_steps"] == {"above": 0} and len(limited) > 35
    beyond = {"above": (0, "be more than 0"), "at_least": (-1, "be at least 0")}
    for key, limits in limited.items():
        for limit, (value, told) in (beyond | {"at_most": (2, "not be more than 1")}).items():
            if limit in limits:
                message = mistake(f"{key}={value}")
                assert re.fullmatch(rf"{re.escape(key)}={value}(\.0)? must {told}", message)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gate.trees_per_step=6", "learner.num_workers=4"], "gate.trees_per_step=6 must be"),
        (
            ["gate.trees_per_step=6", "learner.num_workers=2", "learner.minibatches=2"],
            "learner.num_workers=2 times learner.minibatches=2",
        ),
        (
            ["gate.trees_per_step=8", "learner.num_workers=4", "learner.min_workers=2"],
            "gate.trees_per_step=8 must be a multiple of learner.num_workers=3",
        ),
        (
            ["learner.min_workers=2"],
            "learner.min_workers=2 must be from 1 to learner.num_workers=1",
        ),
        (
            ["learner.min_workers=0"],
            "learner.min_workers=0 must be from 1 to learner.num_workers=1",
        ),
        (["learner.num_workers=2", "learner.min_workers=1"], "learner.resources.train_slot=1"),
        (
            ["learner.min_workers=1", "learner.resources={CPU: 0.4, train_slot: 1}"],
            "learner.resources.CPU=0.4 must be a multiple of 0.5",
        ),
        (["learner.token_budget=1663"], "learner.token_budget=1663 is smaller .* = 1664$"),
        (["gate.max_staleness=-1"], "gate.max_staleness=-1 must be at least 0"),
        (["verifier.false_positive_rate=20"], "verifier.false_positive_rate=20.* more than 1"),
        (
            ["tree.num_children=[8]", "tree.step_tokens=[9,9]"],
            r"tree.num_children .* not \[8\] and \[9, 9\]",
        ),
        (["tree.num_children=[]", "tree.step_tokens=[]"], "one entry for each depth"),
        (
            ALONE,
            r"learner.advantage=bernoulli compares siblings, of which tree.num_children=\[1\]",
        ),
        (
            [*ALONE, "learner.advantage=reward"],
            r"learner.prune=range with learner.prune_threshold=0\.1 leaves nothing to train",
        ),
        (
            [
                *ALONE,
                "learner.advantage=reward",
                "learner.prune=shrinkage",
                "learner.prune_threshold=-1",
            ],
            "learner.prune=shrinkage with learner.prune_threshold=-1 leaves nothing to train",
        ),
        (["tree.num_children=[8, 0, 8]"], "tree.num_children and tree.step_tokens must be pos"),
        (["engine.num_engines=3", "engine.max_engines=2"], "must not be less than engine.num_eng"),
        (["engine.max_engines=2"], "engine.max_engines=2 needs engine.max_trees"),
        (
            ["engine.resources={GPU: 0.5}", "engine.kv_cache_gib=null"],
            r"engine.kv_cache_gib is needed where a GPU is shared .*GPU: 0\.5",
        ),
        (["engine.max_trees=0"], "engine.max_trees=0 must be more than 0"),
        (
            ["run.stall_timeout_s=100", "engine.request_timeout_s=100"],
            "run.stall_timeout_s=100 must be more than engine.request_timeout_s=100, after which",
        ),
        (
            ["run.stall_timeout_s=100", "engine.request_timeout_s=9", "engine.load_timeout_s=50"],
            "run.stall_timeout_s=100 must be more than twice engine.load_timeout_s=50, after",
        ),
        (["prompts.mix.a.weight=0"], r"prompts\.mix\.a\.weight=0\.0 must be a number above 0"),
        (["prompts.mix.a.weight=.nan"], r"prompts\.mix\.a\.weight=nan must be a number above 0"),
        (["prompts.mix.a.weight=.inf"], r"prompts\.mix\.a\.weight=inf must be a number above 0"),
        (
            ["prompts.mix.a.path=x", "prompts.path=y"],
            r"prompts\.path=y and .* add prompts\.path=''",
        ),
        (
            ["prompts.mix.a.path=x", "prompts.num_problems=9"],
            r"prompts\.num_problems=9 and prompts\.mix .* add prompts\.num_problems=null",
        ),
        (
            ["prompts.mix.a.max_prompt_tokens=999"],
            r"prompts\.mix\.a\.max_prompt_tokens=999 must not be more than prompts\.max_prompt_t",
        ),
        (
            ["evaluate.data.chat_template_args={tools: [1]}"],
            r"evaluate\.data\.chat_template_args\.tools=\[1\] must be true, false, a num",
        ),
        (["model.stop=['a', '']"], r"model\.stop has an empty text"),
        (["tree.temperature=2.5"], r"tree.temperature=2\.5 must not be more than 2 in vLLM"),
        (["run.name='run[1]'"], r"run.name=run\[1\] must not have \* \? \[ or \]"),
        (["run.root=/runs/*"], r"run.root=/runs/\* must not have"),
        (["run.name=../other"], r"run.name='../other' must be a folder in run.root"),
        (["run.name=''"], r"run.name='' must be a folder in run.root"),
        (["run.name=/tmp/x"], r"run.name='/tmp/x' must be a folder in run.root"),
        (["tree.temperature=0.005"], r"tree\.temperature=0\.005 must be at least 0\.01, the low"),
        (["evaluate.temperature=0.009"], r"evaluate\.temperature=0\.009 must be at least 0\.01"),
        (["run.max_sampled_tokens=0"], "run.max_sampled_tokens=0 must be more than 0"),
        (["gate.revisit=1"], r"gate.revisit=1\.0 must be at least 0 and less than 1"),
        (["gate.revisit=-0.1"], r"gate.revisit=-0\.1 must be at least 0 and less than 1"),
        (["gate.revisit=.nan"], "gate.revisit=nan must be at least 0 and less than 1"),
        (["loss.clip_low=2"], r"loss.clip_low must be in \[0, 1\]"),
        (["loss.importance_cap=0"], "loss.importance_cap is 0: give a positive cap, or null"),
    ],
)
def test_values_that_do_not_go_together_are_refused(arguments: list[str], told: str) -> None:
    assert re.search(told, mistake(*arguments))


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
        (["conf/quickstart.yaml", "conf/few_tokens.yaml"], (23, 23)),
        (["conf/treerpo_qwen2.5_math_1.5b.yaml", "conf/methods/rloo.yaml"], (1152,)),
    ],
)
def test_an_answer_is_as_long_as_before_where_only_the_branches_change(
    arguments: list[str], step_tokens: tuple[int, ...]
) -> None:
    found = load([str(ROOT / a) if a.endswith(".yaml") else a for a in arguments])
    assert found.tree.step_tokens == step_tokens


def test_a_number_of_workers_that_may_change_is_accepted_where_each_gets_an_equal_share() -> None:
    slots = ["learner.resources.train_slot=1", "gate.trees_per_step=12"]
    config = load([*slots, "learner.num_workers=4", "learner.min_workers=1"])
    assert config.learner.fewest_workers == 1


def test_the_largest_path_that_fits_the_token_budget_is_accepted() -> None:
    assert load(["learner.token_budget=1664"]).max_path_tokens == 512 + 3 * 384 == 1664


@pytest.mark.parametrize(
    ("root", "folder"),
    [
        ("/data/runs/", "/data/runs/mine"),
        ("s3://bucket/runs", "s3://bucket/runs/mine"),
        ("s3://bucket/runs/", "s3://bucket/runs/mine"),
        ("~/runs", f"{Path.home()}/runs/mine"),
    ],
)
def test_a_run_folder_is_its_root_and_name(root: str, folder: str) -> None:
    assert load([f"run.root={root}", "run.name=mine"]).folder == folder


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


@pytest.mark.parametrize(
    "value",
    [
        "run.root=s3://AKIA:wJalr@bucket/runs",
        "run.root=https://hf_abc@example.com/runs",
        "prompts.path=https://example.com/train.jsonl?X-Amz-Signature=abc",
        "evaluate.data.path='simplecache::s3://AKIA:wJalr@bucket/test.jsonl'",
        "model.path=https://example.com/model?api_key=abc",
        "engine.labels.place=https://user:password@host/x",
        "evaluate.benchmarks.mine.path=https://user:password@host/test.jsonl",
        "evaluate.benchmarks.mine.path=https://example.com/test.jsonl?X-Amz-Signature=abc",
        "prompts.path=[a.jsonl, s3://AKIA:wJalr@bucket/b.jsonl]",
        "prompts.mix.a.path=https://user:password@host/a.jsonl",
    ],
)
def test_a_credential_in_a_setting_is_refused_and_not_repeated(value) -> None:
    key, _, secret = value.partition("=")
    with pytest.raises(ValueError, match=f"^{re.escape(key)} holds a credential") as caught:
        load([value])
    assert secret not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [["s3://bucket", "https://user:password@host"], ("", "s3://a:b@c")]
)
def test_a_credential_in_a_sequence_is_found_with_its_place(values) -> None:
    assert list(credential_keys({"places": values}, "run")) == ["run.places.1"]


@pytest.mark.parametrize(
    "value",
    [
        "run.root=s3://bucket/runs@home",
        "run.root=abfs://container@account.dfs.core.windows.net/runs",
        "prompts.path=https://example.com/train.jsonl?download=true",
        "evaluate.benchmarks.mine.path=https://example.com/test.jsonl",
        "prompts.system_prompt='Which key=value pairs? Mail a@b.c.'",
    ],
)
def test_an_address_without_a_credential_is_accepted(value) -> None:
    load([value])


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
    checks = {OmegaConf.create(result["config"]).verifier.check for result in results}
    graded = {
        verifier
        for result in results
        for part in ("before", "after")
        if (verifier := Evaluation.from_fields(result[part]).verifier) is not None
    }
    assert checks & MOVED_MODULES.keys(), "there are results of before the move"
    for check in {*with_moved_modules([*checks]), *graded}:
        importlib.import_module(check)


@pytest.mark.parametrize(
    ("root", "home", "expected"),
    [
        ("runs", "/home/me", "{here}/runs"),
        ("./a/../runs", "/home/me", "{here}/a/../runs"),
        ("~/runs", "/home/me", "/home/me/runs"),
        ("/data/runs/", "/home/me", "/data/runs"),
        ("s3://bucket/runs", "/home/me", "s3://bucket/runs"),
        (None, "/home/me", "/home/me/treerpo_runs"),
    ],
)
def test_the_folder_of_a_run_is_the_same_for_every_process(
    root, home, expected, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    files._defaults.cache_clear()
    config = load([] if root is None else [f"run.root={root}"])
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/elsewhere")
    there = pickle.loads(pickle.dumps(config))
    assert there.folder == f"{expected.format(here=tmp_path)}/treerpo"
    (tmp_path / "config.yaml").write_text(to_yaml(there))
    assert load([str(tmp_path / "config.yaml")]) == config
    files._defaults.cache_clear()


@pytest.mark.parametrize("root", ["runs", ".", "../runs"])
def test_a_run_in_the_working_folder_of_a_ray_job_is_refused(root, monkeypatch) -> None:
    monkeypatch.setenv(RAY_JOB, "{}")
    with pytest.raises(ValueError, match=rf"^run\.root={root}: the working folder of a Ray job"):
        load([f"run.root={root}"])
    assert load(["run.root=/runs"]).folder == "/runs/treerpo"
    assert load(["run.root=s3://bucket"]).folder == "s3://bucket/treerpo"


def test_a_home_that_is_not_there_is_one_line_unless_another_place_is_named(monkeypatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    files._defaults.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"^run\.root=~/treerpo_runs: there is no such home"):
            load([])
        assert load(["run.root=/runs"]).folder == "/runs/treerpo"
    finally:
        files._defaults.cache_clear()


def test_paths_are_whole_before_processes_with_other_working_folders_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load([])  # the defaults, which are kept, are those of the real home
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mine", "org"):
        (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / "train.jsonl").touch()

    def found(key: str, path: str) -> str:
        return str(attrgetter(key)(load([f"{key}={path}"])))

    for key in ("model.path", "prompts.path", "evaluate.data.path"):
        for path in ("mine/model", "./mine/model", "~/mine/model", "org/model", "train.jsonl"):
            assert found(key, path) == str(tmp_path / path.removeprefix("~/"))
        # What is not there may be on the Hub, in a store, or embedded; others say what is not.
        for path in (
            "Qwen/Qwen2.5",
            "s3://bucket/model",
            "quickstart:train",
            "./gone",
            "~nobody/x",
        ):
            assert found(key, path) == path
    monkeypatch.chdir(ROOT)
    assert Config().model.path == found("model.path", "treerpo_ray/quickstart/model")
    assert Config().model.path == "treerpo_ray/quickstart/model", "as it is found from anywhere"


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


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{question} Think.",
            "Q: {question}",
            "{question}",
            "* {question}\n#",
            "yes",
            "12",
            "1e3",
        ),
        *("[INST] {question}", "# {question}", "\"a\" or 'b'", "It's {question}", "{question}\\n"),
        *("Solve ${question}$.", "costs ${5}, \\${x}", "%{question} é 🙂", "- a", " {question} "),
    ],
)
def test_a_text_on_the_command_line_is_itself(text: str, tmp_path: Path) -> None:
    """Whatever YAML or OmegaConf would make of it, and again from the `config.yaml` of its run."""
    found = load([f"prompts.system_prompt={text}"])
    assert found.prompts.system_prompt == text == found.evaluate.data.system_prompt
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(found), encoding="utf-8")
    assert load([str(file)]) == found
    mixed = load([f"prompts.mix.a.system_prompt={text}", "prompts.mix.a.path=x"])
    assert mixed.prompts.mix["a"].system_prompt == text


def test_quotes_around_all_of_a_text_are_not_of_it_and_null_is_none() -> None:
    def of(value: str) -> str | None:
        return load([f"prompts.system_prompt={value}"]).prompts.system_prompt

    assert of('"{question}\\n!"') == "{question}\n!"
    assert of("'null'") == "null"
    assert of("null") is None and of("") is None
    assert load(["prompts.path=[a.csv, b.csv]"]).prompts.paths == ("a.csv", "b.csv")
