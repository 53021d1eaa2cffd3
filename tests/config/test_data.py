"""Data sections: paths that every process finds, one or several."""

from operator import attrgetter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.support.project import PROJECT
from treerpo_ray.config.config import Config
from treerpo_ray.config.data import DataConfig, MixedConfig, PromptsConfig, as_found_here
from treerpo_ray.config.files import load, to_yaml


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


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
    monkeypatch.chdir(PROJECT)
    assert Config().model.path == found("model.path", "treerpo_ray/quickstart/model")
    assert Config().model.path == "treerpo_ray/quickstart/model", "as it is found from anywhere"


def test_of_a_list_each_path_is_whole_and_a_list_of_one_is_that_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    both = DataConfig(path='["a.jsonl", "s3://bucket/b.jsonl"]')
    assert both.paths == (f"{tmp_path}/a.jsonl", "s3://bucket/b.jsonl")
    assert DataConfig(path='["a.jsonl"]').path == f"{tmp_path}/a.jsonl"
    assert DataConfig(path=both.path) == both
    assert DataConfig(path='["a.jsonl", ').path == '["a.jsonl", ', "told when it is read"
    assert DataConfig().paths == ("",)


def test_a_pattern_is_whole_whether_or_not_it_fits_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for pattern in ("data/*.parquet", "part-?.jsonl", "[ab].csv"):
        assert as_found_here(pattern) == f"{tmp_path}/{pattern}"
    for as_it_is in ("", "hf://data/*.csv", "x" * 5000, "~nobody/data"):
        assert as_found_here(as_it_is) == as_it_is


def test_sets_have_names_where_there_are_several() -> None:
    one, two = MixedConfig(path="a.jsonl"), MixedConfig(path="b.jsonl", weight=2.0)
    assert PromptsConfig().sets == PromptsConfig(mix={"a": one}).sets == ()
    assert PromptsConfig(mix={"a": one, "b": two}).sets == ("a", "b")
