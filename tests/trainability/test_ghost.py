"""ghost_gram equals the products of explicit gradients of single rows, for every form of expert."""

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mocte_ds.errors import MocteError
from mocte_ds.trainability import forms, ghost, ghost_gram, lambda_max
from tests.trainability.test_kernel import FORMS, D, F, kernel, other, randomised, swiglu


class BiasedSwiGLU(LlamaMLP):
    """Gated with biases everywhere, so that the two input matrices have different Gram matrices."""

    def __init__(self, up_bias: bool = True) -> None:
        super().__init__(LlamaConfig(hidden_size=D, intermediate_size=F, num_attention_heads=1))
        self.gate_proj, self.up_proj = nn.Linear(D, F), nn.Linear(D, F, bias=up_bias)
        self.down_proj = nn.Linear(F, D)


class Wide(nn.Module):
    """d' differs from d; an activation that acts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, F), nn.Linear(F, 3, bias=False), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


CLOSED = {name: make for name, make in FORMS.items() if name != "any module"} | {
    "gated with biases": lambda: randomised(BiasedSwiGLU()),
    "gated, one bias": lambda: randomised(BiasedSwiGLU(up_bias=False)),
    "other width": lambda: randomised(Wide()),
}
ALL = CLOSED | {"any module": other}


def row_gradients(expert: nn.Module, x: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
    """(n, P) gradient of each row's loss by backward() in fp64; output_gradient is d loss / d y."""
    expert = copy.deepcopy(expert).double().eval().requires_grad_()
    rows = []
    for row, slope in zip(x.double(), output_gradient.double(), strict=True):
        expert.zero_grad()
        outputs = expert(row[None])
        (outputs[0] if isinstance(outputs, tuple) else outputs).backward(slope[None])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in expert.parameters()]
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def assert_equals(found: torch.Tensor, gradients: torch.Tensor, tolerance: float) -> None:
    """All entries to a tolerance of the gradients' lengths: |K_ij - <g_i, g_j>| <= tolerance |g_i| |g_j|."""
    expected, length = gradients @ gradients.T, gradients.norm(dim=1)
    assert float(length.min()) > 1e-3, "the case is empty"
    error = (found.double() - expected) / length[:, None] / length
    assert float(error.abs().max()) <= tolerance


def outputs_of(expert: nn.Module) -> int:
    return 3 if isinstance(expert, Wide) else D


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("n", [1, 9])
def test_equals_explicit_gradients_of_single_rows(form: str, n: int) -> None:
    expert, x = ALL[form](), torch.randn(n, D)
    slopes = torch.randn(n, outputs_of(expert))
    gradients = row_gradients(expert, x, slopes)
    found = ghost_gram(expert, x, slopes)
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    assert_equals(found, gradients, 1e-4)
    found = ghost_gram(expert.double(), x.double(), slopes.double())
    assert found.dtype == torch.float64
    assert_equals(found, gradients, 1e-6)


@pytest.mark.parametrize("form", CLOSED)
def test_known_forms_take_the_closed_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(ghost, "_by_rows", fail)
    expert = CLOSED[form]()
    ghost_gram(expert, torch.randn(5, D), torch.randn(5, outputs_of(expert)))


@pytest.mark.parametrize("form", ["swiglu", "gelu", "lora at birth", "any module"])
def test_bf16_module_is_measured_in_fp32(form: str) -> None:
    expert, x, slopes = ALL[form]().bfloat16(), torch.randn(7, D).bfloat16(), torch.randn(7, D).bfloat16()
    found = ghost_gram(expert, x, slopes)
    assert found.dtype == torch.float32
    assert_equals(found, row_gradients(expert, x, slopes), 1e-4)


def test_autocast_does_not_round_it() -> None:
    for form in ("swiglu", "any module"):
        expert, x, slopes = ALL[form](), torch.randn(6, D), torch.randn(6, D)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ghost_gram(expert, x, slopes)
        assert_equals(found, row_gradients(expert, x, slopes), 1e-4)


def test_tokens_of_a_real_loss() -> None:
    """Output gradients of one backward pass through a head give the Gram matrix of per-token losses."""
    expert, head, x = (
        randomised(swiglu()).double(),
        nn.Linear(D, 5).double().requires_grad_(False),
        torch.randn(8, D).double(),
    )
    targets = torch.randint(5, (8,))
    parameters = {name: p.detach() for name, p in expert.named_parameters()}

    def loss(values: dict[str, torch.Tensor], row: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        y = torch.func.functional_call(expert, values, (row[None],))
        return functional.cross_entropy(head(row[None] + y), target[None])

    explicit = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, targets)
    gradients = torch.cat([g.flatten(1) for g in explicit.values()], dim=1)
    y = expert(x)
    (slopes,) = torch.autograd.grad(functional.cross_entropy(head(x + y), targets, reduction="sum"), y)
    assert_equals(ghost_gram(expert, x, slopes), gradients, 1e-6)


