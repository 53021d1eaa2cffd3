"""Benchmarks: evaluates a model on data sets by name, as a job of its own."""

import atexit
import json
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import ray
from transformers import PreTrainedTokenizerBase

from treerpo_ray.actor import MakeActor, make_actor, root_cause
from treerpo_ray.config import Config
from treerpo_ray.config.data import PROJECT
from treerpo_ray.config.files import load, to_yaml
from treerpo_ray.config.identity import differences
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import RunConfig
from treerpo_ray.driver.cluster import connected
from treerpo_ray.driver.sources import version_of
from treerpo_ray.driver.start import then_and_now
from treerpo_ray.driver.supervisor import Supervisor, evaluation_progress, stop_actor
from treerpo_ray.driver.versions import AgreedVersions
from treerpo_ray.engine.types import Sampling
from treerpo_ray.errors import RunFailed
from treerpo_ray.evaluate.evaluation import Evaluation, Graded, save_evaluation, save_samples
from treerpo_ray.evaluate.grading import grade_trees, sampled_trees, summarise
from treerpo_ray.metrics.console import Console
from treerpo_ray.metrics.events import RunLogApi
from treerpo_ray.metrics.run_log import RunLog, RunLogSetup
from treerpo_ray.metrics.watchdog import Heartbeats, HeartbeatsApi, watch_over
from treerpo_ray.preflight.memory import MemoryPlan, misfit
from treerpo_ray.preflight.model_check import model_size, num_positions
from treerpo_ray.preflight.references import References, look_at_references
from treerpo_ray.preflight.trial import code_lines, try_checks
from treerpo_ray.prompts.problems import load_problems
from treerpo_ray.prompts.prompt_set import PromptSet, load_tokenizer
from treerpo_ray.run_folder.checkpoints import FOLDER as CHECKPOINTS
from treerpo_ray.run_folder.files import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    MODEL_FOLDER,
    RunFolder,
    did_you_mean,
    named_folder,
)
from treerpo_ray.run_folder.lock import only_writer
from treerpo_ray.run_folder.logs import output_to_log
from treerpo_ray.scoring import Scorer, StartScorer
from treerpo_ray.search.tree_pool import make_pool
from treerpo_ray.stop import Stop
from treerpo_ray.task import TreePoolApi

PRESET = PROJECT / "conf/benchmarks.yaml"
"""Data sets and sampling settings, before what the command line says."""


HELD_OUT = "evaluate.data."
"""Start of the keys of a training's held-out set, which is no benchmark."""


def place_of(model: str) -> str:
    """Where the model lies that a user means: a name alone may be that of a run."""
    place = named_folder(model)
    return place if RunFolder(place).exists(CONFIG_FILE) else model


def configure(
    model: str, names: Sequence[str], arguments: Sequence[str], *, trusts_run: bool = False
) -> Config:
    """Configuration of an evaluation of `model`: folder or URI of a model or run, or Hub id.

    A run's own configuration comes first, then PRESET, then `arguments`: files and overrides. What
    a benchmark does not give of INHERITED is that of the run's prompts. The run may be somebody
    else's: unless it is trusted, the code that its model brings along is not run.
    What lies at a URI is fetched to this machine, where the engines must then be.

    Raises:
        ValueError: a benchmark is not known, or there is no model.
        ImportError: the package that the URI needs is not installed.
    """
    for argument in arguments:
        if argument.startswith(HELD_OUT):
            raise ValueError(
                f"{argument}: the held-out set of a training is no benchmark; keys of one are "
                "evaluate.benchmarks.NAME.num_problems and the like"
            )
    folder = RunFolder(model)
    if folder.exists(CONFIG_FILE):
        base = [_fetched(folder, CONFIG_FILE), f"model.path={_fetched(folder, _model_of(folder))}"]
        base += [] if trusts_run else ["model.trust_remote_code=false"]
        if folder.is_local:  # beside the run, wherever it was made
            base.append(f"run.root={PurePosixPath(folder.root).parent}")
    elif "://" not in model:
        base = [f"model.path={model}"]
    elif _is_model(folder):
        base = [f"model.path={_fetched(folder)}"]
    else:
        raise ValueError(f"{model}: neither a run (config.yaml) nor a model (*.safetensors)")
    own = [
        f"run.name=eval-{_name_of(folder)}",
        "metrics.wandb_project=null",
        "prompts.path=''",
        "prompts.num_problems=null",
        "evaluate.data.path=''",
    ]
    config = load([*base, str(PRESET), *own, *arguments])
    known = config.evaluate.benchmarks
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--benchmarks: no benchmark {unknown[0]}; there are {', '.join(known)}")
    chosen = {name: known[name] for name in names or known}
    return replace(
        config,
        prompts=replace(config.prompts, mix={}),  # a run's own
        lora=LoraConfig(),  # a run's model has its adapters merged
        evaluate=replace(config.evaluate, benchmarks=chosen),
    )


