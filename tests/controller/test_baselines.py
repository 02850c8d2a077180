"""Baselines are born as their authors build them: independent experts, outputs of unit scale, even loads."""

import pytest
import torch
from torch import nn

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import copy_dense_weights, inherit, redraw_units, set_gate
from mocte_ds.controller.feature_sample import FeatureSample, Rows
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import ConfigError
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe.context import Tokens
from tests.small_models import FFNS, OUTPUTS, small_model

MESH = mesh_of_processes()

V, D, F, E, N = 50, 32, 48, 4, 2000


def made(style: str = "llama", ep_size: int = 1, **settings: object) -> tuple[Block, MocteConfig]:
    torch.manual_seed(0)
    values = {"modules": FFNS[style], "num_experts": E, "ep_size": ep_size, **settings}
    config = MocteConfig.from_dict(values)
    (block,) = attach(small_model(style, V, D, F, 1), config)
    return block, config


def redrawn(style: str, share: float, ep_size: int = 1, kind: str = "ffn") -> list[dict[str, torch.Tensor]]:
    """Weights of all experts of a block, as all ranks together hold them."""
    found = []
    for ep_rank in range(ep_size):
        block, config = made(style, ep_size, expert={"kind": kind, "redraw": share})
        if kind == "ffn":
            copy_dense_weights(block)
        redraw_units(block, config, ep_rank)
        found += [dict(expert.named_parameters()) for expert in block.banks[0].local_experts]
    return [{name: value.detach().clone() for name, value in expert.items()} for expert in found]


@pytest.mark.parametrize("style", FFNS)
def test_experts_from_scratch_are_independent_draws_of_the_models_own_initialisation(style: str) -> None:
    block, _ = made(style)
    experts = redrawn(style, 1.0)
    for name, dense in block.dense.named_parameters():
        drawn = torch.stack([expert[name].flatten() for expert in experts])
        if dense.dim() == 1:
            assert not drawn.any(), "biases of a fresh model are zero"
            continue
        assert drawn.std().item() == pytest.approx(dense.std().item(), rel=0.05)
        both = nn.functional.normalize(torch.cat([drawn, dense.detach().flatten()[None]]), dim=1)
        cosines = both @ both.T - torch.eye(E + 1)
        assert float(cosines.abs().max()) < 5 * drawn.shape[1] ** -0.5
    output = dict(block.dense.named_parameters())[f"{OUTPUTS[style]}.weight"]
    assert output.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.1), "divided by sqrt(2 layers)"


