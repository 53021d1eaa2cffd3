"""The head: log-probabilities and entropies that keep no logits, exact to the plain ones."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from treerpo_ray.learner import head as head_module
from treerpo_ray.learner.head import Head, Kernels, Tempering, gradient, row_sums

VOCABULARY, HIDDEN, ROWS, EDGES = 1009, 32, 53, 90
"""The vocabulary is a prime: no piece divides it."""
ALONE = {"isolate_recompiles": True}
"""What was compiled before, for other types, is not counted."""


@dataclass
class Case:
    """Inputs of a head; `hidden` and its parameters want gradients."""

    head: Head
    hidden: Tensor
    row: Tensor
    target: Tensor
    temperature: float = 0.6

    def leaves(self) -> list[Tensor]:
        return [
            each for each in (self.hidden, self.head.weight, self.head.bias) if each is not None
        ]

    def plain(self) -> tuple[Tensor, Tensor]:
        """What it must equal: all logits at once, by PyTorch's own functions."""
        logits = nn.functional.linear(self.hidden, self.head.weight, self.head.bias).float()
        logits = logits * self.head.scale
        if self.head.cap is not None:
            logits = self.head.cap * (logits / self.head.cap).tanh()
        logprobs = (logits / self.temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs[self.row, self.target], entropy[self.row]

    def fused(self) -> tuple[Tensor, Tensor]:
        return self.head.score(self.hidden, self.row, self.target, self.temperature)

    def gradients(self, logprobs: Tensor, entropy: Tensor) -> list[Tensor]:
        """Of a loss that is linear in neither."""
        loss = (logprobs.exp() - 0.1 * logprobs + 0.3 * entropy.square()).sum() / EDGES
        return list(torch.autograd.grad(loss, self.leaves()))


def make_case(
    *,
    has_bias: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
    dtype: torch.dtype = torch.float32,
    budget: int | None = None,
) -> Case:
    rng = torch.Generator().manual_seed(0)

    def parameter(*shape: int, size: float) -> Tensor:
        values = size * torch.randn(*shape, generator=rng)
        return values.to(dtype).requires_grad_()

    row = torch.randint(ROWS, (EDGES,), generator=rng)
    target = torch.randint(VOCABULARY, (EDGES,), generator=rng)
    row[1], target[1] = row[0], target[0]  # siblings may begin alike
    return Case(
        head=Head(
            weight=parameter(VOCABULARY, HIDDEN, size=0.2),
            bias=parameter(VOCABULARY, size=0.5) if has_bias else None,
            scale=scale,
            cap=cap,
            logit_budget=budget,
        ),
        hidden=parameter(ROWS, HIDDEN, size=1.0),
        row=row,
        target=target,
    )


@pytest.fixture(params=[2**25, ROWS * 200, 3 * VOCABULARY, 7], ids=["one", "few", "many", "each"])
def budget(request: pytest.FixtureRequest) -> int:
    """Logits a piece: all, 128 columns, 57 columns and 3 rows, a single column and row."""
    return request.param


@pytest.mark.parametrize(
    ("has_bias", "scale", "cap"),
    [(False, 1.0, None), (True, 1.0, None), (False, 2.5, None), (True, 0.5, 3.0)],
)
def test_values_and_gradients_equal_the_plain_ones(
    budget: int, has_bias: bool, scale: float, cap: float | None
) -> None:
    case = make_case(has_bias=has_bias, scale=scale, cap=cap, budget=budget)
    fused, plain = case.fused(), case.plain()
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(case.gradients(*fused), case.gradients(*plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_under_autocast_it_is_the_plain_bfloat16_path_with_its_rounding(
    budget: int, cap: float | None
) -> None:
    case = make_case(has_bias=True, cap=cap, budget=budget)
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = case.fused(), case.plain()
    assert {each.dtype for each in fused} == {torch.float32}
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-6)
    # One rounding of a gradient, relative: 2**-8; those of hidden states add up over pieces.
    for mine, theirs in zip(case.gradients(*fused), case.gradients(*plain), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 2**-8 * theirs.norm()
        assert (mine - theirs).abs().max() < 2**-6 * theirs.abs().max()


def test_weights_in_bfloat16_are_computed_in_it_and_scored_in_float32() -> None:
    case = make_case(dtype=torch.bfloat16)
    fused, plain = case.fused(), case.plain()
    assert {each.dtype for each in fused} == {torch.float32}
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-6)
    assert {each.dtype for each in case.gradients(*fused)} == {torch.bfloat16}


def test_the_entropy_of_a_row_that_is_nearly_certain_is_not_lost_to_the_size_of_its_logits() -> (
    None
):
    """Of two tokens, 60 nats above the others and `gap` apart: a thousandth of what a logit of 80
    is rounded by."""
    gap = 20.0
    weight = torch.zeros(VOCABULARY, 1)
    weight[3], weight[5] = 60 + gap, 60
    head = Head(weight=weight, bias=None, scale=1.0, cap=None)
    places = torch.zeros(1, dtype=torch.int64)
    _, entropy = head.score(torch.ones(1, 1), places, places + 3, 1.0)
    other = torch.tensor(-gap, dtype=torch.float64).sigmoid()
    exact = -(other * other.log() + (1 - other) * (-other).log1p())
    assert float(entropy) == pytest.approx(float(exact), rel=0.06)


def test_what_wants_no_gradient_gets_none() -> None:
    case = make_case(has_bias=True)
    frozen = Case(
        head=Head(
            weight=case.head.weight.detach(),
            bias=case.head.bias.detach(),
            scale=1.0,
            cap=None,
        ),
        hidden=case.hidden,
        row=case.row,
        target=case.target,
    )
    whole = torch.autograd.grad(case.fused()[0].sum(), case.leaves())
    [alone] = torch.autograd.grad(frozen.fused()[0].sum(), [case.hidden])
    torch.testing.assert_close(alone, whole[0], atol=0, rtol=0)
    with torch.no_grad():
        assert not case.fused()[0].requires_grad


def test_a_weight_that_is_the_embedding_too_gets_both_gradients() -> None:
    case = make_case()
    tokens = torch.arange(ROWS) * 7
    grads = []
    for is_fused in (True, False):
        case.hidden = nn.functional.embedding(tokens, case.head.weight).tanh()
        logprobs, entropy = case.fused() if is_fused else case.plain()
        grads += torch.autograd.grad((logprobs + entropy).mean(), [case.head.weight])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


class Products(TorchDispatchMode):
    """Notes the sizes of what projections with a bias make, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Callable, types: object, inputs: tuple, named: dict | None = None
    ) -> object:
        made = function(*inputs, **(named or {}))
        if function is torch.ops.aten.addmm.default:
            self.sizes.append(made.numel())
        return made


def test_nothing_of_the_size_of_the_logits_is_kept_or_alive() -> None:
    case = make_case(has_bias=True, budget=4 * VOCABULARY)
    kept: list[Tensor] = []
    products = Products()

    def watch(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with products, saved_tensors_hooks(watch, lambda saved: saved):
        scores = case.fused()
    assert sum(products.sizes) == ROWS * VOCABULARY, "each logit is made once"
    own = {each.data_ptr() for each in case.leaves()}
    assert max(each.numel() for each in kept if each.data_ptr() not in own) <= EDGES
    with products:
        case.gradients(*scores)
    assert sum(products.sizes) == 2 * ROWS * VOCABULARY, "and once in the backward pass"
    assert max(products.sizes) <= 4 * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_compiler_traces_each_kernel_whole_and_once_for_all_sizes_and_temperatures(
    dtype: torch.dtype, cap: float | None
) -> None:
    """Only what it makes for a GPU out of the trace is not run here."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = Kernels(
        *(
            torch.compile(each, backend=counter, fullgraph=True, dynamic=True, **ALONE)
            for each in (row_sums, gradient)
        )
    )
    rng = torch.Generator().manual_seed(0)
    for rows, columns, edges, slope in ((5, 30, 7, 1.7), (8, 96, 11, 1.0), (7, 31, 9, 0.5)):
        product = (3 * torch.randn(rows, columns, generator=rng)).to(dtype)
        tempering = Tempering(slope=slope, bound=cap)
        sums = row_sums(product.clone(), tempering)
        torch.testing.assert_close(compiled.row_sums(product.clone(), tempering), sums)
        of_rows = (*sums, *torch.randn(2, rows, generator=rng))
        by_target = (
            torch.randint(rows, (edges,), generator=rng),
            torch.randint(columns, (edges,), generator=rng),
            torch.randn(edges, generator=rng),
        )
        expected = gradient(product.clone(), tempering, of_rows, by_target)
        found = compiled.gradient(product.clone(), tempering, of_rows, by_target)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 2


def test_kernels_are_compiled_on_a_gpu_alone() -> None:
    assert head_module.kernels("cpu") == (row_sums, gradient)
    compiled = head_module.kernels("cuda")
    assert compiled is head_module.kernels("cuda"), "once"
    assert all(each not in (row_sums, gradient) for each in compiled)


def test_a_head_that_is_no_plain_projection_is_refused() -> None:
    class Normed(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, nn.functional.normalize(self.weight))

    config = CONFIG_MAPPING["qwen2"](
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert Head.of(model).weight is model.lm_head.weight
    model.set_output_embeddings(Normed(8, 11, bias=False))
    with pytest.raises(ValueError, match=r"^the head of Qwen2ForCausalLM is a Normed, .*: use an"):
        Head.of(model)
