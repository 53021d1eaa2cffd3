"""Policy: the causal language model that is trained, seen through log-probabilities of edges."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from treerpo_ray.algo.packing import Forest
from treerpo_ray.errors import one_line
from treerpo_ray.learner.forest_layout import ForestLayout
from treerpo_ray.learner.head import Head
from treerpo_ray.learner.tree_attention import TREE_ATTENTION


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestTensors:
    """A packed forest on the learner's device; edges stand in the forest's order."""

    token_ids: Int64[Tensor, "1 tokens"]
    position_ids: Int64[Tensor, "1 tokens"]
    layout: ForestLayout
    source: Int64[Tensor, " sources"]
    """Positions that predict at least one trained token, each once, ascending."""
    edge_source: Int64[Tensor, " edges"]
    """Index into `source` of each edge."""
    target: Int64[Tensor, " edges"]
    advantage: Float32[Tensor, " edges"]
    behaviour_logprob: Float32[Tensor, " edges"]
    step: Int32[Tensor, " edges"]

    @classmethod
    def from_forest(cls, forest: Forest, device: torch.device) -> "ForestTensors":
        """Copy `forest` to `device` with the layout that its attention needs."""
        source, edge_source = np.unique(forest.source, return_inverse=True)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            token_ids=tensor(forest.token_ids)[None],
            position_ids=tensor(forest.position_ids)[None],
            layout=ForestLayout.from_forest(forest, device),
            source=tensor(source),
            edge_source=tensor(edge_source.reshape(-1)),
            target=tensor(forest.target),
            advantage=tensor(forest.advantage),
            behaviour_logprob=tensor(forest.behaviour_logprob),
            step=tensor(forest.step),
        )


class Policy:
    """A Hugging Face causal model with tree attention.

    `PackingCheck` refuses any model whose packed log-probabilities are not its plain ones. A
    reference model is a second Policy, used under `torch.no_grad`.

    Args:
        model: With tree attention.
        tokenizer: Is saved with it.
        logit_budget: Logits that are alive at a time; by default `LOGIT_BUDGET` of the head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        logit_budget: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.logit_budget = logit_budget
        # Tree attention gives masks. With one, cuDNN's kernels (Hopper and newer) return NaN as
        # gradients of queries whose keys are 64 modulo 128, and plan anew for each shape.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def edge_logprobs(
        self, forest: ForestTensors, temperature: float
    ) -> tuple[Float32[Tensor, " edges"], Float32[Tensor, " edges"]]:
        """Log-probability of each edge's target and entropy at its source, both in nats.

        Both are of the distribution softmax(logits / temperature), the one that was sampled from.
        """
        hidden = self._hidden(forest.token_ids, forest.position_ids, forest.layout)
        hidden = hidden.index_select(0, forest.source)
        head = Head.of(self.model, self.logit_budget)
        return head.score(hidden, forest.edge_source, forest.target, temperature)

    @torch.no_grad()
    def sequence_logprobs(self, token_ids: list[int]) -> Float32[Tensor, " targets"]:
        """Log-probability (nats, temperature 1) of each token after the first, given those before.

        A plain causal forward without any tree: what an engine must agree with.
        """
        ids = torch.tensor([token_ids], device=self.model.device)
        positions = torch.arange(len(token_ids), device=self.model.device)
        hidden = self._hidden(ids, positions[None], None)
        head = Head.of(self.model, self.logit_budget)
        return head.score(hidden[:-1], positions[:-1], ids[0, 1:], 1.0)[0]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights in layer order under their names in a checkpoint; tied weights come once."""
        weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
        yield from revert_weight_conversion(self.model, weights).items()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write weights (safetensors), config, generation config and tokenizer to `path`.

        Raises:
            OSError: The folder cannot be written, e.g. because the disk is full.
        """
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def _hidden(
        self,
        token_ids: Int64[Tensor, "1 tokens"],
        position_ids: Int64[Tensor, "1 tokens"],
        layout: ForestLayout | None,
    ) -> Float[Tensor, "tokens hidden"]:
        output = self.model.base_model(
            input_ids=token_ids, position_ids=position_ids, layout=layout, use_cache=False
        )
        return output.last_hidden_state[0]


