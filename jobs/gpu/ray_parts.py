"""Parts of the first GPU run that need vLLM and Ray: an engine, and whole runs.

Both are imported by the parts themselves: the other parts run where they are not installed.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jobs.gpu.workload import (
    PROJECT,
    REAL,
    REHEARSAL,
    Sizes,
    Tell,
    make_learner,
    random_record,
    recipe,
)
from treerpo_ray.algo.search import SiblingGroup
from treerpo_ray.config import Config
from treerpo_ray.learner.learner import Learner

if TYPE_CHECKING:
    from treerpo_ray.engine.engine import Engine
    from treerpo_ray.weights.transport import TransportKind

PROMPT = list(range(3, 3 + 64))
"""Of trees and of the probe."""


def engine(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """An engine alone: tokens a second, their log-probs against a learner's, changed weights, and a
    second start beside a learner."""
    config = recipe(sizes, folder)
    asyncio.run(_engine(config, sizes, tell))


async def _engine(config: Config, sizes: Sizes, tell: Tell) -> None:
    from treerpo_ray.engine.engine import Engine
    from treerpo_ray.engine.types import EngineSetup, Sampling

    asleep = replace(config.engine, sleep=True)
    in_turns = replace(config, engine=asleep, gate=replace(config.gate, max_staleness=0))
    setup = EngineSetup.of(in_turns)

    async def started() -> Engine:
        start = time.monotonic()
        made = Engine(setup=setup, index=0, log_folder=None)
        await made.start()
        tell(**{f"start_{len(starts)}_s": round(time.monotonic() - start, 1)})
        starts.append(made)
        return made

    async def grown(one: Engine, seed: int) -> list[SiblingGroup]:
        sampling = Sampling(temperature=1.0)
        return [each async for each in one.grow(PROMPT, config.shape, sampling, seed, [])]

    starts: list[Engine] = []
    first = await started()
    start = time.monotonic()
    trees = await asyncio.gather(*(grown(first, seed) for seed in range(sizes.engine_trees)))
    seconds, stats = time.monotonic() - start, await first.stats()
    cached = stats.num_cached_tokens / stats.num_prompt_tokens
    tell(tokens_per_s=round(stats.num_sampled_tokens / seconds), cached_share=round(cached, 3))
    tell(tokens_per_s_without_logprobs=await _plain_speed(first, config, sizes))

    made = make_learner(config, sizes)  # its reference and optimizer take their memory, too
    off = _sampled_off(made, trees[0])
    tell(sampled_logprobs_off=off)
    if not off < 0.1:
        raise RuntimeError(f"log-probs of sampled tokens are {off:.3g} nats off the learner's")
    made.update([random_record(0, sizes)])
    with torch.no_grad():
        for parameter in made.policy.model.parameters():
            parameter.mul_(1.01)
    # The second engine starts beside all that the learner holds.
    kinds: tuple[TransportKind, ...] = ("file", "ipc")
    for number, kind in enumerate(kinds):
        await _load(starts[number], made, config, kind, tell)
        if number == 0:
            await starts[0].sleep()
            tell(free_gib_asleep=_free_gib())
            await _load(starts[0], made, config, kind, tell)
        tell(free_gib_awake=_free_gib())
        await starts[number].stop()
        if number == 0:
            await started()


def _sampled_off(made: Learner, groups: list[SiblingGroup]) -> float:
    """Mean distance (nats) of the log-probs that came with the first steps of a tree, all in one
    array, from those of a learner of the same weights."""
    [first] = [group for group in groups if not group.parent]
    distances = []
    for step in first.steps:
        found = made.policy.sequence_logprobs([*PROMPT, *step.token_ids.tolist()])
        own = found[len(PROMPT) - 1 :].cpu()
        distances.append((own - torch.from_numpy(step.logprobs)).abs())
    return float(torch.cat(distances).mean())


async def _load(
    one: "Engine", made: Learner, config: Config, kind: "TransportKind", tell: Tell
) -> None:
    """Have an engine take over the learner's weights and prove them.

    `nccl` needs a GPU for each of its processes, and is tried by `options` where there are two.
    """
    from treerpo_ray.weight_sync import Probe
    from treerpo_ray.weights.manifest import pack_weights
    from treerpo_ray.weights.source import SenderPlace
    from treerpo_ray.weights.transport import make_transport

    transport = make_transport(
        kind, device=made.device, address="", next_round=lambda poll: None, limit_s=60.0
    )
    start = time.monotonic()
    memory = transport.begin()
    manifest, _ = pack_weights(
        made.policy.named_weights(),
        version=1,
        dtype=getattr(torch, config.model.dtype),
        chunk_bytes=config.sync.chunk_mib * 2**20,
        allocate=memory.part,
        new_digest=transport.new_digest,
    )
    place = memory.seal()
    assert not isinstance(place, SenderPlace)  # of neither kind
    packed = time.monotonic()
    probe = Probe(token_ids=PROMPT, logprobs=made.policy.sequence_logprobs(PROMPT).tolist())
    probed = time.monotonic()
    await one.load(manifest, place)
    loaded = time.monotonic()
    off = probe.distance(await one.probe(PROMPT))
    seconds = {"pack_s": round(packed - start, 2), "load_s": round(loaded - probed, 2)}
    tell(**{f"by_{kind}": {**seconds, "off": off}})
    if not off < 0.1:
        raise RuntimeError(f"the engine is {off:.3g} nats a token off the learner by {kind}")


def _free_gib() -> float:
    """Free memory of the GPU; nothing is asked on a CPU."""
    return round(torch.cuda.mem_get_info()[0] / 2**30, 2) if torch.cuda.is_available() else 0.0


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
    """Two whole runs by the command: adapters on the quickstart, and the recipe in small, with a
    sharded learner that has the GPU in turns with its engine."""
    _run("quickstart", quickstart_run(sizes, folder), tell)
    # The recipe asks for GPUs: where there is none its input is checked.
    own = recipe_run(folder)
    _run("recipe", own if sizes is REAL else ["--dry-run", *own], tell)


def options(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """Whole runs of what not every machine can do: engines in fp8 or split over two GPUs, weights
    sent to a group, a learner that is sharded over two GPUs."""
    make_runs(option_runs(sizes, folder, _capabilities() if sizes is REAL else []), tell)


def make_runs(
    runs: Mapping[str, list[str] | str],
    tell: Tell,
    make: Callable[[str, list[str], Tell], None] | None = None,
) -> None:
    """Make each run, whatever becomes of the others, or tell why it is left out.

    Args:
        runs: Arguments of each, by its name, or why there are none.
        tell: Told of each.
        make: What makes one; by default the command.

    Raises:
        RuntimeError: one failed; the first of those that did.
    """
    make = make or _run
    if all(isinstance(own, str) for own in runs.values()):
        tell(status="left out: no GPU here can do any of it")
    failed: list[RuntimeError] = []
    for name, own in runs.items():
        if isinstance(own, str):
            tell(**{name: f"left out: {own}"})
            continue
        try:
            make(name, own, tell)
        except RuntimeError as error:  # it says nothing of the others
            tell(**{name: str(error)})
            failed.append(error)
    if failed:
        raise failed[0]


def option_runs(sizes: Sizes, folder: Path, gpus: list[str]) -> dict[str, list[str] | str]:
    """Arguments of each run, or why these GPUs, given by their compute capabilities, can't.

    On CPUs nothing computes in fp8, and the run of the quickstart sends to a group, of gloo.
    """
    from treerpo_ray.config.config import FP8_TOLERANCE
    from treerpo_ray.preflight.machine import FP8_CAPABILITY, has_fp8

    runs: dict[str, list[str] | str] = {
        "two_workers": "needs two GPUs, one for each worker",
        "fp8": f"needs a GPU of compute capability {FP8_CAPABILITY} or newer",
        "nccl": "needs two GPUs",
        # The last: where there is a CUDA compiler, vLLM may first have kernels made for it.
        "tensor_parallel": "needs two GPUs for one engine",
    }
    whole_model = [*quickstart_run(sizes, folder), "lora.rank=0"]
    if len(gpus) > 1:
        # NCCL has room for one worker on a GPU; the engine takes turns with one of them.
        shares = ["learner.resources.GPU=0.6", "engine.resources.GPU=0.4"]
        turns = ["engine.sleep=true", "gate.max_staleness=0"]
        two = ["learner.num_workers=2", "learner.shard=true"]
        runs["two_workers"] = [*whole_model, *two, *shares, *turns]
        split = ["engine.tensor_parallel=2", "engine.resources.GPU=2"]
        # An engine of two GPUs shares none: where there is no third, the learner is on the CPU.
        runs["tensor_parallel"] = [*whole_model, *split, "learner.resources.GPU=0"]
        file = str(PROJECT / "conf/hardware/two_gpus.yaml")
        sent = [*whole_model, file, "sync.transport=nccl"]
        runs["nccl"] = [*sent, *split] if len(gpus) > 2 else sent
    if gpus and all(map(has_fp8, gpus)):
        tolerance = f"sync.probe_tolerance={FP8_TOLERANCE:g}"
        runs["fp8"] = [*whole_model, "engine.quantization=fp8", tolerance]
    return runs


def _capabilities() -> list[str]:
    """Of the GPUs that this process may use, which need not be all of the machine."""
    found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return [f"{major}.{minor}" for major, minor in found]


def quickstart_run(sizes: Sizes, folder: Path) -> list[str]:
    """Arguments of a run of the quickstart that is over soon."""
    file = str(PROJECT / "conf/quickstart.yaml")
    steps = 1 if sizes is REHEARSAL else 3
    own = [*sizes.gpu, *sizes.small, "gate.trees_per_step=6", f"run.num_steps={steps}"]
    own += ["lora.rank=8"]  # the recipe trains all weights
    if sizes is REAL:  # so small a model fits GPUs of any size
        own += ["engine.gpu_memory_gib=null", "learner.gpu_memory_gib=null"]
    return [file, *own, *_common(folder)]


def recipe_run(folder: Path) -> list[str]:
    """Those of the recipe for a GPU, cut to two steps of the model that the part `model` made."""
    file = str(PROJECT / "conf/treerpo_qwen2.5_math_1.5b.yaml")
    own = [f"model.path={folder}/model", "prompts.path=quickstart:train"]
    own += ["prompts.num_problems=64"]
    own += ["prompts.question_column=question", "prompts.answer_column=answer"]
    own += ["tree.num_children=[4, 4, 4]", "tree.step_tokens=[64, 64, 64]"]
    own += ["gate.trees_per_step=8", "run.num_steps=2"]
    own += ["learner.advantage=STANDARD", "learner.prune_threshold=-1"]  # no answer is right
    own += ["learner.shard=true"]  # the quickstart's learner is not
    own += ["gate.max_staleness=0", "engine.sleep=true", "sync.transport=ipc"]  # likewise
    return [file, *REAL.gpu, *own, *_common(folder)]


def _common(folder: Path) -> list[str]:
    return [f"run.root={folder}/runs", "evaluate.data.path=''", "sync.probe_every=1"]


def _run(name: str, arguments: list[str], tell: Tell) -> None:
    start = time.monotonic()
    command = [sys.executable, "jobs/train.py", *arguments, f"run.name={name}"]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    tell(**{f"{name}_s": round(time.monotonic() - start, 1)})
    if done.returncode:
        raise RuntimeError(f"the {name} run ended with status {done.returncode}; see the log")
    if done.stdout:
        tell(**{name: json.loads(done.stdout.splitlines()[-1])})
