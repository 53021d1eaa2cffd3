"""Model sizes: those of a transformer, and what each part of a worker and an engine takes by them.

Weights, gradients, moments and the KV cache are counted. Activations are estimated for a
transformer with a gated MLP: what PyTorch keeps of a layer for the backward pass was measured, and
`tests/preflight/test_model_sizes.py` measures it again.
"""

from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedConfig

from treerpo_ray.algo.search import TreeShape
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
OUTGOING = "weights to be sent"
ACTIVATIONS, CACHE, CUDA = "activations", "KV cache", "CUDA"
PARTS = (WEIGHTS, TRAINING, REFERENCE, COPIES, OUTGOING, GATHERED, ACTIVATIONS, CACHE, CUDA)


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
    num_adapted: int = 0
    """Numbers in the adapters that are trained where `lora.rank` is above 0."""

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


def worker_parts(config: Config, count: float, sizes: ModelSizes | None) -> dict[str, float]:
    """Every worker holds the whole model, its gradients and two moments in float32; of a sharded
    one its part, which is largest with the fewest workers, and what is gathered.

    Where adapters are trained that holds of them: the model is held in the type that is computed
    in, and is its own reference.
    """
    computes_in, is_sharded = DTYPE_BYTES[config.model.dtype], config.learner.shard
    share = 1 / config.learner.fewest_workers if is_sharded else 1.0
    trained, frozen = count, 0.0
    if config.lora.rank:
        trained, frozen = 0.0 if sizes is None else float(sizes.num_adapted), computes_in * count
    parts = {WEIGHTS: (4 * trained + frozen) * share, TRAINING: 12 * trained * share}
    if config.loss.kl_coef > 0 and not config.lora.rank:
        parts[REFERENCE] = computes_in * count * share
    if computes_in < 4 and not is_sharded:  # autocast keeps them for as long as a forward pass
        parts[COPIES] = computes_in * trained
    if sizes is not None:
        if is_sharded:
            parts[GATHERED] = _gathered_bytes(config, count, sizes)
        parts[ACTIVATIONS] = _activation_bytes(config, sizes)
    if config.sync.transport != "file":  # on the first worker's GPU
        parts[OUTGOING] = computes_in * trained
    # Adapters of a model that is not at hand are not counted: their parts are missing.
    found = {part: size / GIB for part, size in parts.items() if size > 0}
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
    if config.lora.rank:  # they are not trained
        gradient = ends = 0
    of_layers, of_one = tokens * kept * sizes.num_layers, float(tokens * passing)
    if config.learner.gradient_checkpointing:
        entries = float(stream * sizes.hidden * sizes.num_layers)
        of_layers, of_one = tokens * entries, tokens * (kept + passing)
    return max(of_layers + max(of_one, head) + gradient, ends)


def most_tokens(config: Config) -> int:
    """Tokens of a worker's share of a minibatch, if every tree is as large as it may be."""
    learner, shape = config.learner, config.largest_shape
    trees = config.gate.trees_per_step // (learner.fewest_workers * learner.minibatches)
    return trees * (config.prompts.max_prompt_tokens + shape.max_sampled_tokens)


def keys_and_pairs(config: Config) -> tuple[float, float]:
    """Gathered keys, and pairs of query and key, a token of a tree that is as large as it may be:
    the most that any shape has which trees may have."""
    found = [_keys_and_pairs(shape, config.prompts.max_prompt_tokens) for shape in config.shapes]
    keys, pairs = zip(*found, strict=True)
    return max(keys), max(pairs)


def _keys_and_pairs(shape: TreeShape, max_prompt_tokens: int) -> tuple[float, float]:
    """Of one shape: each segment's keys are those of its whole path, and each of its tokens is
    paired with all."""
    path = tokens = max_prompt_tokens
    keys, pairs = float(path), float(path * path)
    steps = 1
    for children, length in zip(shape.num_children, shape.step_tokens, strict=True):
        steps, path = steps * children, path + length
        queries = steps * length
        tokens, keys, pairs = tokens + queries, keys + steps * path, pairs + queries * path
    return keys / tokens, pairs / tokens


def cache_bytes_a_token(config: Config, sizes: ModelSizes) -> int:
    """Bytes of the KV cache a token, on each GPU of an engine."""
    width, ways = DTYPE_BYTES[config.model.dtype], config.engine.tensor_parallel
    return 2 * width * sizes.num_layers * -(-sizes.num_kv_heads // ways) * sizes.head_dim


def engine_parts(config: Config, count: float, sizes: ModelSizes | None) -> dict[str, float]:
    """vLLM splits weights and cache over the GPUs of an engine."""
    engine, width = config.engine, DTYPE_BYTES[config.model.dtype]
    weights = width * count
    if engine.quantization is not None:  # a byte of each but those of embedding and head
        weights = count + (0 if sizes is None else (width - 1) * sizes.ends)
    if sizes is not None:
        # vLLM has room for adapters of a rank of its own, of which the next may be twice the run's.
        weights += 2 * width * sizes.num_adapted
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