def _model_of(run: RunFolder) -> str:
    """The model that a run exported at its end, else that of its newest checkpoint."""
    checkpoints = reversed(run.glob(f"{CHECKPOINTS}/step=*/{MODEL_FOLDER}"))
    for name in (MODEL_FOLDER, *checkpoints):
        if _is_model(run, name):
            return name
    if run.glob(f"{CHECKPOINTS}/step=*/{ADAPTER_FOLDER}"):
        raise ValueError(
            f"{run}: checkpoints of a run with lora.rank hold adapters alone, and its model is "
            "written at its end: let it end, with a lower run.num_steps if need be"
        )
    raise ValueError(f"{run}: the run has written neither a model nor a checkpoint yet")


def what_is_evaluated(model: str) -> str:
    """The model in words: of a run also whether it is that of its end or of which step."""
    folder = RunFolder(model)
    if not folder.exists(CONFIG_FILE):
        return model
    name = _model_of(folder)
    step = re.search(r"step=(\d+)", name)
    return f"{model}, {f'its checkpoint of step {int(step[1])}' if step else 'its final model'}"


def source_of(model: str) -> str:
    """One name for a model or run, however its path is written; a Hub id stays as it is."""
    folder = RunFolder(model)
    if not folder.exists():
        return model
    return folder.fs.unstrip_protocol(str(_without_model_folder(folder.root)))


def _without_model_folder(path: str) -> PurePosixPath:
    """The run, whose name tells more than that of the folder with its model."""
    found = PurePosixPath(path)
    return found.parent if found.name == MODEL_FOLDER else found


def _name_of(model: RunFolder) -> str:
    """That of a run, whose exported model has it, too, or of a model."""
    own, outer = PurePosixPath(model.root), _without_model_folder(model.root)
    if own == outer or model.fs.exists(f"{outer}/{CONFIG_FILE}"):
        return outer.name
    return f"{outer.name}-{own.name}"  # a run may be called as the folder that a model lies in


def _is_model(folder: RunFolder, name: str = "") -> bool:
    return bool(folder.glob(f"{name}/*.safetensors".lstrip("/")))


