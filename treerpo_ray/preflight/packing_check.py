"""Packing check: whether tree attention computes an architecture, told from its configuration.

A small random model of the same configuration is computed twice: a packed forest by tree attention,
and each of its paths as a plain row by the eager attention of transformers, which has every window,
cap, bias and mask that the architecture asks for. This also finds what no configuration says:
layers that mix tokens past the attention function, heads that scale their logits in a way of
their own.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from treerpo_ray.algo.packing import Forest
from treerpo_ray.errors import one_line
from treerpo_ray.learner.layers import fix_rotary, recompute_layers
from treerpo_ray.learner.policy import ForestTensors, Policy
from treerpo_ray.learner.tree_attention import TREE_ATTENTION

MOST_PATH_TOKENS = 96
"""Tokens of the longest path that is computed. Windows that are longer than that are compared with
the longest path of the run by tree attention itself."""
TOLERANCE = 3e-3
"""Largest difference of log-probabilities, as a share of their spread over the vocabulary. Rounding
makes less than a tenth of it, and what is left out more than ten times as much."""
GAIN = 0.7
"""Size of what a random matrix makes of numbers of size one. Attention is far from uniform with it,
and rounding errors do not grow from layer to layer."""
FIRST_LAYERS = 8
"""Layers that are computed at least: what goes by a layer's number comes at one of these."""
MOST_PARAMETERS = 5e8
"""Parameters of a model that is computed."""
VOCABULARY, WIDTH = 256, 32
"""Sizes where they have no say in attention."""
WIDTHS = re.compile(r".*(intermediate|ffn|n_inner|d_ff|mlp_hidden|mlp_dim|_lora_rank).*")
"""Keys of widths of feed-forward parts and low-rank projections."""
EXPERTS = re.compile(r"(n_routed|num|num_local|moe_num)_experts")
"""Keys of the number of experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingCheck:
    """How the learner will compute a model.

    Args:
        max_tokens: Of the longest prompt with its answer.
        gradient_checkpointing: Whether it computes activations again in the backward pass.
        trust_remote_code: Whether Python code that comes with the model may run.
    """

    max_tokens: int
    gradient_checkpointing: bool
    trust_remote_code: bool

    def run(self, config: PreTrainedConfig) -> None:
        """Compare packed trees with rows, on paths that end at the run's last position.

        Raises:
            ValueError: tree attention does not compute the architecture on paths of that length.
        """
        small, plain = self._small_model(config)
        difference = self._difference(small, plain)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"packed trees of {config.model_type} give log-probs that are {difference:.1%} of "
                "their spread off its own: its code does not hand trees on to its attention, or "
                "some layer mixes tokens past it (recurrence, convolution, a bias of positions), "
                "so that tree attention cannot train it"
            )

    @property
    def _length(self) -> int:
        """Tokens of the longest path that is computed."""
        return max(4, min(self.max_tokens, MOST_PATH_TOKENS))

    def _small_model(self, config: PreTrainedConfig) -> tuple[PreTrainedConfig, PreTrainedModel]:
        """A small configuration, and its model with eager attention, which computes."""
        for is_narrow in (True, False):
            try:
                small = small_config(config, is_narrow=is_narrow)
                plain = self._eager(small)
                forest = self._forest(plain, 0)
                _row_logits(plain, forest, np.arange(forest.segment_length[0]))
            except Exception as error:  # an architecture may ask for anything of its widths
                failed = error
            else:
                return small, plain
        raise ValueError(
            f"a small model of {config.model_type} could not be computed, so that it is not known "
            f"whether tree attention trains it ({type(failed).__name__}: {one_line(failed)})"
        ) from failed

    @torch.no_grad()
    def _eager(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A random model with eager attention."""
        with torch.device("meta"):
            empty = self._make(config, "eager")
        if (number := sum(parameter.numel() for parameter in empty.parameters())) > MOST_PARAMETERS:
            raise ValueError(f"its fewest layers have {number / 1e6:.0f} M parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = self._make(config, "eager")
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=GAIN * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return made

    def _make(self, config: PreTrainedConfig, attention: str) -> PreTrainedModel:
        made = AutoModelForCausalLM.from_config(
            deepcopy(config),
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=self.trust_remote_code,
        )
        return made.eval()

    def _forest(self, model: PreTrainedModel, start: int) -> Forest:
        embedding = cast(Tensor, model.get_input_embeddings().weight)
        return _forest(self._length, start, len(embedding))

    @torch.no_grad()
    def _difference(self, config: PreTrainedConfig, plain: PreTrainedModel) -> float:
        """Largest difference of packed and plain log-probabilities, as a share of their spread."""
        # The last position that an engine of the run has room for: transformers takes LongRoPE's
        # factors by the largest one, and would take others for shorter rows.
        forest = self._forest(plain, max(0, self.max_tokens + 1 - self._length))
        try:
            packed = self._make(config, TREE_ATTENTION)
            packed.load_state_dict(plain.state_dict())
            fix_rotary(packed, self.max_tokens)
            if self.gradient_checkpointing:
                recompute_layers(packed)
            logprobs = self._packed_logprobs(packed, forest)
        except ValueError:
            raise
        except Exception as error:  # of code that goes ways of its own
            raise ValueError(
                f"the code of {type(plain).__name__} has no place for tree attention "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error
        return _largest_difference(plain, forest, logprobs)

    def _packed_logprobs(self, model: PreTrainedModel, forest: Forest) -> Float[Tensor, " edges"]:
        tensors = ForestTensors.from_forest(forest, model.device)
        # As if the paths were the run's longest: their length decides what is refused.
        layout = replace(tensors.layout, longest_path=self.max_tokens)
        policy = Policy(model, cast(PreTrainedTokenizerBase, None))  # it is not saved
        return policy.edge_logprobs(replace(tensors, layout=layout), 1.0)[0]


def small_config(config: PreTrainedConfig, *, is_narrow: bool = True) -> PreTrainedConfig:
    """The configuration of a small model that attends as the one of `config` does.

    Sizes of heads stay, since rotary factors depend on them.

    Args:
        config: Of the model.
        is_narrow: Whether it has fewer heads and experts, too.
    """
    small = deepcopy(config)
    text = small.get_text_config()
    changes = [*_fewer_layers(text), *_less_width(text)]
    if is_narrow:
        changes += _fewer_heads(text)
    for key, value in changes:
        setattr(text, key, value)
    for key in small.sub_configs:  # of images and sounds, which no path has
        part = getattr(small, key, None)
        if isinstance(part, PreTrainedConfig) and part is not text:
            for name, value in _less_width(part):
                setattr(part, name, value)
            if hasattr(part, "num_hidden_layers"):
                part.num_hidden_layers = 1
    return small


def _fewer_layers(text: PreTrainedConfig) -> Iterator[tuple[str, object]]:
    """Keys and values with the first layers, and one of each kind that is listed."""
    number = getattr(text, "num_hidden_layers", None)
    if number is None:  # the code of a model's own has other names
        return
    lists = {
        key: value
        for key, value in text.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == number
    }
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)]
    chosen = sorted({*range(min(number, FIRST_LAYERS)), *(kinds.index(kind) for kind in kinds)})
    for key, value in lists.items():
        yield key, [value[layer] for layer in chosen]
    yield "num_hidden_layers", len(chosen)


