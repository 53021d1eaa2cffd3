"""Memory: what a worker and an engine take, part by part, and whether that fits their GPUs.

Weights, gradients, moments and the KV cache are counted. Activations are estimated for a
transformer with a gated MLP: what PyTorch keeps of a layer for the backward pass was measured, and
`tests/preflight/test_memory.py` measures it again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

from transformers import PreTrainedConfig

from treerpo_ray.config import Config
from treerpo_ray.learner.head import LOGIT_BUDGET
from treerpo_ray.preflight.machine import GIB

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
CUDA_GIB = 1.0
"""Of each process on a GPU: CUDA's context, and the workspaces of its libraries."""
GAPS = 0.1
"""Share of the activations that is lost between the blocks that PyTorch's allocator hands out."""
GRAPHS_GIB = 1.0
"""CUDA graphs of an engine: vLLM captures one for each of some fifty batch sizes."""
PREFILL_TOKENS = 4096
"""Fewest tokens that an engine takes in one step; see `engine_args`."""
LIVE_LOGITS = 2
"""Copies in float32 of a piece of logits that are alive while its gradient is computed; the product
that they are made of comes on top where it has another type."""
SAMPLER_COPIES = 3
"""Copies in float32 of a batch's logits that are alive while vLLM samples."""
WEIGHTS, TRAINING = "weights", "gradients and AdamW"
REFERENCE, COPIES, GATHERED = "reference model", "copies in bfloat16", "gathered"
ACTIVATIONS, CACHE, CUDA = "activations", "KV cache", "CUDA"
KEPT = (WEIGHTS, TRAINING, REFERENCE)
"""Parts of a worker that lie in main memory if it offloads them."""
PARTS = (WEIGHTS, TRAINING, REFERENCE, COPIES, GATHERED, ACTIVATIONS, CACHE, CUDA)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Sizes of a transformer, as its config.json has them."""

    num_layers: int
    hidden: int
    intermediate: int
    """Of the MLP that one token passes; of all its experts where there are several."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    """Whether the head is the embedding."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        """Those of `config`; what an architecture does not name follows from what it does."""
        text = config.get_text_config()
        hidden, heads = text.hidden_size, text.num_attention_heads
        experts = getattr(text, "num_experts_per_tok", None) or 1
        intermediate = getattr(text, "moe_intermediate_size", None) if experts > 1 else None
        intermediate = intermediate or getattr(text, "intermediate_size", None) or 4 * hidden
        return cls(
            num_layers=text.num_hidden_layers,
            hidden=hidden,
            intermediate=experts * intermediate,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            vocabulary=text.vocab_size,
            is_tied=bool(getattr(text, "tie_word_embeddings", True)),
        )

    @property
    def ends(self) -> int:
        """Parameters of embedding and head."""
        return (1 if self.is_tied else 2) * self.vocabulary * self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """GiB that each part takes, on each GPU that a worker or an engine has.

    Args:
        worker: By part; without `activations` where only the number of parameters is known.
        offloaded: What a worker on a GPU has in main memory instead.
        engine: By part; the KV cache is missing where it takes what its GPU has left and nobody
            says how much that is.
    """

    worker: dict[str, float]
    offloaded: float
    engine: dict[str, float]

    @classmethod
    def of(
        cls,
        config: Config,
        num_parameters: float,
        sizes: ModelSizes | None,
        *,
        num_adapted: float = 0.0,
    ) -> Self:
        """The plan of a run of a model, of which so many numbers in adapters are trained where
        `lora.rank` is above 0."""
        worker = _worker_parts(config, num_parameters, sizes, num_adapted)
        is_offloaded = config.learner.offload and config.learner.resources.get("GPU", 0) > 0
        moved = [worker.pop(part, 0.0) for part in KEPT] if is_offloaded else []
        return cls(
            worker=worker,
            offloaded=sum(moved),
            engine=_engine_parts(config, num_parameters, sizes, num_adapted),
        )

    def table(self, config: Config) -> list[str]:
        """Lines of a table, at most 68 columns wide."""
        has_all = {ACTIVATIONS} <= self.worker.keys() and {CACHE} <= self.engine.keys()
        rows: list[tuple[str, float | None, float | None]] = [
            (part, self.worker.get(part), self.engine.get(part))
            for part in PARTS
            if part in self.worker | self.engine
        ]
        total = "together" if has_all else "together, at least"
        rows.append((total, sum(self.worker.values()), sum(self.engine.values())))
        on_gpu = (config.learner.gpu_memory_gib, config.engine.gpu_memory_gib)
        if on_gpu != (None, None):
            rows.append(("of gpu_memory_gib", *on_gpu))
        if self.offloaded:
            rows.append(("in main memory", self.offloaded, None))
        unit, scale = _unit(value for _, *values in rows for value in values)
        head = f"{unit} a GPU" if _uses_gpus(config) else unit
        fewest, most = config.engine.num_engines, config.engine.most
        engines = f"{fewest} engine(s)" if fewest == most else f"{fewest} to {most} engines"
        return [
            f"{head:22}{f'{config.learner.num_workers} worker(s)':>16}{engines:>18}",
            *(
                f"{name:22}{_cell(worker, scale):>16}{_cell(engine, scale):>18}"
                for name, worker, engine in rows
            ),
        ]

    def engine_line(self) -> str:
        """What an engine takes, in one line, for a job that has no learner."""
        total = sum(self.engine.values())
        unit, scale = _unit([total])
        parts = ", ".join(
            f"{part} {_cell(self.engine[part], scale)}" for part in PARTS if part in self.engine
        )
        at_least = "" if {ACTIVATIONS, CACHE} <= self.engine.keys() else "at least "
        return f"an engine takes {at_least}{_cell(total, scale)} {unit}: {parts}"


def _unit(gib: Iterable[float | None]) -> tuple[str, int]:
    """The unit in which the largest of some amounts has digits before its point, and how many of
    them are a GiB."""
    return ("GiB", 1) if max(each or 0.0 for each in gib) >= 1 else ("MiB", 1024)


def _cell(gib: float | None, scale: int = 1) -> str:
    return "-" if gib is None else number(gib * scale, 2)


def number(amount: float, digits: int = 1) -> str:
    """An amount with so many digits behind its point, or two that are not zero.

    >>> number(12.34), number(0.0123), number(0)
    ('12.3', '0.012', '0.0')
    """
    is_small = 0 < amount < 10.0 ** (1 - digits)
    return f"{amount:.2g}" if is_small else f"{amount:.{digits}f}"


def _uses_gpus(config: Config) -> bool:
    return any(part.resources.get("GPU", 0) > 0 for part in (config.learner, config.engine))


def _worker_parts(
    config: Config, count: float, sizes: ModelSizes | None, num_adapted: float
) -> dict[str, float]:
    """Every worker holds the whole model, its gradients and two moments in float32; of a sharded
    one its part, which is largest with the fewest workers, and what is gathered.

    Where adapters are trained, all that is of them; the model is held in the type that is computed
    in, and is its own reference.
    """
    computes_in, is_sharded = DTYPE_BYTES[config.model.dtype], config.learner.shard
    share = 1 / config.learner.fewest_workers if is_sharded else 1.0
    has_adapters = config.lora.rank > 0
    trained = num_adapted if has_adapters else count
    frozen = computes_in * count if has_adapters else 0.0
    parts = {WEIGHTS: (4 * trained + frozen) * share, TRAINING: 12 * trained * share}
    if config.loss.kl_coef > 0 and not has_adapters:
        parts[REFERENCE] = computes_in * count * share
    if computes_in < 4 and not is_sharded:  # autocast keeps them for as long as a forward pass
        parts[COPIES] = computes_in * trained
    if sizes is not None:
        if is_sharded:
            parts[GATHERED] = _gathered_bytes(config, count, sizes)
        parts[ACTIVATIONS] = _activation_bytes(config, sizes)
    found = {part: size / GIB for part, size in parts.items()}
    if config.learner.resources.get("GPU", 0) > 0:
        found[CUDA] = CUDA_GIB + GAPS * found.get(ACTIVATIONS, 0.0)
    return found


def _gathered_bytes(config: Config, count: float, sizes: ModelSizes) -> float:
    """Whole weights that are at hand while a sharded model computes, and their gradients.

    Embedding and head are there all the time, those of the reference model besides. Of the layers
    there are the one that computes and the next, the buffer that it comes in, the gradient of one
    and the float32 copy that is summed up over workers.
    """
    width = DTYPE_BYTES[config.model.dtype]
    layer = (count - sizes.ends) / sizes.num_layers
    if config.lora.rank:  # one model, and gradients of next to nothing
        return width * sizes.ends + 3 * width * layer
    models = 2 if config.loss.kl_coef > 0 else 1
    return models * width * sizes.ends + (4 * width + 4) * layer


def _activation_bytes(config: Config, sizes: ModelSizes) -> float:
    """Peak of what a forest of `learner.token_budget` tokens keeps in its backward pass.

    Under autocast the residual stream, the MLP's input, and queries and keys are float32; of a
    sharded model they have the type that is computed in, but for what norms keep.
    """
    width = DTYPE_BYTES[config.model.dtype]
    stream = width if config.learner.shard else 4
    tokens = min(config.learner.token_budget, most_tokens(config))
    keys, pairs = keys_and_pairs(config)
    heads, kv_heads = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    kept = (
        (8 + 4 * stream) * sizes.hidden
        + 4 * width * (sizes.intermediate + heads)
        + 2 * width * keys * kv_heads  # of each path, gathered
        + width * pairs * sizes.num_heads / sizes.num_kv_heads  # the mask
    )
    passing = stream * sizes.hidden + 2 * width * sizes.intermediate
    budget = LOGIT_BUDGET["cuda" if config.learner.resources.get("GPU", 0) > 0 else "cpu"]
    logit = 4 * LIVE_LOGITS + (width if width < 4 else 0)
    # With what the last norm keeps, the states, their gradient, and both in the product's type.
    states = (16 + 2 * width) * tokens * sizes.hidden
    head = logit * min(budget, tokens * sizes.vocabulary) + states
    # Of the head: it stays until the embedding's has come, where both are one weight.
    gradient = stream * sizes.vocabulary * sizes.hidden
    # Both at once or, where they are summed up over workers, with a copy in float32.
    ends = (stream + 4) * sizes.ends if config.learner.shard else 2 * gradient
    if config.lora.rank:
        gradient, ends = 0, 0
    of_layers, of_one = tokens * kept * sizes.num_layers, float(tokens * passing)
    if config.learner.gradient_checkpointing:
        entries = float(stream * sizes.hidden * sizes.num_layers)
        of_layers, of_one = tokens * entries, tokens * (kept + passing)
    return max(of_layers + max(of_one, head) + gradient, ends)


def most_tokens(config: Config) -> int:
    """Tokens of a worker's share of a minibatch, if every tree is as large as it may be."""
    learner, shape = config.learner, config.shape
    trees = config.gate.trees_per_step // (learner.fewest_workers * learner.minibatches)
    return trees * (config.prompts.max_prompt_tokens + shape.max_sampled_tokens)


