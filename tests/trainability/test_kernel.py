"""lambda_max equals the largest eigenvalue of J J^T with J from torch.func, for every form of expert."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, Phi3Config, PhiConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from mocte_ds.errors import MocteError
from mocte_ds.moe.experts import make_expert
from mocte_ds.trainability import kernel as kernel_module
from mocte_ds.trainability import lambda_max, products_flops, top_eigenpair

D, F = 10, 14


def kernel(expert: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Theta, (n d', n d'), from the explicit Jacobian in fp64."""
    expert = copy.deepcopy(expert).double().eval()
    parameters = {name: p.detach() for name, p in expert.named_parameters()}

    def outputs(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(expert, values, (x.double(),)).flatten()

    blocks = torch.func.jacrev(outputs)(parameters)
    jacobian = torch.cat([block.flatten(1) for block in blocks.values()], dim=1)
    return jacobian @ jacobian.T


def swiglu(ffn: type[LlamaMLP] = LlamaMLP, d: int = D, f: int = F) -> LlamaMLP:
    return ffn(LlamaConfig(hidden_size=d, intermediate_size=f, num_attention_heads=1))


def gelu() -> nn.Module:
    return PhiMLP(PhiConfig(hidden_size=D, intermediate_size=F, num_attention_heads=1))


def gpt2() -> nn.Module:
    return GPT2MLP(F, GPT2Config(n_embd=D, n_head=1, resid_pdrop=0.5))


def phi3() -> nn.Module:
    return Phi3MLP(Phi3Config(hidden_size=D, intermediate_size=F, num_attention_heads=1, pad_token_id=0))


class UpFirst(nn.Module):
    """Gated, and the activation is for the matrix that was registered second."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(D, F), nn.Linear(D, F, bias=False), nn.Linear(F, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x) * self.activation(self.w3(x)))

    activation = staticmethod(nn.functional.silu)


def other() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, F), nn.Tanh(), nn.Linear(F, D))


def lora(base: nn.Module) -> nn.Module:
    return make_expert(base, "lora", 3, 4, "block")


def randomised(expert: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.normal_(std=0.4)
    return expert


FORMS = {
    "swiglu": lambda: randomised(swiglu()),
    "gelu": lambda: randomised(gelu()),
    "gpt2": lambda: randomised(gpt2()),
    "phi3": lambda: randomised(phi3()),
    "activation on the second matrix": lambda: randomised(UpFirst()),
    "lora": lambda: randomised(lora(swiglu())),
    "lora at birth": lambda: lora(randomised(swiglu())),
    "gelu lora at birth": lambda: lora(randomised(gelu())),
    "any module": other,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 12])
def test_equals_the_explicit_jacobian(form: str, n: int) -> None:
    expert, x = FORMS[form](), torch.randn(n, D)
    expected = float(torch.linalg.eigvalsh(kernel(expert, x))[-1])
    assert lambda_max(expert, x) == pytest.approx(expected, rel=1e-4)
    assert lambda_max(expert.double(), x.double()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "any module"])
def test_known_forms_take_the_closed_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(kernel_module, "_by_autograd", fail)
    lambda_max(FORMS[form](), torch.randn(5, D))


def test_an_ffn_that_computes_something_else_is_not_taken_for_one() -> None:
    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    expert, x = randomised(swiglu(Doubled)), torch.randn(6, D)
    assert lambda_max(expert, x) == pytest.approx(float(torch.linalg.eigvalsh(kernel(expert, x))[-1]), rel=1e-4)


def test_close_eigenvalues_and_equal_rows() -> None:
    # Rows in pairs that are nearly orthogonal and of nearly the same length: eigenvalues in near-degenerate groups.
    expert = randomised(swiglu())
    x = torch.cat([torch.eye(D), torch.eye(D) * 1.0001])
    expected = float(torch.linalg.eigvalsh(kernel(expert, x))[-1])
    assert lambda_max(expert, x) == pytest.approx(expected, rel=1e-4)
    same = torch.randn(1, D).expand(7, D)
    assert lambda_max(expert, same) == pytest.approx(7 * lambda_max(expert, same[:1]), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_flops_by_the_number_of_products(form: str) -> None:
    """The formula against torch's counter; more than 40 products begin a new basis."""
    expert, x, seen = FORMS[form](), torch.randn(9, D), dict[int, int]()
    for products in (45, 44, 41, 40, 8, 7, 1):
        with FlopCounterMode(display=False) as counter:
            found = top_eigenpair(
                expert, x, products, tolerance=0.0, after=lambda n: seen.setdefault(n, counter.get_total_flops())
            )
        outputs, product = found.vector.numel(), seen[1] - seen[0]
        assert product > 0 and found.products > min(products, 9) - 1
        assert counter.get_total_flops() == seen[0] + products_flops(product, outputs, found.products)


def test_eigenvector_and_start() -> None:
    expert, x = randomised(swiglu()), torch.randn(9, D)
    value, vector, _ = top_eigenpair(expert, x, iterations=200, tolerance=1e-7)
    theta = kernel(expert, x).float()
    assert vector.shape == (9, D) and float(vector.norm()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(theta @ vector.flatten(), value * vector.flatten(), atol=1e-3 * value, rtol=0)
    again, *_ = top_eigenpair(expert, x, iterations=2, start=vector)
    assert again == pytest.approx(value, rel=1e-5)
    few, _, products = top_eigenpair(expert, x, iterations=20)
    assert few == pytest.approx(value, rel=1e-3) and 2 <= products <= 20


def test_leaves_the_module_as_it_is_and_counts_frozen_parameters() -> None:
    for form in ("gpt2", "any module"):
        expert, x = FORMS[form]().train(), torch.randn(5, D)
        before, random = copy.deepcopy(expert.state_dict()), torch.get_rng_state()
        value = lambda_max(expert, x)
        assert expert.training and all(p.grad is None and p.requires_grad for p in expert.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in expert.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        for parameter in expert.parameters():
            parameter.requires_grad_(False)
        assert lambda_max(expert, x) == pytest.approx(value, rel=1e-6)


def test_bf16_module_is_measured_in_fp32() -> None:
    expert, x = randomised(swiglu()).bfloat16(), torch.randn(6, D)
    expected = float(torch.linalg.eigvalsh(kernel(expert, x))[-1])
    assert lambda_max(expert, x) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("expert", "x", "message"),
    [
        (swiglu(), torch.zeros(0, D), "n of 1 or more"),
        (swiglu(), torch.zeros(D), "n of 1 or more"),
        (swiglu(), torch.full((2, D), float("nan")), "NaN or infinite"),
        (nn.Tanh(), torch.zeros(2, D), "Tanh has none"),
    ],
)
def test_refusals(expert: nn.Module, x: torch.Tensor, message: str) -> None:
    with pytest.raises(MocteError, match=message):
        lambda_max(expert, x)
