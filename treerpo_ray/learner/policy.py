"""Policy: the causal language model that is trained, seen through log-probabilities of edges."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from treerpo_ray.algo.packing import Forest
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.errors import one_line
from treerpo_ray.learner.adapters.lora import Adapters
from treerpo_ray.learner.forest_layout import ForestLayout
from treerpo_ray.learner.head import Head, Kernels
from treerpo_ray.learner.layers import compile_layers, fix_rotary, layers_of, recompute_layers
from treerpo_ray.learner.shards.export import write_weights
from treerpo_ray.learner.shards.sharding import Sharding, whole
from treerpo_ray.learner.tree_attention import TREE_ATTENTION
from treerpo_ray.run_folder.files import ADAPTER_FOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestTensors:
    """A packed forest on the learner's device; edges stand in the forest's order.

    Indices are int64, which all of torch's functions and compiled kernels take.
    """

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
            token_ids=tensor(forest.token_ids).long()[None],
            position_ids=tensor(forest.position_ids).long()[None],
            layout=ForestLayout.from_forest(forest, device),
            source=tensor(source).long(),
            edge_source=tensor(edge_source.reshape(-1)),
            target=tensor(forest.target).long(),
            advantage=tensor(forest.advantage),
            behaviour_logprob=tensor(forest.behaviour_logprob),
            step=tensor(forest.step),
        )


class Policy:
    """A Hugging Face causal model with tree attention.

    `PackingCheck` refuses any model whose packed log-probabilities are not its plain ones. A
    reference model is a second Policy, used under `torch.no_grad`.

    Of a sharded policy the workers do all together, in the same order: each pass, and each weight
    that is asked for.

    Args:
        model: With tree attention; in main memory, if it is to be sharded.
        tokenizer: Is saved with it.
        sharding: How the model is to be sharded; None: this process has the whole of it.
        adapters: Those in the model, which alone are trained and published; None: all of it is.
        logit_budget: Logits that are alive at a time; by default `LOGIT_BUDGET` of the head.
        kernels: Of the head; by default those of the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sharding: Sharding | None = None,
        adapters: Adapters | None = None,
        logit_budget: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sharding = sharding
        self.adapters = adapters
        self._scores = _Scores(model, logit_budget=logit_budget, kernels=kernels)
        if sharding is not None:
            sharding.apply(self._scores, [*layers_of(model, "learner.shard")])
        # Tree attention gives masks. With one, cuDNN's kernels (Hopper and newer) return NaN as
        # gradients of queries whose keys are 64 modulo 128, and plan anew for each shape.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def edge_logprobs(
        self, forest: ForestTensors, temperature: float
    ) -> tuple[Float32[Tensor, " edges"], Float32[Tensor, " edges"]]:
        """Log-probability of each edge's target and entropy at its source, both in nats.

        Both are of the distribution softmax(logits / temperature), the one that was sampled from.
        """
        return self._score_edges(forest, temperature)

    @torch.no_grad()
    def edge_pulls(
        self, forest: ForestTensors, temperature: float
    ) -> tuple[Float32[Tensor, "edges hidden"], Float32[Tensor, "edges hidden"]]:
        """Gradient of each edge's log-probability by the last hidden state at its source, and that
        state; see `Head.pulls`. The weights get no gradients."""
        return self._score_edges(forest, temperature, is_pull=True)

    @torch.no_grad()
    def sequence_logprobs(self, token_ids: list[int]) -> Float32[Tensor, " targets"]:
        """Log-probability (nats, temperature 1) of each token after the first, given those before.

        A plain causal forward without any tree: what an engine must agree with.
        """
        device = self.device
        ids = torch.tensor([token_ids], device=device)
        positions = torch.arange(len(token_ids), device=device)
        sources = positions[:-1]
        return self._score(ids, positions[None], None, sources, sources, ids[0, 1:], 1.0)[0]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        if self.sharding is None:
            return self.model.device
        return torch.device(self.sharding.mesh.device_type)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that are trained."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Weights in layer order under their names in a checkpoint; tied weights come once.

        Sharded ones are gathered as they are asked for, those of one layer at a time. Where there
        are adapters it is they alone, under PEFT's names, sorted.

        Args:
            dtype: Type that floating ones are gathered in; those that are not sharded come as
                they are kept, since whoever packs them casts them on the way.
        """
        gathered_as = None if self.sharding is None else dtype
        if self.adapters is not None:
            return ((name, _whole(each, gathered_as)) for name, each in self.adapters.named())
        named = ((name, weight.detach()) for name, weight in self.model.named_parameters())
        return self._gathered(named, gathered_as)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write weights (safetensors), config, generation config and tokenizer to `path`.

        Of a sharded policy the first worker writes, and all take part. Adapters are merged into the
        weights, in whose type that is rounded, and lie by themselves in a folder besides.

        Raises:
            OSError: The folder cannot be written, e.g. because the disk is full.
        """
        if self.adapters is not None:
            self.save_adapters(Path(path) / ADAPTER_FOLDER)
        if self.sharding is None and self.adapters is None:
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            return
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        tied = set(names) - {name for name, _ in self.model.named_parameters()}
        state = self.model.state_dict().items()  # with buffers
        own = ((name, value) for name, value in state if name not in tied)
        weights = self._gathered(own if self.adapters is None else self.adapters.merged(own), None)

        def write() -> None:
            self.model.save_pretrained(path, state_dict={})  # all but weights
            self.tokenizer.save_pretrained(path)
            write_weights(Path(path), weights)

        self._write_jointly(write, weights)

    def save_adapters(self, folder: Path) -> None:
        """Write the adapters and the tokenizer, as PEFT loads them; all workers take part.

        Raises:
            OSError, SafetensorError: the disk refuses.
        """
        adapters = self.adapters
        assert adapters is not None
        weights = self.named_weights()

        def write() -> None:
            adapters.save(folder, weights)
            self.tokenizer.save_pretrained(folder)

        self._write_jointly(write, weights)

    def _write_jointly(
        self, write: Callable[[], None], weights: Iterator[tuple[str, Tensor]]
    ) -> None:
        """Have the first worker write `weights`, of which the others give their parts."""
        try:
            if self.sharding is None or self.sharding.is_first:
                write()
        finally:  # whatever the disk refuses
            for _ in weights:
                pass

    def _gathered(
        self, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor]]:
        # What a checkpoint has in another form than the model, it has so within a layer.
        for _, part in groupby(named, key=lambda each: _layer_name(each[0])):
            weights = {name: _whole(weight, dtype) for name, weight in part}
            yield from revert_weight_conversion(self.model, weights).items()

    def _score_edges(
        self, forest: ForestTensors, temperature: float, *, is_pull: bool = False
    ) -> tuple[Tensor, Tensor]:
        return self._score(
            forest.token_ids,
            forest.position_ids,
            forest.layout,
            forest.source,
            forest.edge_source,
            forest.target,
            temperature,
            is_pull=is_pull,
        )

    def _score(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        layout: ForestLayout | None,
        source: Tensor,
        row: Tensor,
        target: Tensor,
        temperature: float,
        *,
        is_pull: bool = False,
    ) -> tuple[Tensor, Tensor]:
        found = self._scores(
            token_ids, position_ids, layout, source, row, target, temperature, is_pull
        )
        if self.sharding is not None and not torch.is_grad_enabled():
            # No backward pass will: the next one would compute with weights of before a step.
            cast(FSDPModule, self._scores).reshard()
        return found


