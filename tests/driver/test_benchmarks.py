"""Benchmarks: a job on local files with the small model, and what it says of wrong input."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import ray
import rich.console

from tests.support.project import PROJECT
from tests.support.stages.pool_without_nodes import PoolWithoutNodes
from treerpo_ray.actor import make_actor
from treerpo_ray.config.files import load, to_yaml
from treerpo_ray.driver.benchmarks import (
    changed_settings,
    check_folder,
    check_length,
    check_memory,
    configure,
    evaluate_all,
    load_benchmarks,
    place_of,
    run_benchmarks,
    source_of,
)
from treerpo_ray.driver.versions import AgreedVersions, versions_here
from treerpo_ray.evaluate.evaluation import Evaluation
from treerpo_ray.evaluate.report import comparison, read_samples, table, with_mean
from treerpo_ray.metrics.console import Console
from treerpo_ray.prompts.prompt_set import PromptSet, load_tokenizer
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.search.tree_pool import TreePool
from treerpo_ray.task import TreePoolApi

MODEL = str(PROJECT / "treerpo_ray/quickstart/model")
VERSIONS = AgreedVersions.of_driver(versions_here())


def test_the_preset_has_the_papers_sampling_and_its_benchmarks() -> None:
    config = configure(MODEL, ["math500", "aime24"], [])
    settings = config.evaluate
    assert (settings.num_samples, settings.temperature, settings.top_p) == (8, 0.6, 0.95)
    assert settings.max_tokens == 1152
    assert list(settings.benchmarks) == ["math500", "aime24"]
    assert config.max_model_tokens == 512 + 1152
    everything = configure(MODEL, [], []).evaluate.benchmarks
    assert {"math500", "olympiadbench", "minerva", "aime24", "amc", "gsm8k"} <= everything.keys()


@pytest.mark.parametrize(
    ("names", "overrides", "told"),
    [
        (["math5000"], [], r"^--benchmarks: no benchmark math5000; there are math500, "),
        ([], ["evaluate.pass_ks=[16]"], r"^evaluate\.pass_ks=\[16\] must lie between 1 and"),
        ([], ["evaluate.top_p=1.5"], r"^evaluate\.top_p=1\.5 must not be more than 1"),
        ([], ["evaluate.max_tokens=0"], r"^evaluate\.max_tokens=0 must be more than 0"),
        ([], ["evaluate.data.num_problems=9"], r"^evaluate\.data\.num_problems=9: .*NAME\.num_pr"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(names, overrides, told) -> None:
    with pytest.raises(ValueError, match=told):
        configure(MODEL, names, overrides)


def test_a_run_folder_stands_for_its_model_and_settings(tmp_path: Path) -> None:
    settings = "verifier: {num_workers: 3}\nlora: {rank: 4}\n"
    (tmp_path / "config.yaml").write_text(settings)
    with pytest.raises(ValueError, match="neither a model nor a checkpoint"):
        configure(str(tmp_path), [], [])
    (tmp_path / "checkpoints/step=000004/adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a run with lora\.rank hold adapters alone"):
        configure(str(tmp_path), [], [])
    for name in ("checkpoints/step=000004/model", "checkpoints/step=000012/model", "model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_text("")
        config = configure(str(tmp_path), [], [])
        assert config.model.path == str(tmp_path / name)
        assert config.verifier.num_workers == 3
        assert not config.lora.rank, "they are merged into it"


def test_a_model_and_the_run_that_is_called_as_its_folder_have_results_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("given/mine/model", "treerpo_runs/mine/model"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.safetensors").write_text("")
    (tmp_path / "treerpo_runs/mine/config.yaml").write_text("{}")
    places = ("given/mine/model", "treerpo_runs/mine", "treerpo_runs/mine/model")
    names = [configure(f"{tmp_path}/{place}", [], []).run.name for place in places]
    assert names == ["eval-mine-model", "eval-mine", "eval-mine"]


def test_a_run_is_found_by_its_name_and_code_of_its_model_is_not_run_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "treerpo_runs/mine"
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.safetensors").write_text("")
    text = "model: {trust_remote_code: true}\nrun: {root: /home/somebody/else, name: theirs}\n"
    (folder / "config.yaml").write_text(text)
    assert place_of("mine") == str(folder) and place_of("gpt2") == "gpt2"
    config = configure(place_of("mine"), [], [])
    assert config.model.path == str(folder / "model")
    assert config.folder == f"{folder.parent}/eval-mine"  # beside it, wherever it was made
    assert not config.model.trust_remote_code
    asked = configure(place_of("mine"), [], ["model.trust_remote_code=true"])
    trusted = configure(place_of("mine"), [], [], trusts_run=True)
    assert asked.model.trust_remote_code and trusted.model.trust_remote_code
    told = rf"^nobody: neither a folder here nor a run in {folder.parent}; model\.path=nobody: HF_"
    with pytest.raises(ValueError, match=told):
        run_benchmarks(configure("nobody", [], []), "nobody", Console())


def test_a_benchmark_has_the_prompts_of_the_run_where_it_does_not_say_otherwise(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_text("")
    run = load(
        ["prompts.prompt_template='{question}!'", "prompts.question_column=q",
         "prompts.chat_template_args.enable_thinking=false", "prompts.answer_mark=null",
         "prompts.system_prompt=Think.",
         "prompts.mix.a.path=x", "prompts.max_prompt_tokens=33", "model.stop=[x]"]
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    own = "evaluate.benchmarks.own={path: own.csv, answer_column: a}"
    config = configure(str(tmp_path), ["math500", "gsm8k", "own"], [own])
    paper, mine = config.evaluate.benchmarks["gsm8k"], config.evaluate.benchmarks["own"]
    for each in (paper, mine):
        assert each.prompt_template == "{question}!"
        assert each.chat_template_args == {"enable_thinking": False}
    assert (paper.question_column, paper.answer_mark, paper.max_prompt_tokens) == (
        "question", "####", 512
    )  # fmt: skip
    assert paper.system_prompt.startswith("Please reason")
    assert (mine.question_column, mine.answer_column, mine.answer_mark) == ("q", "a", None)
    assert (mine.system_prompt, mine.max_prompt_tokens) == ("Think.", 33)
    assert config.model.stop == ("x",) and not config.prompts.mix
    assert config.max_model_tokens == 512 + 1152


def test_a_run_or_model_at_a_uri_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("verifier: {num_workers: 3}\n")
    (tmp_path / "model/parts").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "parts/more"):
        (tmp_path / "model" / name).write_text(name)
    uri = f"memory:/{tmp_path}/mine"
    fsspec.filesystem("memory").put(str(tmp_path), uri, recursive=True)
    for place in (uri, f"{uri}/", f"{uri}/model"):
        config = configure(place, [], [])
        fetched = Path(config.model.path)
        for path in (tmp_path / "model").rglob("*.*"):
            assert (fetched / path.name).read_text() == path.name
        assert (fetched / "parts/more").read_text() == "parts/more"
        assert config.run.name == "eval-mine"
        assert config.verifier.num_workers == (1 if place.endswith("model") else 3)
    assert configure(f"file://{tmp_path}", [], []).model.path == f"{tmp_path}/model"
    with pytest.raises(ValueError, match=rf"^{uri}/none: neither a run .* nor a model"):
        configure(f"{uri}/none", [], [])


def test_a_model_has_one_name_however_it_is_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    written = ("mine", "mine/", "mine/model", f"{tmp_path}/mine", f"file://{tmp_path}/mine/model/")
    assert {source_of(model) for model in written} == {f"file://{tmp_path}/mine"}
    assert source_of("Qwen/Qwen2.5-Math-1.5B") == "Qwen/Qwen2.5-Math-1.5B"


@pytest.mark.parametrize("place", ["", "memory:/"])
def test_a_folder_with_results_of_another_model_is_refused(place: str, tmp_path: Path) -> None:
    folder = RunFolder(f"{place}{tmp_path}/eval-mine")
    check_folder(folder, "mine")  # there is nothing yet
    for name, fields in (("old", {}), ("aime24", {"model": "mine"})):
        folder.publish_file(f"eval/{name}.json", json.dumps(fields).encode())
    check_folder(folder, "mine")
    with pytest.raises(ValueError, match=r"eval-mine holds results of mine: .*run\.name="):
        check_folder(folder, "other/mine")


def test_a_benchmark_that_is_not_there_is_one_line_with_its_key() -> None:
    overrides = ["evaluate.benchmarks.math500.path=gone.jsonl"]
    config = configure(MODEL, ["math500"], overrides)
    with pytest.raises(ValueError, match=r"^evaluate\.benchmarks\.math500\.path=gone\.jsonl"):
        load_benchmarks(config, load_tokenizer(MODEL, False))


def test_answers_longer_than_the_model_takes_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^evaluate\.max_tokens=1152 .* 1664 tokens; .* 511$"):
        check_length(configure(MODEL, ["math500"], []))
    check_length(configure(MODEL, ["quickstart"], ["evaluate.max_tokens=46"]))


def test_engines_that_do_not_fit_their_gpu_are_one_line_before_anything_is_started() -> None:
    small = ["engine.resources={GPU: 1}", "engine.gpu_memory_gib=1", "evaluate.max_tokens=46"]
    with pytest.raises(ValueError, match=r"^engine\.gpu_memory_gib=1: an engine of .* lower"):
        check_memory(configure(MODEL, ["quickstart"], small))
    told = check_memory(configure(MODEL, ["quickstart"], ["evaluate.max_tokens=46"]))
    assert told.startswith("an engine takes ") and "KV cache" in told and "\n" not in told


@pytest.mark.ray
def test_a_job_whose_engines_are_gone_says_so_and_ends(ray_cluster, tmp_path: Path) -> None:
    def make(kind: Callable[..., object], **options: object) -> Callable[..., object]:
        return make_actor(PoolWithoutNodes if kind is TreePool else kind, **options)

    limits = ["run.stall_timeout_s=2", "engine.request_timeout_s=1", "engine.load_timeout_s=0.5"]
    config = configure(MODEL, ["quickstart"], [*limits, f"run.root={tmp_path}"])
    shown = io.StringIO()
    console = Console(console=rich.console.Console(file=shown, width=200))
    prompts = PromptSet(problems=(), token_ids=(), num_too_long=0)
    with pytest.raises(RuntimeError, match=r"nothing moved for \d+ s: evaluation"):
        dict(
            evaluate_all(
                config,
                "mine",
                {"one": prompts},
                None,
                console,
                VERSIONS,
                make_actor=make,
                make_scorer=lambda **settings: io.BytesIO(),
            )
        )
    assert "engine lost: engine 0" in shown.getvalue()
    assert "the engines did not end well: " in shown.getvalue()
    [report] = Path(config.folder).glob("logs/stall-*.txt")
    assert "engines (idle for 0 s): waiting for a node" in report.read_text()


class KeptPool:
    """The handle of a pool that goes on when its first user is done."""

    def __init__(self, pool: TreePoolApi) -> None:
        self._pool = pool
        self.stop = SimpleNamespace(remote=lambda: ray.put(None))

    def __getattr__(self, name: str) -> object:
        return getattr(self._pool, name)


@pytest.fixture(scope="module")
def evaluated(ray_cluster, tmp_path_factory) -> tuple[Path, dict[str, Evaluation]]:
    """Two evaluations of the small model, of two seeds, on two files."""
    root = tmp_path_factory.mktemp("evaluated")
    rows = [("38+47=?", "85"), ("12+30-5=?", ["37", "37.0"]), ("9+9=?", 18)]
    for name, part in (("one", rows), ("two", rows[:2])):
        lines = [json.dumps({"q": question, "a": answer}) for question, answer in part]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    found = {}
    pools: list[TreePoolApi] = []

    def make(kind: type, *, name: str) -> Callable[..., object]:
        if kind is not TreePool:
            return make_actor(kind, name=name)

        def keep(**given: object) -> KeptPool:
            if not pools:
                pools.append(make_actor(TreePool)(**given))
            return KeptPool(pools[0])

        return keep

    for seed, name in enumerate(("first", "second")):
        data = [
            f"evaluate.benchmarks.{file}={{path: {root}/{file}.jsonl, question_column: q, "
            "answer_column: a, max_prompt_tokens: 32}"
            for file in ("one", "two")
        ]
        config = configure(
            MODEL,
            ["one", "two"],
            [*data, f"run.root={root}", f"run.name={name}", "evaluate.num_samples=4",
             f"run.seed={seed}", "evaluate.temperature=1.5", "evaluate.max_tokens=40",
             "engine.kv_cache_gib=0.125"],
        )  # fmt: skip
        tokenizer = load_tokenizer(MODEL, False)
        console = Console(console=rich.console.Console(file=io.StringIO()))
        prompts = load_benchmarks(config, tokenizer)
        found |= {
            f"{name}/{key}": each
            for key, each in evaluate_all(
                config, "mine", prompts, tokenizer, console, VERSIONS, make_actor=make
            )
        }
    ray.get(pools[0].stop.remote())
    return root, found


@pytest.mark.ray
@pytest.mark.engine
def test_a_job_leaves_scores_and_samples_of_every_benchmark(evaluated) -> None:
    root, found = evaluated
    for name, evaluation in found.items():
        run, _, benchmark = name.partition("/")
        written = json.loads((root / run / f"eval/{benchmark}.json").read_text())
        assert Evaluation.from_fields(written) == evaluation
        assert {"pass@1", "pass@2", "pass@4", "maj@4", "length", "cut_off"} <= written[
            "scores"
        ].keys()
        samples = read_samples(f"{root}/{run}/eval/{benchmark}.parquet")
        assert len(samples) == evaluation.num_problems == (3 if benchmark == "one" else 2)
        shares = [problem.pass_at_1 for problem in samples.values()]
        assert sum(shares) / len(shares) == pytest.approx(evaluation.pass_at_1)
        assert sum(problem.length.sum() for problem in samples.values()) == (
            evaluation.num_sampled_tokens
        )
    scores = with_mean({name: found[f"first/{name}"].scores for name in ("one", "two")})
    assert list(scores) == ["one", "two", "mean of one, two"]
    title, shown = table(
        scores, model="first", verifier="graded", sampling=found["first/one"].sampling
    ).renderables
    assert title.startswith("first\n4 answers a problem, temperature ")
    assert shown.row_count == len(found["first/one"].scores) == len(scores["mean of one, two"])


@pytest.mark.ray
@pytest.mark.engine
def test_two_evaluations_are_compared_problem_by_problem(evaluated) -> None:
    root, found = evaluated
    compared = comparison(str(root / "first"), str(root / "second")).pairs
    assert compared.keys() == {"one", "two", "mean of one, two"}
    gap = found["first/one"].pass_at_1 - found["second/one"].pass_at_1
    assert compared["one"]["pass@1"].difference.value == pytest.approx(gap)
    first, second = (
        read_samples(f"{root}/{name}/eval/one.parquet").values() for name in ("first", "second")
    )
    any_right = [any(samples.is_correct == 1) for samples in (*first, *second)]
    expected = (sum(any_right[:3]) - sum(any_right[3:])) / 3
    assert compared["one"]["pass@4"].difference.value == pytest.approx(expected)


@pytest.mark.ray
@pytest.mark.engine
def test_problems_that_only_one_evaluation_has_are_counted(evaluated, tmp_path) -> None:
    root, _ = evaluated
    (tmp_path / "eval").mkdir()
    for suffix in ("json", "parquet"):
        shutil.copy(root / f"first/eval/two.{suffix}", tmp_path / f"eval/one.{suffix}")
    shown = io.StringIO()
    compared = comparison(f"file://{root}/first/eval/one.json", str(tmp_path))
    rich.console.Console(file=shown, width=200).print(compared.tables)
    assert "2 of 3" in shown.getvalue()


def test_an_evaluation_that_replaces_one_with_other_settings_says_what_they_are(tmp_path) -> None:
    folder = RunFolder(str(tmp_path))
    config = load(["evaluate.max_tokens=64"])
    assert changed_settings(config, folder) == []
    folder.publish_file("eval/config.yaml", to_yaml(config).encode())
    assert changed_settings(config, folder) == []
    other = load(["evaluate.max_tokens=46", "run.seed=3"])
    assert changed_settings(other, folder) == ["evaluate.max_tokens=46 (was 64)"]