def test_no_gradient_of_a_single_row_is_formed() -> None:
    """The largest tensor of the closed form, at n = 16 and matrices of 32 x 48, is no larger than a matrix or n x f."""
    n, d, f = 16, 32, 48
    expert = randomised(swiglu(d=d, f=f))
    x, slopes, largest = torch.randn(n, d), torch.randn(n, d), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            tensors: Iterable[object] = found if isinstance(found, tuple | list) else (found,)
            largest = max([largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
            return found

    with Watch():
        ghost_gram(expert, x, slopes)
    assert n * f <= largest <= max(n * f, n * n, d * f)


class Choosy(nn.Module):
    """Chooses by a value, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return self.a(x).tanh() if float(x[0, 0]) > 0 else self.b(x)
        return torch.cat([self(row[None]) for row in x])


class _Square(torch.autograd.Function):
    """Without a setup_context, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * slope


class Squared(nn.Module):
    """Also returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Square.apply(self.a(x)), None


@pytest.mark.parametrize("make", [Choosy, Squared])
def test_modules_that_cannot_be_batched(make: type[nn.Module]) -> None:
    expert, x, slopes = make(), torch.randn(9, D), torch.randn(9, D)
    assert 0 < int((x[:, 0] > 0).sum()) < 9
    assert_equals(ghost_gram(expert, x, slopes), row_gradients(expert, x, slopes), 1e-4)


def test_many_parameters_are_compared_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    expert, x, slopes = other(), torch.randn(10, D), torch.randn(10, D)
    sizes, stacked = [], ghost._row_gradients

    def watched(*args: object) -> object:
        inner = stacked(*args)
        return lambda rows: (sizes.append(len(rows)), inner(rows))[1]

    monkeypatch.setattr(ghost, "_row_gradients", watched)
    monkeypatch.setattr(ghost, "_GRADIENT_FLOATS", 4 * sum(p.numel() for p in expert.parameters()))
    assert_equals(ghost_gram(expert, x, slopes), row_gradients(expert, x, slopes), 1e-4)
    assert max(sizes) == 4 and len(sizes) == 3 + 2 + 1


@pytest.mark.parametrize("zero_output", [False, True])
def test_an_ffn_that_computes_something_else_is_not_taken_for_one(zero_output: bool) -> None:
    """Nor while an output matrix of zeros hides what its hidden units are."""

    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    expert, x, slopes = randomised(swiglu(Doubled)), torch.randn(6, D), torch.randn(6, D)
    if zero_output:
        nn.init.zeros_(expert.down_proj.weight)
    assert forms.known_ffn(expert, x) is None
    assert_equals(ghost_gram(expert, x, slopes), row_gradients(expert, x, slopes), 1e-4)
    assert lambda_max(expert, x) == pytest.approx(float(torch.linalg.eigvalsh(kernel(expert, x))[-1]), rel=1e-4)


def test_tied_matrices_have_one_gradient() -> None:
    expert, x, slopes = randomised(swiglu()), torch.randn(6, D), torch.randn(6, D)
    expert.up_proj.weight = expert.gate_proj.weight
    assert_equals(ghost_gram(expert, x, slopes), row_gradients(expert, x, slopes), 1e-4)


class Counting(nn.Module):
    """A dropout, parts in different modes, and a buffer that changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.norm = nn.Linear(D, D), nn.Dropout(0.5), nn.LayerNorm(D).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.drop(self.a(self.norm(x)))


@pytest.mark.parametrize("make", [Counting, FORMS["gpt2"], FORMS["lora at birth"]])
def test_leaves_the_module_as_it_is_and_counts_frozen_parameters(make) -> None:  # type: ignore[no-untyped-def]
    expert, x, slopes = make(), torch.randn(5, D), torch.randn(5, D)
    modes, before = [m.training for m in expert.modules()], copy.deepcopy(expert.state_dict())
    random, inputs = torch.get_rng_state(), (x.clone(), slopes.clone())
    found = ghost_gram(expert, x.requires_grad_(), slopes)
    assert not found.requires_grad and x.grad is None
    assert modes == [m.training for m in expert.modules()]
    assert all(p.grad is None and p.requires_grad for p in expert.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in expert.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, inputs[0]) and torch.equal(slopes, inputs[1])
    assert torch.equal(found, ghost_gram(expert.requires_grad_(False), x, slopes))


@pytest.mark.parametrize(
    ("expert", "x", "slopes", "message"),
    [
        (swiglu(), torch.zeros(0, D), torch.zeros(0, D), "n of 1 or more"),
        (swiglu(), torch.zeros(2, 3, D), torch.zeros(2, 3, D), "n of 1 or more"),
        (swiglu(), torch.full((2, D), float("nan")), torch.zeros(2, D), "NaN or infinite"),
        (swiglu(), torch.zeros(2, D), torch.full((2, D), float("inf")), "finite"),
        (swiglu(), torch.zeros(2, D), torch.zeros(2, D, dtype=torch.int64), "finite"),
        (swiglu(), torch.zeros(2, D), torch.zeros(3, D), "one gradient of the expert's own output"),
        (swiglu(), torch.zeros(2, D), torch.zeros(2, 1), "one gradient of the expert's own output"),
        (other(), torch.zeros(2, D), torch.zeros(2, 1), "one gradient of the expert's own output"),
        (other(), torch.zeros(2, D), torch.zeros(1, D), "one gradient of the expert's own output"),
        (swiglu(), torch.zeros(2, D + 1), torch.zeros(2, D), "does not take rows"),
        (other(), torch.zeros(2, D + 1), torch.zeros(2, D), "does not take rows"),
        (nn.Tanh(), torch.zeros(2, D), torch.zeros(2, D), "Tanh has none"),
        (swiglu(), torch.ones(2, D), torch.full((2, D), 1e30), "products are NaN or infinite"),
    ],
)
def test_refusals(expert: nn.Module, x: torch.Tensor, slopes: torch.Tensor, message: str) -> None:
    with pytest.raises(MocteError, match=message):
        ghost_gram(expert, x, slopes)