def test_an_experts_draw_hangs_on_no_rank() -> None:
    for one, other in zip(redrawn("llama", 0.5), redrawn("llama", 0.5, ep_size=2), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("style", FFNS)
def test_drop_upcycling_redraws_half_of_the_hidden_units_and_their_moments(style: str) -> None:
    block, config = made(style, expert={"redraw": 0.5})
    with torch.no_grad():
        for parameter in block.dense.parameters():
            parameter.normal_()
    copy_dense_weights(block)
    drawn = redraw_units(block, config, 0)
    dense = dict(block.dense.named_parameters())
    state = {
        p: {"master": p.detach().clone(), "exp_avg": torch.ones_like(p), "step": torch.tensor(7.0)}
        for p in dense.values()
    }
    inherited = inherit(block, state, drawn)
    units = []
    for expert in block.banks[0].local_experts:
        new = {name: p.detach() != dense[name].detach() for name, p in expert.named_parameters()}
        by_unit = []
        for name, mask in new.items():
            output = name.startswith(OUTPUTS[style])
            if output and mask.dim() == 1:
                assert not mask.any(), "the output's bias is of no hidden unit"
                continue
            mask = mask.T if mask.dim() == 2 and output != (style == "gpt2") else mask
            by_unit.append(mask if mask.dim() == 1 else mask.all(dim=1))
            assert mask.dim() == 1 or torch.equal(mask.all(dim=1), mask.any(dim=1)), "whole units"
        assert all(torch.equal(by_unit[0], other) for other in by_unit) and int(by_unit[0].sum()) == F // 2
        units.append(by_unit[0])
        for name, parameter in expert.named_parameters():
            values = inherited[parameter]
            assert torch.equal(values["master"], parameter.detach()) and float(values["step"]) == 7.0
            assert torch.equal(values["exp_avg"] == 0, new[name])
    assert not torch.equal(units[0], units[1]), "each expert loses other units"


def test_narrow_experts_beside_a_shared_ffn_can_write_from_the_start() -> None:
    silent, loud = redrawn("llama", 0.0, kind="lora"), redrawn("llama", 1.0, kind="lora")
    assert not any(expert["down_proj.weight"].any() for expert in silent)
    dense = made()[0].dense.down_proj.weight
    for expert in loud:
        assert expert["down_proj.weight"].shape == (D, F // E)
        assert expert["down_proj.weight"].std().item() == pytest.approx(dense.std().item(), rel=0.15)


def test_what_cannot_be_cut_is_not_redrawn() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

    block = {"modules": "layers.*", "router": {"kind": "token"}}
    with pytest.raises(ConfigError, match=r"expert\.redraw"):
        attach(Odd(), MocteConfig.from_dict({**block, "expert": {"redraw": 0.5}}))


@pytest.mark.parametrize("weight", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("sampled", [True, False])
def test_the_output_of_a_mixture_of_copies_has_the_dense_ones_scale_at_birth(
    weight: str, top_k: int, sampled: bool
) -> None:
    router = {"kind": "random", "weight": weight, "learn": True, "unit_mean": True, "top_k": top_k}
    block, config = made(router=router)
    features = nn.functional.normalize(torch.randn(N, D) + 0.2, dim=1) * D**0.5  # as a norm leaves them
    basis = torch.linalg.qr(torch.randn(D, 4))[0]
    rows = Rows(features, basis, features.mean(0))
    set_gate(block, config, MESH, FeatureSample(rows, torch.randint(V, (N,))) if sampled else None)
    copy_dense_weights(block)
    block.mode = BlockMode.SPECIALISING
    with torch.no_grad():
        scale = (block(features[None])[0] * block.dense(features)).sum(1) / block.dense(features).square().sum(1)
    assert scale.mean().item() == pytest.approx(1.0, abs=1e-5 if sampled else 0.02)
    gate = block.banks[0].gate
    raw = gate(features, Tokens())[1].sum(1) * gate.cluster_mean
    assert raw.mean() < 0.9 * (1 if weight == "softmax" else top_k), "without it the output would shrink or grow"


def test_a_router_starts_with_the_given_spread() -> None:
    block, config = made(router={"kind": "random", "std": 0.02})
    set_gate(block, config, MESH)
    assert block.banks[0].gate.key.cluster_weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_numbers_in_the_choice_even_out_skewed_loads() -> None:
    router = {"kind": "random", "weight": "sigmoid", "learn": True, "aux": 0.0, "balance_rate": 0.002}
    block, config = made(router=router)
    gate = block.banks[0].gate
    set_gate(block, config, MESH)
    generator = torch.Generator().manual_seed(1)
    shift = 4 * gate.key.cluster_weight[2] / gate.key.cluster_weight[2].norm()

    def load() -> torch.Tensor:
        rows = torch.randn(N, D, generator=generator) + shift
        return torch.bincount(gate(rows, Tokens())[0].flatten(), minlength=E)

    first = load()
    assert first.max() > 2 * N / E
    for _ in range(300):
        gate.balance(load())
    last = sum(load() for _ in range(5)) / 5
    assert last.max() < 1.1 * N / E and last.min() > 0.9 * N / E
    rows = torch.randn(8, D, generator=generator)
    index, weight, _ = gate(rows, Tokens())
    sigmoids = (rows @ gate.key.cluster_weight.T).sigmoid()
    torch.testing.assert_close(weight, sigmoids.gather(1, index), msg="what is added is not part of a weight")


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"unit_mean": True}, "unit_mean"),
        ({"kind": "random", "weight": "sigmoid", "normalise": True, "unit_mean": True}, "unit_mean"),
        ({"kind": "random", "weight": "softmax", "balance_rate": 0.01}, "balance_rate"),
        ({"std": 0.02}, "std"),
        ({"rate": 0.3}, "rate"),
        ({"kind": "hash", "shuffled": True}, "shuffled"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(router: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MocteConfig.from_dict({"modules": "m", "router": router})


@pytest.mark.parametrize("kind", ["token", "type"])
def test_shuffled_clusters_have_the_found_sizes_and_other_members(kind: str) -> None:
    ids = torch.randint(V, (N,))
    features = torch.randn(V, D)[ids] + 0.3 * torch.randn(N, D)
    mean = features.mean(0)
    basis = torch.linalg.svd(features - mean, full_matrices=False).Vh[:6].T.contiguous()
    routes = {}
    for shuffled in (False, True):
        block, config = made(router={"kind": kind, "shuffled": shuffled})
        set_gate(block, config, MESH, FeatureSample(Rows(features, basis, mean), ids))
        routes[shuffled] = block.banks[0].gate(features, Tokens(ids))[0].flatten()
        load = torch.bincount(routes[shuffled], minlength=E)
        assert load.max() < 1.2 * N / E and load.min() > 0.8 * N / E
    assert float((routes[False] == routes[True]).float().mean()) < 0.6
