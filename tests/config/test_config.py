"""Configuration: its rules refuse what does not go together, and what it tells of a run."""

import pickle
import re
from pathlib import Path

import pytest

from tests.support.mistakes import mistake
from tests.support.project import PROJECT
from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.config import files
from treerpo_ray.config.config import Config, credential_keys, numbers
from treerpo_ray.config.files import load, to_yaml
from treerpo_ray.user_code import RAY_JOB

ALONE = ["tree.num_children=[1]", "tree.step_tokens=[9]"]
ADAPTIVE = [str(PROJECT / "conf/methods/adaptive.yaml")]
FP8 = ["engine.quantization=fp8", "engine.resources={GPU: 1}", "model.dtype=bfloat16"]


def test_a_number_beyond_its_limits_is_told_with_its_key() -> None:
    limited = {key: limits for key, _, limits in numbers(Config())}
    assert limited["run.num_steps"] == {"above": 0} and len(limited) > 35
    beyond = {"above": (0, "be more than 0"), "at_least": (-1, "be at least 0")}
    for key, limits in limited.items():
        for limit, (value, told) in (beyond | {"at_most": (2, "not be more than 1")}).items():
            if limit in limits:
                message = mistake(f"{key}={value}")
                assert re.fullmatch(rf"{re.escape(key)}={value}(\.0)? must {told}", message)


@pytest.mark.parametrize("num_children", ["[1]", "[8]", "[1, 4]", "[4, 4]"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_trees_and_whole_answers_take_a_shrunk_baseline_by_its_method_file(
    num_children: str, share: float
) -> None:
    file = PROJECT / "conf/methods/shrunk_baseline.yaml"
    overrides = [f"tree.num_children={num_children}", f"learner.baseline_share={share}"]
    learner = load([str(file), *overrides]).learner
    assert (learner.form, learner.baseline_share) == (AdvantageForm.SHRUNK_BASELINE, share)


def test_a_shape_that_adapts_lies_between_single_answers_and_the_largest_forks() -> None:
    found = load([*ADAPTIVE, "tree.num_children=[2, 3, 1, 2]", "tree.step_tokens=[9, 8, 7, 6]"])
    assert [shape.num_children for shape in found.shapes] == [
        *((2, 3, 1, 2), (1, 1, 1, 1)),
        *((1, 16, 1, 1), (1, 1, 1, 16)),
    ]
    assert {shape.step_tokens for shape in found.shapes} == {(9, 8, 7, 6)}
    assert found.largest_shape.num_children == (1, 16, 1, 1)
    wide = load([*ADAPTIVE, "tree.num_children=[8, 8]"])
    assert wide.largest_shape == wide.shape, "those that measure"
    fixed = load(["tree.num_children=[4, 4]"])
    assert fixed.shapes == (fixed.largest_shape,) == (fixed.shape,)


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
        (["learner.offload=true"], "learner.offload=true needs learner.shard=true"),
        (
            ["learner.num_workers=2", "learner.resources={GPU: 0.5}"],
            r"learner\.num_workers=2 with GPU: 0\.5 in learner\.resources puts several workers on",
        ),
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
        (
            ["learner.baseline_share=0.3", "learner.advantage=past_baseline"],
            r"learner.baseline_share=0\.3 is of learner.advantage=shrunk_baseline alone: set that",
        ),
        (
            [str(PROJECT / "conf/methods/raft.yaml"), "learner.length_weight=0.5"],
            r"learner\.length_weight=0\.5 compares right siblings, .*=\[1\] has none: set it to 0",
        ),
        (
            [*ADAPTIVE, "tree.num_children=[8]"],
            r"tree.adaptive=true measures forks .*, of which tree.num_children=\[8\] has none: set",
        ),
        ([*ADAPTIVE, "tree.num_children=[8, 1]"], r"num_children=\[8, 1\] has none"),
        ([*ADAPTIVE, "learner.fork_every=0"], "learner.fork_every=0 measures in none, and tree.ad"),
        (
            [*ADAPTIVE, "gate.trees_per_step=1"],
            "gate.trees_per_step=1 gives tree.adaptive=true no t",
        ),
        ([*ADAPTIVE, "learner.fork_every=1"], "learner.fork_every=1 measures in every step, and"),
        (
            [*ADAPTIVE, "learner.advantage=bernoulli"],
            "bernoulli compares siblings, of which a single answer of tree.adaptive=true has none",
        ),
        (
            [*ADAPTIVE, "learner.length_weight=1"],
            r"length_weight=1 .* of which a single answer of tree.adaptive=true has none: set it",
        ),
        (
            [*ADAPTIVE, "learner.prune_threshold=0.1"],
            r"threshold=0\.1 leaves nothing to train of a single answer of tree\.adaptive=true",
        ),
        (["tree.num_children=[8, 0, 8]"], "tree.num_children and tree.step_tokens must be pos"),
        (["engine.num_engines=3", "engine.max_engines=2"], "must not be less than engine.num_eng"),
        (["engine.max_engines=2"], "engine.max_engines=2 needs engine.max_trees"),
        (
            ["engine.resources={GPU: 0.5}", "engine.kv_cache_gib=null"],
            r"engine.kv_cache_gib is needed where a GPU is shared .*GPU: 0\.5",
        ),
        (["engine.sleep=true", "gate.max_staleness=1"], "engine.sleep=true needs gate.max_stale"),
        (
            ["sync.transport=nccl", "engine.resources={GPU: 0.5}", "learner.resources={GPU: 0.5}"],
            r"sync\.transport=nccl needs a GPU for each .* have GPU: 0\.5 and 0\.5 in .*=ipc",
        ),
        (["lora.target_modules=[q_proj]"], r"lora\.target_modules=\['q_proj'\] has no effect with"),
        (
            ["sync.transport=ipc", "gate.max_staleness=0", "engine.num_engines=2"],
            r"sync\.transport=ipc needs one worker and one engine, .*=1 and 2 engine\(s\): set it",
        ),
        (
            ["sync.transport=ipc", "gate.max_staleness=1"],
            r"^sync\.transport=ipc needs gate\.max_staleness=0, not 1: an engine may still",
        ),
        (
            [
                *("sync.transport=ipc", "gate.max_staleness=0"),
                *("engine.resources={GPU: 1}", "learner.resources={GPU: 1}"),
            ],
            r"sync\.transport=ipc needs worker and engine to share a GPU, .* GPU: 1 and 1 in .*",
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
        (["loss.clip_low=2"], r"loss.clip_low must be in \[0, 1\]"),
        (["loss.importance_cap=0"], "loss.importance_cap is 0: give a positive cap, or null"),
        (["engine.quantization=fp8"], r"^engine\.quantization=fp8 needs GPUs .* 8\.9 or newer"),
        (
            FP8[:2],
            r"^engine\.quantization=fp8 rounds .* model\.dtype=float32: set that to bfloat16",
        ),
        (
            [*FP8, "loss.importance_cap=null"],
            r"^engine\.quantization=fp8 has engines sample .* set loss\.importance_cap",
        ),
        (
            [*FP8, "sync.probe_tolerance=0.1"],
            r"^sync\.probe_tolerance=0\.1 is less than .* engine\.quantization=fp8 .* to 0\.5$",
        ),
        (["engine.quantization=int4"], "engine.quantization"),
        (["lora.rank=513"], "lora.rank=513 must not be more than 512, the largest that vLLM"),
        (["lora.rank=-1"], "lora.rank=-1 must be at least 0"),
    ],
)
def test_values_that_do_not_go_together_are_refused(arguments: list[str], told: str) -> None:
    assert re.search(told, mistake(*arguments))


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