def keys_and_pairs(config: Config) -> tuple[float, float]:
    """Gathered keys, and pairs of query and key, a token of a tree that is as large as it may be.

    Each segment's keys are those of its whole path, and each of its tokens is paired with all.
    """
    path = tokens = config.prompts.max_prompt_tokens
    keys, pairs = float(path), float(path * path)
    steps = 1
    for children, length in zip(config.shape.num_children, config.shape.step_tokens, strict=True):
        steps, path = steps * children, path + length
        queries = steps * length
        tokens, keys, pairs = tokens + queries, keys + steps * path, pairs + queries * path
    return keys / tokens, pairs / tokens


def cache_bytes_a_token(config: Config, sizes: ModelSizes) -> int:
    """Bytes of the KV cache a token, on each GPU of an engine."""
    width, ways = DTYPE_BYTES[config.model.dtype], config.engine.tensor_parallel
    return 2 * width * sizes.num_layers * -(-sizes.num_kv_heads // ways) * sizes.head_dim


def _engine_parts(
    config: Config, count: float, sizes: ModelSizes | None, num_adapted: float
) -> dict[str, float]:
    """vLLM splits weights and cache over the GPUs of an engine."""
    engine, width = config.engine, DTYPE_BYTES[config.model.dtype]
    weights = width * count
    if engine.quantization is not None:  # a byte of each but those of embedding and head
        weights = count + (0 if sizes is None else (width - 1) * sizes.ends)
    # vLLM has room for adapters of a rank of its own, of which the next may be twice the run's.
    weights += 2 * width * num_adapted
    found = {WEIGHTS: weights / engine.tensor_parallel / GIB}
    if sizes is not None:
        tokens = max(PREFILL_TOKENS, config.max_model_tokens + 1)
        layer = width * (3 * sizes.intermediate / engine.tensor_parallel + 4 * sizes.hidden)
        logits = 4 * SAMPLER_COPIES * engine.max_num_seqs * sizes.vocabulary
        found[ACTIVATIONS] = (tokens * layer + logits) / GIB
    if engine.resources.get("GPU", 0) > 0:
        found[CUDA] = CUDA_GIB + GRAPHS_GIB
    if engine.kv_cache_gib is not None:
        found[CACHE] = engine.kv_cache_gib
    elif engine.gpu_memory_gib is not None:
        left = engine.gpu_memory_utilization * engine.gpu_memory_gib - sum(found.values())
        found[CACHE] = max(left, 0.0)
    return found


# What does not fit ---------------------------------------------------------------------------


def misfit(
    config: Config,
    num_parameters: float,
    sizes: ModelSizes | None,
    *,
    num_adapted: float = 0.0,
    trains: bool = True,
) -> str | None:
    """What does not fit the GPUs that the configuration names, in one line; None if all does."""
    plan = MemoryPlan.of(config, num_parameters, sizes, num_adapted=num_adapted)
    if not trains:
        learner = replace(config.learner, resources={}, min_workers=None, gpu_memory_gib=None)
        config = replace(config, learner=learner)
    return next(_misfits(config, plan, sizes), None)


def _misfits(config: Config, plan: MemoryPlan, sizes: ModelSizes | None) -> Iterator[str]:
    if config.learner.resources.get("GPU", 0) > 0:
        yield from _worker_misfits(config, plan.worker)
    if config.engine.resources.get("GPU", 0) > 0:
        yield from _engine_misfits(config, plan.engine, sizes)
    yield from _shared_misfits(config, plan)


def _worker_misfits(config: Config, parts: dict[str, float]) -> Iterator[str]:
    has, needs = config.learner.gpu_memory_gib, sum(parts.values())
    if has is None or needs <= has:
        return
    fixed = needs - parts.get(ACTIVATIONS, 0.0)
    one = f"a worker of {config.model.path}"
    start = f"learner.gpu_memory_gib={has:g}: {one} needs {number(needs)} GiB"
    learner = config.learner
    if fixed > has and not learner.shard:
        yield (
            f"{start}, {number(fixed)} of them for the whole model with its gradients and "
            "optimizer: set learner.shard=true, and learner.num_workers to as many GPUs as there "
            "are for them"
        )
    elif fixed > has:
        workers = "min_workers" if learner.min_workers is not None else "num_workers"
        yield (
            f"{start}, {number(fixed)} of them for its part of the model with gradients and "
            f"optimizer: raise learner.{workers}={learner.fewest_workers} or set "
            "learner.offload=true, which needs main memory instead"
        )
    elif not config.learner.gradient_checkpointing:
        yield (
            f"{start}, {number(parts[ACTIVATIONS])} of them for activations: set "
            "learner.gradient_checkpointing=true"
        )
    else:
        yield (
            f"{start}, {number(parts[ACTIVATIONS])} of them for activations: lower "
            f"learner.token_budget={config.learner.token_budget}"
        )


def _engine_misfits(
    config: Config, parts: dict[str, float], sizes: ModelSizes | None
) -> Iterator[str]:
    engine, path = config.engine, config.max_model_tokens + 1
    cache = parts.get(CACHE)
    needed = None if sizes is None else path * cache_bytes_a_token(config, sizes) / GIB
    has = engine.gpu_memory_gib
    if has is not None and (needs := sum(parts.values())) > has:
        yield (
            f"engine.gpu_memory_gib={has:g}: an engine of {config.model.path} needs "
            f"{number(needs)} GiB, {number(parts[WEIGHTS])} of them for its weights: raise "
            "engine.tensor_parallel or lower engine.kv_cache_gib or engine.max_num_seqs"
        )
    elif cache is not None and needed is not None and cache < needed:
        where = (
            f"engine.gpu_memory_utilization={engine.gpu_memory_utilization:g} of "
            f"engine.gpu_memory_gib={has:g} leaves"
            if engine.kv_cache_gib is None
            else f"engine.kv_cache_gib={engine.kv_cache_gib:g} is"
        )
        yield (
            f"{where} {number(cache, 2)} GiB of KV cache, and one path of {path} tokens needs "
            f"{number(needed, 2)}: raise it"
        )


def _shared_misfits(config: Config, plan: MemoryPlan) -> Iterator[str]:
    """Processes with a part of a GPU each, as many as Ray may put on the same one."""
    learner, engine = config.learner, config.engine
    shares = learner.resources.get("GPU", 0), engine.resources.get("GPU", 0)
    named = [gib for gib in (learner.gpu_memory_gib, engine.gpu_memory_gib) if gib is not None]
    if not named or not any(0 < share < 1 for share in shares):
        return
    needs = sum(plan.worker.values()), sum(plan.engine.values())
    for workers in range(learner.num_workers + 1 if 0 < shares[0] < 1 else 1):
        for engines in range(engine.most + 1 if 0 < shares[1] < 1 else 1):
            total = workers * needs[0] + engines * needs[1]
            # Before an engine starts again, vLLM wants so much to be free beside all others.
            asked = engine.start_share * min(named) - needs[1] if engines else 0.0
            is_together = workers * shares[0] + engines * shares[1] <= 1 and workers + engines > 1
            if is_together and total + max(asked, 0.0) > min(named):
                yield (
                    f"a GPU of {min(named):g} GiB (learner.gpu_memory_gib, engine.gpu_memory_gib) "
                    f"cannot hold {workers} worker(s) of {number(needs[0])} and {engines} "
                    f"engine(s) of {number(needs[1])} GiB, as learner.resources.GPU={shares[0]:g} "
                    f"and engine.resources.GPU={shares[1]:g} allow: lower learner.token_budget or "
                    "engine.kv_cache_gib, or give each a GPU of its own"
                )
                return


def needs_more_memory(config: Config, plan: MemoryPlan, has_gib: float, where: str) -> str | None:
    """What processes on CPUs take that one machine or node does not have, in one line.

    Args:
        config: The run's.
        plan: Of it.
        has_gib: Memory that there is for all of them together.
        where: What has it.
    """
    fewest = config.learner.fewest_workers
    needs = {"engine": 0.0, "learner": fewest * plan.offloaded}
    if not config.engine.resources.get("GPU", 0):
        needs["engine"] = config.engine.num_engines * sum(plan.engine.values())
    if not config.learner.resources.get("GPU", 0):
        needs["learner"] = fewest * sum(plan.worker.values())
    if sum(needs.values()) <= has_gib:
        return None
    cache = config.engine.kv_cache_gib or 0.0
    keys = {
        f"engine.kv_cache_gib={cache:g}": config.engine.num_engines * cache,
        f"learner.token_budget={config.learner.token_budget}": needs["learner"],
    }
    advice = f"lower {max(keys, key=lambda key: keys[key])}"
    if plan.offloaded:
        advice = "set learner.offload=false"
    return (
        f"{config.engine.num_engines} engine(s) take {number(needs['engine'])} GiB and "
        f"{fewest} worker(s) {number(needs['learner'])}, and {where} has "
        f"{number(has_gib)}: {advice}"
    )
