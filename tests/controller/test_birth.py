"""At birth the gate gives every expert its share of the sampled tokens, and the experts are the dense FFN."""

import pytest
import torch
from torch import nn

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import copy_dense_weights, draw_bypasses, inherit, set_gate
from mocte_ds.controller.feature_sample import FeatureSample, Rows
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.moe import Block, attach
from mocte_ds.moe.context import Tokens
from tests.small_models import FFNS, OUTPUTS, small_llama, small_model

MESH = mesh_of_processes()

V, D, E, N = 50, 16, 4, 800


def born(**router: object) -> tuple[Block, MocteConfig]:
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "router": router})
    (block,) = attach(small_llama(V, D, 24, 1), config)
    return block, config


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, token ids, leading directions and mean."""
    ids = torch.randint(V, (N,))
    features = torch.randn(V, D)[ids] + 0.3 * torch.randn(N, D) + 2 * torch.randn(D)
    mean = features.mean(0)
    basis = torch.linalg.svd(features - mean, full_matrices=False).Vh[:5].T.contiguous()
    return features, ids, basis, mean


@pytest.mark.parametrize("weight", ["hard", "softmax"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_gate_is_even_on_its_sample(bias: bool, weight: str) -> None:
    block, config = born(kind="token", bias=bias, weight=weight)
    features, ids, basis, mean = sample()
    set_gate(block, config, MESH, FeatureSample(Rows(features, basis, mean), ids))
    gate = block.banks[0].gate
    chosen, given, _ = gate(features, Tokens(ids))
    index = chosen[:, 0]
    load = torch.bincount(index, minlength=E)
    assert load.max() < 1.1 * N / E and load.min() > 0.9 * N / E
    assert bool(gate.key.cluster_bias.any()) is bias
    if weight == "hard":
        assert given is None
        return
    probability = (features @ gate.key.cluster_weight.T + gate.key.cluster_bias).softmax(1).amax(1)
    torch.testing.assert_close(given[:, 0], probability)
    assert 0.95 <= float(probability.mean()) < 1.0
    hard, config = born(kind="token", bias=bias)
    set_gate(hard, config, MESH, FeatureSample(Rows(features, basis, mean), ids))
    assert torch.equal(hard.banks[0].gate(features, Tokens(ids))[0], chosen), "sharper logits choose the same experts"


@pytest.mark.parametrize("kind", ["type", "hash"])
def test_tables(kind: str) -> None:
    block, config = born(kind=kind)
    features, ids, basis, mean = sample()
    set_gate(block, config, MESH, FeatureSample(Rows(features, basis, mean), ids))
    index = block.banks[0].gate(features, Tokens(ids))[0][:, 0]
    assert torch.bincount(index, minlength=E).max() < 1.35 * N / E
    for token in range(V):
        assert len(index[ids == token].unique()) <= 1


def test_random_gate_uses_all_experts_and_is_the_same_everywhere() -> None:
    block, config = born(kind="token")
    set_gate(block, config, MESH)
    features = torch.randn(500, D)
    index = block.banks[0].gate(features, Tokens())[0][:, 0]
    other, config = born(kind="token")
    torch.manual_seed(99)
    set_gate(other, config, MESH)
    assert len(index.unique()) == E and torch.equal(other.banks[0].gate(features, Tokens())[0][:, 0], index)


@pytest.mark.parametrize("router", [{}, {"weight": "softmax"}, {"weight": "softmax", "learn": True}])
def test_a_random_gate_knows_nothing_of_the_features(router: dict) -> None:
    gates = []
    for seed in (0, 1):
        block, config = born(kind="random", **router)
        torch.manual_seed(seed)
        features, ids, basis, mean = sample()
        set_gate(block, config, MESH, FeatureSample(Rows(features, basis, mean), ids))
        gates.append(block.banks[0].gate)
        index, weight, _ = gates[-1](features - mean, Tokens(ids))
        assert len(index.unique()) == E and (weight is None) is (not router)
    weights = [gate.key.cluster_weight for gate in gates]
    assert torch.equal(*weights) and not any(gate.key.cluster_bias.any() for gate in gates)
    if router.get("learn"):
        assert not gates[0].cluster_residual.any()
    # Variance 0.1 / d; of 64 numbers the sample's is within a factor of two.
    assert 0.5 < float(weights[0].var()) / (0.1 / D) < 2
    other = MocteConfig.from_dict({**config.to_dict(), "seed": 1})
    set_gate(block, other, MESH, FeatureSample(Rows(features, basis, mean), ids))
    assert not torch.equal(block.banks[0].gate.key.cluster_weight, weights[0]), "another seed, other directions"


def test_banks_of_random_gates_differ() -> None:
    banks = [{"kind": "random"}, {"kind": "random"}]
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "banks": banks})
    (block,) = attach(small_llama(V, D, 24, 1), config)
    features, ids, basis, mean = sample()
    set_gate(block, config, MESH, FeatureSample(Rows(features, basis, mean), ids))
    first, second = (bank.gate.key.cluster_weight for bank in block.banks)
    assert not torch.equal(first, second)


def bypasses(style: str, ep_size: int, seed: int = 0) -> dict[tuple[str, int, int, str], torch.Tensor]:
    """Parameters of the `lora` experts of two blocks with two banks, as all ranks together hold them."""
    banks = [{"kind": "hash"}, {"kind": "token"}]
    settings = {"num_experts": E, "ep_size": ep_size, "banks": banks, "expert": {"kind": "lora"}, "seed": seed}
    config = MocteConfig.from_dict({"modules": FFNS[style], **settings})
    found = {}
    for ep_rank in range(ep_size):
        torch.manual_seed(ep_rank)  # the draw must not hang on it
        for block in attach(small_model(style, V, D, 64), config):
            draw_bypasses(block, config, ep_rank)
            for number, bank in enumerate(block.banks):
                for local, expert in enumerate(bank.local_experts):
                    for name, parameter in expert.named_parameters():
                        k = ep_rank * E // ep_size + local
                        found[block.name, number, k, name] = parameter.detach().clone()
    return found


@pytest.mark.parametrize("style", FFNS)
def test_lora_experts_are_drawn_apart_and_add_nothing(style: str) -> None:
    found = bypasses(style, 1)
    output = OUTPUTS[style]
    read = [value for (*_, name), value in found.items() if name.endswith("weight") and output not in name]
    assert len(read) == 2 * 2 * E * (2 if style == "llama" else 1)
    directions = torch.stack([value.flatten() for value in read])
    if style == "gpt2":  # entries of a Conv1D are normal
        assert directions.std() == pytest.approx(D**-0.5, rel=0.1)
    else:  # those of a fresh nn.Linear are uniform within d^-1/2
        assert float(directions.abs().max()) <= D**-0.5 and directions.std() == pytest.approx((3 * D) ** -0.5, rel=0.1)
    cosines = torch.nn.functional.normalize(directions, dim=1)
    cosines = cosines @ cosines.T - torch.eye(len(read))
    assert float(cosines.abs().max()) < 6 * directions.shape[1] ** -0.5, "independent directions are nearly orthogonal"
    assert not any(value.any() for (*_, name), value in found.items() if output in name)


def test_lora_experts_are_the_same_whoever_holds_them() -> None:
    whole, shared, other = bypasses("llama", 1), bypasses("llama", 2), bypasses("llama", 1, seed=1)
    assert whole.keys() == shared.keys()
    assert all(torch.equal(value, shared[key]) for key, value in whole.items())
    assert not any(torch.equal(value, other[key]) for key, value in whole.items() if "down" not in key[-1])


@pytest.mark.parametrize("kind", ["hash", "pair-hash", "previous", "random", "type"])
def test_no_two_blocks_or_banks_share_what_chance_decides(kind: str) -> None:
    banks = [{"kind": kind}, {"kind": kind}]
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "banks": banks})
    found = {}
    for layers in (2, 3):
        blocks = attach(small_llama(997, D, 24, layers), config)
        for block in blocks:
            set_gate(block, config, MESH)
        found[layers] = {
            (block.name, number): next(bank.gate.key.buffers()).clone()
            for block in blocks
            for number, bank in enumerate(block.banks)
        }
    values = list(found[3].values())
    for i, one in enumerate(values):
        for other in values[i + 1 :]:
            if kind == "random":
                cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
                assert abs(float(cosine)) < 0.5
            else:
                assert 0.15 < float((one == other).float().mean()) < 0.35, "tables agree by chance only"
    for place, value in found[2].items():
        assert torch.equal(value, found[3][place]), "another block beside it changes no block's table"


@pytest.mark.parametrize("kind", ["token", "type"])
def test_the_gate_does_not_hang_on_who_had_which_row(kind: str) -> None:
    features, ids, basis, mean = sample()
    given = torch.randperm(N)
    gates = []
    for rows, order in ((torch.arange(N), None), (given, given.argsort())):
        block, config = born(kind=kind)
        turn = torch.linalg.qr(torch.randn(5, 5))[0] if order is not None else torch.eye(5)
        set_gate(
            block,
            config,
            MESH,
            FeatureSample(Rows(features[rows], basis @ turn, mean, order), ids[rows]),
        )
        gates.append(block.banks[0].gate(features, Tokens(ids))[0][:, 0])
    assert torch.equal(*gates)


def test_experts_are_the_dense_ffn_with_its_moments() -> None:
    block, _ = born(kind="token")
    with torch.no_grad():
        for parameter in block.dense.parameters():
            parameter.normal_()
    copy_dense_weights(block)
    x = torch.randn(7, D)
    for expert in block.banks[0].local_experts:
        assert torch.equal(expert(x), block.dense(x))
    state = {p: {"master": torch.randn_like(p), "exp_avg": torch.randn_like(p)} for p in block.dense.parameters()}
    inherited = inherit(block, state)
    dense = dict(block.dense.named_parameters())
    count = 0
    for expert in block.banks[0].local_experts:
        for name, parameter in expert.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            assert torch.equal(inherited[parameter]["exp_avg"], state[dense[name]]["exp_avg"])
            assert torch.equal(inherited[parameter]["master"], state[dense[name]]["master"])
            count += 1
    assert count == len(inherited) == E * len(dense)
