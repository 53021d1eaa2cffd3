"""A run folder holds one run: other settings are refused, and each start leaves its own."""

import shutil
import uuid
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from treerpo_ray.config import Config, load
from treerpo_ray.config.files import PAST_KEYS, to_yaml
from treerpo_ray.driver.start import (
    check_same_contents,
    contents_of,
    look_at_folder,
    reading,
    record_start,
)
from treerpo_ray.errors import RunFailed
from treerpo_ray.prompts.problems import Problem
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.run_folder.files import RunFolder

QUICK = "conf/quickstart.yaml"


@pytest.fixture(params=["disk", "store"])
def root(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}"


def started(root: str, *overrides: str) -> Config:
    """A run that has been started and has written a row."""
    config = load([QUICK, f"run.root={root}", "run.name=one", *overrides])
    record_start(config, {})
    RunFolder(config.folder).publish_file("metrics.jsonl", b'{"step": 0}\n')
    return config


def again(root: str, *overrides: str) -> Config:
    return load([QUICK, f"run.root={root}", "run.name=one", *overrides])


@pytest.mark.parametrize(
    "override",
    [
        *("run.seed=1", "learner.learning_rate=1e-3", "learner.advantage=DIFFERENCE"),
        *("tree.temperature=0.9", "prompts.path=quickstart:chains10/train", "gate.max_staleness=0"),
        *("evaluate.num_samples=2", "verifier.check=other.module", "loss.kl_coef=0.1"),
        *("model.path=other/model", "tree.num_children=[4,2]", "evaluate.data.num_problems=10"),
    ],
)
def test_a_start_with_other_settings_is_refused_with_both_values_and_a_free_name(
    root: str, override: str
) -> None:
    started(root)
    with pytest.raises(ValueError) as caught:
        look_at_folder(again(root, override))
    told, key = str(caught.value), override.partition("=")[0]
    assert "\n" not in told
    assert f"{root}/one holds a run with other settings: {key}=" in told and "(was " in told
    assert "run.name=one-2" in told


def test_a_start_with_code_of_the_users_that_was_edited_is_refused_and_each_keeps_its_own(
    root: str, tmp_path: Path
) -> None:
    check, form = tmp_path / "my reward.py", tmp_path / "form.py"
    check.write_text("ONE = '${run.seed}'\n")
    form.write_text("def form(values): return values\n")
    named = [f"verifier.check={check}", f"learner.advantage={form}:form"]
    config = started(root, *named)
    assert look_at_folder(again(root, *named)).changed == []
    check.write_text("TWO = 2\n")
    form.write_text("def form(values): return 2 * values\n")
    edited = again(root, *named)
    with pytest.raises(ValueError, match=r"other settings: .* edited, .* has been edited; g"):
        look_at_folder(edited)
    record_start(edited, {})
    folder = RunFolder(config.folder)
    assert folder.read_text("starts/000001-2-my reward.py") == "ONE = '${run.seed}'\n"
    assert folder.read_text("starts/000002-1-form.py") == "def form(values): return 2 * values\n"
    check.unlink()
    form.unlink()
    # What was run is in the run's own configuration, whatever has become of the files.
    (tmp_path / "config.yaml").write_text(folder.read_text("config.yaml"))
    assert load([str(tmp_path / "config.yaml")]).verifier.sources == edited.verifier.sources
    with pytest.raises(ValueError, match="no such file"):
        load([str(tmp_path / "config.yaml"), named[0]])
    with pytest.raises(ValueError, match=r"holds a run with other settings: .*learner\.adv"):
        look_at_folder(again(root))


def test_a_start_on_data_or_weights_that_were_made_anew_under_the_same_name_is_refused(
    root: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree("treerpo_ray/quickstart/model", model)
    config = again(root, f"model.path={model}")

    def contents(answers: tuple[str, ...] = ("4",), *, is_held_out: bool = True) -> dict[str, str]:
        problem = Problem(id="1", question="2+2", answers=answers)
        prompts = PromptSet(problems=(problem,), token_ids=([1, 2],), num_too_long=0)
        return contents_of(config, prompts, prompts if is_held_out else None)

    record_start(config, contents())
    check_same_contents(config, contents(("5",)))  # it has come to nothing yet
    RunFolder(config.folder).publish_file("metrics.jsonl", b'{"step": 0}\n')
    check_same_contents(config, contents())
    check_same_contents(config, contents(is_held_out=False))
    told = r"on other input: prompts is 1 problems \w+ \(was 1 problems \w+\), eval.*one-2"
    with pytest.raises(ValueError, match=told):
        check_same_contents(config, contents(("5",)))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"on other input: model\.path is weights \w+ \(was wei"):
        check_same_contents(config, contents())


