"""What is looked at before a run, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.support.project import PROJECT
from treerpo_ray.config import Config, load
from treerpo_ray.preflight.inputs import Inputs, load_inputs, preflight
from treerpo_ray.quickstart.exercises import MODELS, MODELS_FOLDER
from treerpo_ray.quickstart.make_model import RECIPES

QUICKSTART = [
    *(str(PROJECT / "conf/quickstart.yaml"), "run.root=/runs"),
    *("prompts.num_problems=100", "evaluate.data.num_problems=20"),
]


def inputs(*overrides: str) -> Inputs:
    config: Config = load([*QUICKSTART, *overrides])
    return load_inputs(config)


def test_what_one_machine_cannot_hold_in_memory_is_refused_with_the_key(monkeypatch) -> None:
    for overrides, key in (
        (["engine.kv_cache_gib=3", "engine.num_engines=2"], "lower engine.kv_cache_gib=3"),
        (["learner.token_budget=90000", "gate.trees_per_step=480"], "lower learner.token_budget="),
    ):
        with pytest.raises(ValueError, match=r"this machine has 4\.0") as caught:
            preflight(load([*QUICKSTART, *overrides]), memory_gib=lambda: 4.0).inputs()
        assert key in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # nodes have their own
    overrides = ["engine.kv_cache_gib=3", "engine.num_engines=2"]
    preflight(load([*QUICKSTART, *overrides]), memory_gib=lambda: 4.0).inputs()


def test_a_small_model_that_is_not_made_yet_is_named_with_its_command(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where nothing is made
    for name in MODELS:
        with pytest.raises(ValueError, match=rf"quickstart\.make_model {name}$"):
            inputs(f"model.path={MODELS_FOLDER}/{name}")
    assert set(MODELS) == set(RECIPES)


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


@pytest.fixture
def odd_model(tmp_path, monkeypatch) -> Path:
    """The folder of a model whose classes are `Config` and `Model` of its own odd.py, which has
    yet to be written."""
    modules = "transformers.dynamic_module_utils.HF_MODULES_CACHE"  # where code is copied to
    monkeypatch.setattr(modules, str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    shutil.copytree(PROJECT / "treerpo_ray/quickstart/model", folder)
    odd = {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}
    named = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(named | {"model_type": "odd", "auto_map": odd}))
    return folder


def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(odd_model, tmp_path) -> None:
    folder, marker = odd_model, tmp_path / "marker"
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


LAYERS_UNKNOWN = """
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

class Layer(nn.Module):
    forward = Qwen2DecoderLayer.forward

class Config(Qwen2Config):
    model_type = "odd"

class Model(Qwen2ForCausalLM):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__ = Layer
"""


def test_a_model_that_does_not_say_what_its_layers_are_is_not_sharded(odd_model: Path) -> None:
    (odd_model / "odd.py").write_text(LAYERS_UNKNOWN)
    given = [f"model.path={odd_model}", "model.trust_remote_code=true"]
    inputs(*given)
    for key in ("shard", "compile", "gradient_checkpointing"):
        told = rf"^model\.path=\S+: learner\.{key}=true needs .*Model does not: set l"
        with pytest.raises(ValueError, match=told) as caught:
            inputs(*given, f"learner.{key}=true")
        assert "\n" not in str(caught.value)


def test_a_model_folder_without_a_model_is_one_line_with_its_key(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^model\.path=.*") as caught:
        preflight(load([*QUICKSTART, f"model.path={tmp_path}"]))
    assert "\n" not in str(caught.value)