def load_policy(
    model_path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gradient_checkpointing: bool,
    trust_remote_code: bool = False,
    max_tokens: int | None = None,
) -> Policy:
    """Load a causal model from a folder or a Hugging Face id; safetensors only.

    The model stays in eval mode, so that no dropout comes between the policy and the engines.
    Whether tree attention computes its architecture is for `check_packing` to say.

    Args:
        model_path: Folder or id.
        dtype: Of the weights.
        device: Where they go.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        trust_remote_code: Whether Python code that comes with the model may run.
        max_tokens: Of the run's longest prompt with its answer; see `fix_rotary`. None: there are
            no engines to agree with.

    Raises:
        ValueError: There is no complete model at `model_path`.
    """
    model, tokenizer = _load(model_path, dtype, trust_remote_code)
    cast(nn.Module, model).to(device).eval()
    if gradient_checkpointing:
        recompute_layers(model)
    if max_tokens is not None:
        fix_rotary(model, max_tokens)
    return Policy(model, tokenizer)


def _load(
    model_path: str, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model_path,
            dtype=dtype,
            attn_implementation=TREE_ATTENTION,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model {model_path}: {one_line(error)}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, set]], loaded)
    # Transformers would fill them with random numbers. `check_model` has looked at what was here
    # then, which a download and a checkpoint are not.
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    if lacking := sorted([*report["missing_keys"], *mismatched]):
        raise ValueError(
            f"model {model_path}: {len(lacking)} weights are missing from the checkpoint or have "
            f"another shape than config.json says, e.g. {lacking[0]}"
        )
    return model, tokenizer


def recompute_layers(model: PreTrainedModel) -> None:
    """Have each layer compute its activations again in the backward pass.

    The layers stay in eval mode, where those of transformers would turn dropout on.

    Raises:
        ValueError: the model does not say what its layers are.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"learner.gradient_checkpointing: {type(model).__name__} does not support it"
        )
    for layer in layers:
        forward = partial(checkpoint, layer.forward, use_reentrant=False)
        layer.forward = forward  # type: ignore[method-assign]


def fix_rotary(model: PreTrainedModel, max_tokens: int) -> None:
    """Take LongRoPE's factors by the longest path of a run, for good, as its engines do.

    Transformers takes them by the largest position of each input, vLLM by the room that an engine
    has, which is one token more than the longest path.

    Args:
        model: Is changed.
        max_tokens: Of the longest prompt with its answer.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds == "longrope":
            _fix(module, max_tokens, None)
            setattr(module, "rope_type", "fixed")  # noqa: B010  # torch: any name is a tensor
        elif isinstance(kinds, dict):
            for layer_type in [name for name, kind in kinds.items() if kind == "longrope"]:
                _fix(module, max_tokens, layer_type)
                kinds[layer_type] = "fixed"


def _fix(module: nn.Module, max_tokens: int, layer_type: str | None) -> None:
    """Give a rotary embedding, or its part for a type of layers, the frequencies of engines.

    Raises:
        ValueError: its class would not take them.
    """
    config = cast(PreTrainedConfig, module.config)
    original = (config.rope_parameters or {}).get("original_max_position_embeddings", max_tokens)
    if config.model_type == "phimoe" and max_tokens >= original:
        raise ValueError(
            f"transformers computes phimoe with the factors for short texts at any length, and "
            f"engines with those for long ones from {original} tokens on: the longest prompt with "
            f"its answer has {max_tokens}, make it shorter than {original}"
        )
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    device = cast(Tensor, getattr(module, name)).device
    compute = ROPE_INIT_FUNCTIONS["longrope"]
    frequencies, _ = compute(config, device, seq_len=max_tokens + 1, layer_type=layer_type)
    setattr(module, name, frequencies)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