def test_what_may_change_is_told_and_the_same_settings_are_not(root: str) -> None:
    config = started(root)
    assert look_at_folder(config).changed == look_at_folder(again(root)).changed == []
    changed = ["run.num_steps=99", "engine.num_engines=2", "engine.max_trees=3"]
    assert look_at_folder(again(root, *changed)).changed == [
        *("run.num_steps=99 (was 36)", "engine.num_engines=2 (was 1)"),
        "engine.max_trees=3 (was null)",
    ]


def test_each_start_keeps_its_configuration(root: str) -> None:
    started(root)
    record_start(again(root, "run.num_steps=40"), {})
    folder = RunFolder(f"{root}/one")
    assert folder.glob("starts/*.yaml") == ["starts/000001.yaml", "starts/000002.yaml"]
    first, second = map(folder.read_text, folder.glob("starts/*.yaml"))
    assert "num_steps: 36" in first and "num_steps: 40" in second
    assert folder.read_text("config.yaml") == second


def test_a_start_that_came_to_nothing_binds_nobody(root: str) -> None:
    record_start(again(root), {})
    assert look_at_folder(again(root, "run.seed=1")).changed == ["run.seed=1 (was 0)"]


@pytest.mark.parametrize("what", ["checkpoints/step=000003/files.json", "eval/step=000000.json"])
def test_any_result_makes_it_a_run(root: str, what: str) -> None:
    record_start(again(root), {})
    RunFolder(f"{root}/one").publish_file(what, b"{}")
    with pytest.raises(ValueError, match=r"run\.seed=1 \(was 0\)"):
        look_at_folder(again(root, "run.seed=1"))


def test_the_name_that_is_proposed_is_free_and_the_weights_that_are_there_are_named(root) -> None:
    started(root)
    RunFolder(f"{root}/one-2").publish_file("config.yaml", b"run: {}")
    RunFolder(f"{root}/one").publish_file("checkpoints/step=000003/model/config.json", b"{}")
    told = rf"run\.name=one-3 \(from its weights: model\.path={root}/one/checkpoints/step=000003/"
    with pytest.raises(ValueError, match=told):
        look_at_folder(again(root, "run.seed=1"))


def test_a_run_is_not_made_shorter_than_it_is(root: str) -> None:
    started(root)
    RunFolder(f"{root}/one").publish_file("checkpoints/step=000030/files.json", b"{}")
    assert look_at_folder(again(root, "run.num_steps=30")).changed == ["run.num_steps=30 (was 36)"]
    with pytest.raises(ValueError, match=r"done 30 learner steps, more than run\.num_steps=29"):
        look_at_folder(again(root, "run.num_steps=29"))


def test_a_folder_of_an_earlier_version_is_the_same_run_where_what_is_new_has_its_default(
    tmp_path: Path,
) -> None:
    """Keys that are gone count nothing, modules that have moved are the same."""
    config = started(str(tmp_path))
    text = to_yaml(config).replace("treerpo_ray.verifier.math_answer", "treerpo_ray.math_answer")
    lines = [line for line in text.splitlines() if "max_redraws" not in line]
    old = "\n".join(lines).replace("gate:", "gone:\n  key: 1\ngate:")
    (tmp_path / "one/config.yaml").write_text(old)
    assert look_at_folder(config).changed == []
    with pytest.raises(ValueError, match=r"gate\.max_redraws=2 \(was 0\)"):
        look_at_folder(again(str(tmp_path), "gate.max_redraws=2"))