def _less_width(part: PreTrainedConfig) -> Iterator[tuple[str, object]]:
    """Keys and values with little width where that has no say in attention."""
    for key, value in part.to_dict().items():
        if type(value) is int and WIDTHS.fullmatch(key):
            yield key, min(value, WIDTH)
        elif type(value) is int and key.startswith("vocab_size"):
            yield key, min(value, VOCABULARY)
        elif key == "pad_token_id" and type(value) is int:
            yield key, 0


def _fewer_heads(text: PreTrainedConfig) -> Iterator[tuple[str, object]]:
    """Keys and values with fewer heads, as many as they need hidden sizes, and fewer experts."""
    values = text.to_dict()
    for key, value in values.items():
        if type(value) is int and EXPERTS.fullmatch(key):
            groups = values.get("n_group") or 1
            yield key, min(value, 4 * groups * (values.get("num_experts_per_tok") or 2))
    hidden, heads, key_heads = (
        values.get(text.attribute_map.get(key, key))
        for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 2:
        yield "num_attention_heads", 2
        yield "hidden_size", 2 * (values.get("head_dim") or hidden // heads)
        if isinstance(key_heads, int):
            yield "num_key_value_heads", 2 if key_heads == heads else 1


PATHS = ([0, 1, 3], [0, 2, 4])
"""Segments of each path of `_forest`."""


def _forest(length: int, start: int, vocabulary: int) -> Forest:
    """A prompt with two steps, each of which has one more; every token of a step trains.

    Both paths have `length` tokens; positions begin at `start`.
    """
    step = length // 4
    prompt = length - 2 * step
    lengths, parents = np.array([prompt, step, step, step, step]), np.array([-1, 0, 0, 1, 2])
    starts = np.cumsum(lengths) - lengths
    ends = starts + lengths - 1
    before = np.array([0, prompt, prompt, prompt + step, prompt + step])
    tokens = (np.arange(lengths.sum()) * 7919 % vocabulary).astype(np.int32)
    steps = [np.arange(first, first + step) for first in starts[1:]]
    positions = start + np.arange(lengths.sum()) + np.repeat(before - starts, lengths)
    source = [[ends[parent], *own[:-1]] for parent, own in zip(parents[1:], steps, strict=True)]
    return Forest(
        token_ids=tokens,
        position_ids=positions.astype(np.int32),
        segment_start=starts,
        segment_length=lengths,
        segment_parent=parents,
        segment_depth=np.array([0, 1, 1, 2, 2]),
        source=np.concatenate(source, dtype=np.int32),
        target=tokens[prompt:],
        advantage=np.zeros(4 * step, np.float32),
        behaviour_logprob=np.zeros(4 * step, np.float32),
        step=np.repeat(np.arange(4, dtype=np.int32), step),
        origin=np.arange(4),
    )


def _largest_difference(
    plain: PreTrainedModel, forest: Forest, logprobs: Float[Tensor, " edges"]
) -> float:
    """Of the log-probabilities of `_forest` from those of its two paths as rows."""
    largest = []
    for path in PATHS:
        starts, lengths = forest.segment_start[path], forest.segment_length[path]
        tokens = [np.arange(first, first + n) for first, n in zip(starts, lengths, strict=True)]
        edges = np.concatenate([np.flatnonzero(forest.step == segment - 1) for segment in path[1:]])
        own = _row_logits(plain, forest, np.concatenate(tokens)).log_softmax(-1)
        own = own[lengths[0] - 1 : -1]
        target = torch.from_numpy(forest.target[edges]).long()
        difference = logprobs[torch.from_numpy(edges)] - own[range(len(target)), target]
        largest.append(float(difference.abs().max() / own.std()))
    return max(largest)


@torch.no_grad()
def _row_logits(
    model: PreTrainedModel, forest: Forest, tokens: Int64[np.ndarray, " row"]
) -> Float[Tensor, "row vocabulary"]:
    """The model's own logits for some tokens of a forest as a plain row."""
    output = model(
        input_ids=torch.from_numpy(forest.token_ids[tokens]).long()[None],
        position_ids=torch.from_numpy(forest.position_ids[tokens]).long()[None],
        use_cache=False,
    )
    return output.logits[0].float()
