"""What a run is called where nobody says, and which settings make it another one."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from treerpo_ray.config import Config, load
from treerpo_ray.config.data import DataConfig
from treerpo_ray.config.files import flat_settings, to_yaml
from treerpo_ray.config.identity import FREE, LONG_NAME, differences, flatten, is_free
from treerpo_ray.config.sections import EvaluateConfig, RunConfig
from treerpo_ray.study.comparisons.comparison import read_comparison

QUICK = "conf/quickstart.yaml"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "treerpo"),
        ([QUICK], "quickstart"),
        ([QUICK, "conf/methods/dapo.yaml", "run.seed=1"], "quickstart-dapo-seed=1"),
        (["run.seed=1", QUICK], "seed=1-quickstart"),
        ([QUICK, "run.name=mine", "run.seed=1"], "mine"),
        ([QUICK, "tree.num_children=[4, 2]"], "quickstart-num_children=4_2-a145d818"),
        ([QUICK, 'tree.delimiter="\'"'], "quickstart-delimiter="),
        # Where it is and on what it runs is not what it is.
        ([QUICK, "run.root=/runs", "engine.num_engines=2", "run.num_steps=99"], "quickstart"),
        (["conf/quickstart.yaml", "conf/hardware/one_gpu.yaml"], "quickstart-one_gpu"),
        # Several sections have a path, a seed only one.
        ([QUICK, "prompts.path=a.jsonl"], "quickstart-prompts.path=a.jsonl"),
    ],
)
def test_a_run_without_a_name_is_named_after_its_files_and_what_makes_it_another(
    arguments: list[str], name: str
) -> None:
    assert load(arguments).run.name == name


def test_names_that_lose_characters_or_are_too_long_are_told_apart() -> None:
    texts = ["a/b", "a_b", "a b", "a?b", "x" * 200 + "1", "x" * 200 + "2", "../../b"]
    names = [load([f"prompts.path='{text}'"]).run.name for text in texts]
    assert len(set(names)) == len(names)
    assert all(len(name) <= LONG_NAME + 9 and "/" not in name for name in names)


def test_a_name_that_would_be_long_tells_all_in_few_words(tmp_path: Path) -> None:
    """Paths by their last part, texts by their beginning; the checksum tells what is left out."""
    (tmp_path / "my_reward.py").write_text("")
    data = [f"prompts.path={tmp_path}/train.jsonl", f"evaluate.data.path={tmp_path}/test.jsonl"]
    text = "prompts.prompt_template={question} Think about it step by step, then box the answer."
    cases = {
        f"verifier.check={tmp_path}/my_reward.py": (
            "quickstart-prompts.path=train.jsonl-data.path=test.jsonl-and_2_more"
        ),
        text: "quickstart-prompts.path=train.jsonl-data.path=test.jsonl-and_2_more",
    }
    for override, expected in cases.items():
        name = load([QUICK, *data, override, "run.seed=1"]).run.name
        assert re.fullmatch(f"{expected}-[0-9a-f]{{8}}", name), name
    name = load([QUICK, text, "run.seed=1"]).run.name
    expected = "quickstart-prompts.prompt_template=question_Think_about_it-seed=1"
    assert re.fullmatch(f"{expected}-[0-9a-f]{{8}}", name), name
    seeds = {load([QUICK, *data, text, f"run.seed={seed}"]).run.name for seed in range(4)}
    assert len(seeds) == 4  # though no seed is read in them
    assert max(map(len, seeds)) <= 80
    many = [f"learner.learning_rate={rate}e-5" for rate in range(1, 9)]
    assert len(load([QUICK, *many]).run.name) <= 80


def test_the_name_of_a_written_configuration_is_the_one_in_it(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: kept, seed: 3}\n")
    assert load([str(tmp_path / "config.yaml"), "run.num_steps=5"]).run.name == "kept"


def test_no_setting_of_what_is_learned_or_measured_is_free() -> None:
    fixed = {key for key, _ in flatten({"run": {"seed": 0}, "gate": {"max_staleness": 1}})}
    fixed |= {"learner.learning_rate", "learner.advantage", "loss.clip_low", "prompts.path"}
    fixed |= {"model.path", "model.dtype", "evaluate.num_samples", "evaluate.data.path"}
    fixed |= {"verifier.check", "tree.temperature", "run.seed"}
    assert not any(map(is_free, fixed))
    assert all(map(is_free, ("engine.resources.GPU", "metrics.wandb_project", "run.num_steps")))
    assert not is_free("learner.num_workers_more") and not is_free("evaluate.everything")


def test_every_free_key_exists() -> None:
    keys = [key for key, _ in flatten(asdict(Config()))]
    for free in FREE:
        assert any(key == free or key.startswith(free) for key in keys), free


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ([], ["prompts.chat_template_args.a=high"],
         ["prompts.chat_template_args.a=high (was not set)",
          "evaluate.data.chat_template_args.a=high (was not set)"]),
        (["prompts.chat_template_args.a=1"],
         ["prompts.chat_template_args.a=2", "evaluate.data.chat_template_args.a=1"],
         ["prompts.chat_template_args.a=2 (was 1)"]),
        (["prompts.chat_template_args.a=1"], ["evaluate.data.chat_template_args.a=1"],
         ["prompts.chat_template_args.a is not set (was 1)"]),
        (["prompts.mix.a.path=x"], ["prompts.mix.a.path=x", "prompts.mix.a.weight=2"],
         ["prompts.mix.a.weight=2.0 (was 1.0)"]),
        (["prompts.mix.a.path=x", "prompts.mix.b.path=y"], ["prompts.mix.a.path=x"],
         ["prompts.mix.b.path is not set (was y)"]),
        (["prompts.path=a.csv"], ["prompts.path=[a.csv, b.csv]"],
         ['prompts.path=["a.csv", "b.csv"] (was a.csv)']),
        ([], ["model.stop=[x]"], ["model.stop=['x'] (was [])"]),
        ([], ["prompts.prompt_template='{question}!'"],
         ["prompts.prompt_template={question}! (was null)",
          "evaluate.data.prompt_template={question}! (was null)"]),
    ],
)  # fmt: skip
def test_a_setting_with_names_of_the_users_own_makes_another_run(before, now, told) -> None:
    first, second = (
        flat_settings(to_yaml(load([*arguments, "run.name=x"]))) for arguments in (before, now)
    )
    found = differences(first, second)
    assert [each for each in found if each in told or "mix.b." not in each] == told
    assert len(differences(second, first)) == len(found)
    assert not any(map(is_free, ("prompts.mix", "prompts.chat_template_args", "model.stop")))


def test_names_that_leave_their_folder_are_refused_wherever_they_are_given(tmp_path: Path) -> None:
    outside = ("../x", "a/../../x", "/etc/x", "..", "a\\b", "a\nb", "x" * 256)
    for name in outside:
        with pytest.raises(ValueError, match=r"run\.name"):
            RunConfig(name=name)
        with pytest.raises(ValueError, match=r"^evaluate\.benchmarks: "):
            EvaluateConfig(benchmarks={name: DataConfig()})
        for key in ("settings", "arms"):
            parts = {
                "settings": {"s": {"answer_tokens": 1, "sampled_tokens": 1}},
                "arms": {"a": {}},
            }
            parts[key] = {name: next(iter(parts[key].values()))}
            text = {"base": [], "references": [], **parts}
            (tmp_path / "comparison.yaml").write_text(json.dumps(text))
            with pytest.raises(ValueError, match=key):
                read_comparison(str(tmp_path / "comparison.yaml"))
    assert RunConfig(name="group/mine é 1").name == "group/mine é 1"