class _Scores(nn.Module):
    """A model whose output are log-probabilities and entropies.

    A pass through model and head is one call, as FSDP needs it to have their weights at hand.
    """

    def __init__(
        self, model: PreTrainedModel, *, logit_budget: int | None, kernels: Kernels | None
    ) -> None:
        super().__init__()
        self.model, self.logit_budget, self.kernels = model, logit_budget, kernels

    def forward(
        self,
        token_ids: Int64[Tensor, "1 tokens"],
        position_ids: Int64[Tensor, "1 tokens"],
        layout: ForestLayout | None,
        source: Int64[Tensor, " sources"],
        row: Int64[Tensor, " edges"],
        target: Int64[Tensor, " edges"],
        temperature: float,
        is_pull: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `Head.score` or, where `is_pull`, `Policy.edge_pulls`; `source` has the positions
        whose hidden states are the rows."""
        output = self.model.base_model(
            input_ids=token_ids, position_ids=position_ids, layout=layout, use_cache=False
        )
        hidden = output.last_hidden_state[0].index_select(0, source)
        head = Head.of(self.model, logit_budget=self.logit_budget, kernels=self.kernels)
        if is_pull:
            states = hidden.index_select(0, row)
            return head.pulls(states, target, temperature), states.float()
        return head.score(hidden, row, target, temperature)


def _whole(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight with all of its parts, floating ones in a type if one is given."""
    return whole(weight.to(dtype) if weight.is_floating_point() and dtype else weight)


def _layer_name(weight: str) -> str:
    """Name of a weight's layer, up to the first number in it; the weight's own outside of layers.

    >>> _layer_name("model.layers.3.mlp.experts.5.down_proj.weight"), _layer_name("lm_head.weight")
    ('model.layers.3.', 'lm_head.weight')
    """
    found = re.match(r".*?\.\d+\.", weight)
    return found[0] if found else weight


def load_policy(
    model_path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gradient_checkpointing: bool,
    compiled: bool = False,
    sharding: Sharding | None = None,
    trust_remote_code: bool = False,
    max_tokens: int | None = None,
    lora: LoraConfig | None = None,
    adapters_from: Path | None = None,
) -> Policy:
    """Load a causal model from a folder or a Hugging Face id; safetensors only.

    The model stays in eval mode, so that no dropout comes between the policy and the engines.
    Whether tree attention computes its architecture is for `check_packing` to say.

    Args:
        model_path: Folder or id.
        dtype: Of the weights.
        device: Where they go.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        compiled: Whether torch compiles its layers.
        sharding: How it is to be sharded; each worker then reads the whole into main memory.
        trust_remote_code: Whether Python code that comes with the model may run.
        max_tokens: Of the run's longest prompt with its answer; see `fix_rotary`. None: there are
            no engines to agree with.
        lora: Adapters that it is given; None: none.
        adapters_from: Folder that `Policy.save_adapters` has filled, to take them from; None: new
            ones.

    Raises:
        ValueError: There is no complete model at `model_path`, or it has no such layers.
    """
    model, tokenizer = _load(model_path, dtype, trust_remote_code)
    module = cast(nn.Module, model).eval()
    adapters = None if lora is None else Adapters(model, settings=lora, folder=adapters_from)
    if sharding is None:
        module.to(device)
    if compiled:
        compile_layers(model)
    if gradient_checkpointing:
        recompute_layers(model)
    if max_tokens is not None:
        fix_rotary(model, max_tokens)
    return Policy(model, tokenizer, sharding=sharding, adapters=adapters)


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


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