@pytest.mark.parametrize(("key", "idle"), PAST_KEYS.items())
def test_a_run_that_did_what_this_version_no_longer_can_is_not_gone_on_with(
    key: str, idle: object, tmp_path: Path
) -> None:
    config = started(str(tmp_path))
    section, _, name = key.partition(".")
    file = tmp_path / "one/config.yaml"
    was = file.read_text()
    for value in (idle, 0.5):
        file.write_text(was.replace(f"{section}:\n", f"{section}:\n  {name}: {value}\n", 1))
        assert f"  {name}: {value}\n" in file.read_text()
        if value == idle:
            assert look_at_folder(config).changed == []
            assert load([str(file)]) == config
            continue
        with pytest.raises(ValueError, match=rf"other settings: {key} is no longer there \(was "):
            look_at_folder(config)
        with pytest.raises(ValueError, match=f"{key} is a setting of an earlier version; .*=0.0"):
            load([str(file)])


def test_many_settings_are_counted(tmp_path: Path) -> None:
    started(str(tmp_path))
    many = [*("run.seed=1", "tree.temperature=0.5", "gate.max_staleness=0", "loss.kl_coef=1")]
    with pytest.raises(ValueError, match=r"learner\.weight_decay=0\.5 \(was 0\.0\) and 1 more;"):
        look_at_folder(again(str(tmp_path), *many, "learner.weight_decay=0.5"))


def test_the_same_files_found_from_elsewhere_are_the_same_run(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path, one of a home, and those below the working folders of two Ray jobs."""
    load([])  # the defaults, which are kept, are those of the real home
    monkeypatch.setenv("HOME", str(tmp_path))
    quick = str(Path(QUICK).absolute())

    def start(name: str, path: str) -> Config:
        config = load([quick, f"run.root={root}", f"run.name={name}", f"model.path={path}"])
        record_start(config, {})
        RunFolder(config.folder).publish_file("metrics.jsonl", b"{}\n")
        return config

    model = tmp_path / "models/mine"
    model.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    for name, path in (("relative", "mine"), ("home", "~/models/mine")):
        assert start(name, path).model.path == str(model)
    monkeypatch.chdir("/")
    for name in ("relative", "home"):
        again = load([quick, f"run.root={root}", f"run.name={name}", f"model.path={model}"])
        assert look_at_folder(again).changed == []
    for job in ("_ray_pkg_0123", "_ray_pkg_4567"):
        unpacked = tmp_path / "session_x/runtime_resources/working_dir_files" / job
        (unpacked / "models/mine").mkdir(parents=True)
        monkeypatch.chdir(unpacked)
        config = start("job", "models/mine") if job.endswith("3") else None
        again = load([quick, f"run.root={root}", "run.name=job", "model.path=models/mine"])
        assert again.model.path == str(unpacked / "models/mine")
        assert config is None or config.model.path == again.model.path
        assert look_at_folder(again).changed == []


class OfAStore(Exception):
    """What a store raises that has errors of its own."""


class RefusingStore(MemoryFileSystem):
    """A store that lets nothing be read as long as it has a `fault`."""

    protocol = "refusing"
    store = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs = [""]  # noqa: RUF012
    fault: ClassVar[Exception | None] = None

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        if self.fault is not None:
            raise self.fault
        return super().cat_file(path, start, end)


@pytest.mark.parametrize("error", [PermissionError("no\nkey"), TimeoutError(), OfAStore("no key")])
def test_a_store_that_refuses_to_be_read_is_one_line(monkeypatch, error) -> None:
    fsspec.register_implementation("refusing", RefusingStore, clobber=True)
    root = f"refusing://{uuid.uuid4().hex}"
    started(root)
    look_at_folder(again(root))
    monkeypatch.setattr(RefusingStore, "fault", error)
    with pytest.raises(RunFailed) as caught:
        look_at_folder(again(root))
    told = str(caught.value)
    assert told.startswith(f"{root}/one cannot be read: {type(error).__name__}: ")
    assert "\n" not in told


def test_a_mistake_of_ours_is_not_taken_for_the_stores() -> None:
    folder = RunFolder(started(f"memory://{uuid.uuid4().hex}").folder)
    with pytest.raises(TypeError), reading(folder):
        folder.read_bytes()