def _fetched(folder: RunFolder, name: str = "") -> str:
    """Local path of a file or folder; what lies elsewhere is copied for as long as this process."""
    if folder.is_local:
        return str(folder.fetch(name, Path()))
    target = tempfile.mkdtemp(prefix="treerpo-fetched-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    return str(folder.fetch(name, Path(target)))


def load_benchmarks(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, PromptSet]:
    """Prompts of each benchmark by its name.

    Raises:
        ValueError: a data set is not as it must be; one line with its key. `UserCodeError` if a
            check cannot be used.
    """
    keeps_rows = try_checks(config.verifier)
    prompts = {}
    for name, data in config.evaluate.benchmarks.items():
        section = f"evaluate.benchmarks.{name}"
        problems, _ = load_problems(data, section, keeps_rows=keeps_rows)
        prompts[name] = PromptSet.encode(problems, tokenizer, data, section)
    return prompts


def look_at_benchmarks(config: Config, prompts: dict[str, PromptSet]) -> list[References]:
    """What was seen of the references of the benchmarks in which some are no answers.

    Raises:
        ValueError: none of a benchmark is one.
    """
    benchmarks = config.evaluate.benchmarks
    found = look_at_references(
        {
            f"evaluate.benchmarks.{name}": (benchmarks[name], each.problems)
            for name, each in prompts.items()
        },
        config.verifier,
    )
    return [references for references in found.values() if references.no_answers]


def check_length(config: Config) -> None:
    """Check that the longest prompt and answer fit the model.

    Raises:
        ValueError: they do not.
    """
    limit = num_positions(config.model)
    if limit is not None and config.max_model_tokens >= limit:
        raise ValueError(
            f"evaluate.max_tokens={config.max_evaluated_tokens} and the longest prompt "
            f"(max_prompt_tokens) come to {config.max_model_tokens} tokens; this model takes "
            f"{limit - 1}"
        )


def check_memory(config: Config) -> str:
    """Check that the engines fit the GPUs that `engine.gpu_memory_gib` names, and those that are
    here; returns what one of them takes.

    Raises:
        ValueError: they do not.
    """
    number, sizes = model_size(config.model)
    if (fault := misfit(config, number, sizes, trains=False)) is not None:
        raise ValueError(fault)
    return MemoryPlan.of(config, number, sizes).engine_line()


def run_benchmarks(
    config: Config, model: str, console: Console, *, trusts_run: bool = False
) -> dict[str, Evaluation]:
    """Evaluate `model.path` on every benchmark of `config`, into its folder.

    Args:
        config: As `configure` made it.
        model: What that was given; every result names it as `source_of` does.
        console: Shows the progress.
        trusts_run: As of `code_lines`.

    Raises:
        ValueError: an input is not as it must be, the cluster lacks resources, another job
            writes the folder, or it holds results of another model.
        RunFailed: something failed for good.
    """
    for line in code_lines(config.verifier, model, trusts_run=trusts_run):
        console.note(line)
    try:
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    except ValueError as error:
        if "/" in model or RunFolder(model).exists():
            raise
        raise ValueError(
            f"{model}: neither a folder here nor a run in {RunConfig().root}"
            f"{did_you_mean(model) or f'; {error}'}"
        ) from error
    check_length(config)
    console.note(check_memory(config))
    prompts = load_benchmarks(config, tokenizer)
    for references in look_at_benchmarks(config, prompts):
        console.note(str(references))
    source = source_of(model)
    folder = RunFolder(config.folder)
    check_folder(folder, source)
    if changed := changed_settings(config, folder):
        console.note(
            f"{folder.place} holds an earlier evaluation, of which what is evaluated again is "
            f"replaced; since then: {', '.join(changed)}"
        )
    stop = Stop()
    with stop.at_work(), only_writer(folder), output_to_log(folder):
        folder.publish_file(f"eval/{CONFIG_FILE}", to_yaml(config).encode())
        try:
            with ExitStack() as session:
                with console.stage("starting Ray"):
                    versions = session.enter_context(connected(config, trains=False))
                return dict(evaluate_all(config, source, prompts, tokenizer, console, versions))
        except Exception as error:
            if isinstance(error, ValueError) and not isinstance(error, ray.exceptions.RayError):
                raise
            traceback.print_exc()
            if stop.is_asked:  # what ends with the job fails of that, too
                raise KeyboardInterrupt from error
            raise RunFailed(f"{root_cause(error)}; traces are in {config.folder}/logs") from error


def changed_settings(config: Config, folder: RunFolder) -> list[str]:
    """Of how answers are sampled and graded, what differs from the evaluation that a folder
    holds; nothing if there is none."""
    file = f"eval/{CONFIG_FILE}"
    if not folder.exists(file):
        return []
    before, now = then_and_now(folder.read_text(file), config)
    own = {
        key: value for key, value in now.items() if key.split(".")[0] in ("evaluate", "verifier")
    }
    return differences(before, own)


def check_folder(folder: RunFolder, source: str) -> None:
    """Check that an evaluation folder holds results of no other model, which would mix with these.

    Raises:
        ValueError: it does.
    """
    for file in folder.glob("eval/*.json"):
        other = json.loads(folder.read_bytes(file)).get("model")
        if other is not None and other != source:
            raise ValueError(
                f"{folder} holds results of {other}: give those of {source} another folder, "
                "run.name=..."
            )


def evaluate_all(
    config: Config,
    source: str,
    prompts: dict[str, PromptSet],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    versions: AgreedVersions,
    *,
    make_actor: MakeActor = make_actor,
    make_scorer: StartScorer = Scorer,
) -> Iterator[tuple[str, Evaluation]]:
    """Evaluate each benchmark on the Ray cluster that is connected, on the same engines."""
    run = config.run.name
    run_log: RunLogApi = make_actor(RunLog, name=f"run log of {run}")(
        setup=RunLogSetup.of(config, commit=version_of(PROJECT))
    )
    pool = make_pool(config, versions.check_node, make_actor)
    heartbeats: HeartbeatsApi = make_actor(Heartbeats, name=f"heartbeats of {run}")()
    first = next(iter(prompts.values()))
    try:
        begun = pool.begin.remote(
            gate=config.gate,
            prompts=first,
            shape=config.shape,
            sampling=Sampling(temperature=config.tree.temperature),
            seed=config.run.seed,
            run_log=run_log,
        )
        ray.get(begun)
        with closing(watch_over(config, {"engines": pool, "metrics": run_log}, heartbeats)) as dog:
            supervisor = Supervisor(run_log=run_log, console=console, watchdog=dog)
            with console.stage(f"starting vLLM: {config.engine.num_engines} engine(s)"):
                supervisor.run(lambda: ray.get(pool.start.remote()))
            with ExitStack() as ending:
                with console.stage("starting the verifier"):
                    scorer = ending.enter_context(
                        closing(make_scorer(settings=config.verifier, tokenizer=tokenizer))
                    )
                for name, problems in prompts.items():
                    grade = partial(
                        _grade, config, name, problems, pool, scorer, console, heartbeats
                    )
                    graded = supervisor.run(grade)
                    yield name, _save(config, source, name, graded)
    finally:
        stop_actor(pool.stop.remote, "the engines", console)
        stop_actor(run_log.close.remote, "the run log", console)


def _grade(
    config: Config,
    name: str,
    prompts: PromptSet,
    pool: TreePoolApi,
    scorer: Scorer,
    console: Console,
    heartbeats: HeartbeatsApi,
) -> list[Graded]:
    title = f"{name}: {len(prompts)} problems"
    with evaluation_progress(config, console, heartbeats, title, len(prompts)) as advance:
        return grade_trees(map(ray.get, sampled_trees(config, prompts, pool)), scorer, advance)


def _save(config: Config, source: str, name: str, graded: list[Graded]) -> Evaluation:
    data = config.evaluate.benchmarks[name]
    spent = max(each.record.finished_at_s for each in graded) - min(
        each.record.finished_at_s - each.record.grow_s for each in graded
    )
    result = summarise(config, graded, data=data, model=source, step=0, version=0, seconds=spent)
    folder = RunFolder(config.folder)
    save_evaluation(result, folder, name)
    save_samples(graded, folder, name)
    return result
