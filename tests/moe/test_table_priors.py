"""Tables beside what is learned: priors over groups of experts, and learned factors of the chosen ones."""

import numpy as np
import pytest
import torch

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import copy_dense_weights, draw_bypasses, set_gate
from mocte_ds.controller.feature_sample import FeatureSample, Rows
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import ConfigError
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe.context import Tokens
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.router_config import RouterConfig
from tests.moe.random_keys import randomise_key
from tests.small_models import small_llama

D, V, N = 16, 40, 600
MESH = mesh_of_processes()
LOSS_FREE = {"weight": "sigmoid", "learn": True, "aux": 0.0, "balance_rate": 0.01}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def before(ids: torch.Tensor) -> torch.Tensor:
    """The ids before, as if of one document."""
    return torch.cat([ids[:1], ids[:-1]])


def born(experts: int, expert: dict | None = None, **router: object) -> tuple[Block, torch.Tensor, torch.Tensor]:
    """A block from clusters of ids, the ids and the features."""
    torch.manual_seed(0)
    values = {"modules": "model.layers.*.mlp", "num_experts": experts, "router": router, "expert": expert or {}}
    config = MocteConfig.from_dict(values)
    (block,) = attach(small_llama(V, D, 24, 1), config)
    ids = torch.randint(V, (N,))
    features = torch.nn.functional.normalize(torch.randn(V, D)[ids] + 0.3 * torch.randn(N, D)) * D**0.5
    mean = features.mean(0)
    basis = torch.linalg.svd(features - mean, full_matrices=False).Vh[:5].T.contiguous()
    set_gate(block, config, MESH, FeatureSample(Rows(features, basis, mean), ids, None, before(ids)))
    if block.kind == "ffn":
        copy_dense_weights(block)
    else:
        draw_bypasses(block, config, 0)
    block.mode = BlockMode.SPECIALISING
    return block, ids, features


@torch.no_grad()
def output(block: Block, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """What a block adds to each row."""
    with block.context.running(ForwardState(ids, previous=before(ids))):
        return block(features)


@pytest.mark.parametrize("kind", ["type", "pair", "previous"])
@pytest.mark.parametrize("weight", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("experts", "groups"), [(7, 3), (8, None)])
def test_scores_are_a_prior_and_a_learned_map(kind: str, weight: str, experts: int, groups: int | None) -> None:
    settings = {"learn": True, "learn_prior": True, "prior": 1.5, "groups": groups, "std": 0.5, "top_k": 3}
    gate = ClusterGate(D, experts, RouterConfig(kind, weight=weight, normalise=True, **settings), V)
    randomise_key(gate.key)
    for buffer in (gate.key.cluster_table, getattr(gate.key, "cluster_pairs", gate.key.cluster_table)):
        buffer.clamp_(max=(groups or experts) - 1)
    torch.nn.init.normal_(gate.key.cluster_start)
    torch.nn.init.normal_(gate.cluster_residual)
    if weight == "sigmoid":
        gate.cluster_correction.copy_(torch.linspace(-0.5, 0.5, experts))
    ids = torch.randint(V, (2, 25))
    h = torch.randn(50, D)
    tokens = ForwardState(ids).tokens((2, 25, D))
    index, given, _ = gate(h, tokens)
    group = gate.key.choose(h, tokens).numpy()
    of_expert = np.array([e * (groups or experts) // experts for e in range(experts)])
    x, start, learned = h.numpy(), gate.key.cluster_start.numpy(), gate.cluster_residual.detach().numpy()
    logits = x @ (start + learned).T + 1.5 * (of_expert[None] == group[:, None])
    scores = sigmoid(logits) if weight == "sigmoid" else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = scores + (gate.cluster_correction.numpy() if weight == "sigmoid" else 0)
    best = np.argsort(-order, axis=1)[:, :3]
    assert (best == index.numpy()).all()
    wanted = np.take_along_axis(scores, best, 1)
    np.testing.assert_allclose(given.detach().numpy(), wanted / wanted.sum(1, keepdims=True), rtol=1e-4)
    # The prior's gradient is that of a finite difference.
    target = torch.randn(50, 3)
    (given * target).sum().backward()

    def total(prior: float) -> float:
        moved = x @ (start + learned).T + prior * (of_expert[None] == group[:, None])
        score = sigmoid(moved) if weight == "sigmoid" else np.exp(moved) / np.exp(moved).sum(1, keepdims=True)
        picked = np.take_along_axis(score.astype(np.float64), best, 1)
        return float((picked / picked.sum(1, keepdims=True) * target.numpy()).sum())

    slope = (total(1.501) - total(1.499)) / 0.002
    assert gate.cluster_prior.grad.item() == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_fine_grained_experts_begin_with_their_clusters_group_and_add_nothing() -> None:
    fine = {"top_k": 3, "normalise": True, "scale": 3.0, "std": 0.02, "groups": 8, "learn_prior": True}
    block, ids, features = born(31, {"kind": "lora", "width": 6}, kind="type", **LOSS_FREE, **fine)
    gate = block.banks[0].gate
    assert set(gate.key.cluster_table.tolist()) == set(range(8)) and gate.cluster_prior.item() == 4.0
    assert gate.key.cluster_start.std().item() == pytest.approx(0.02, rel=0.1)
    index, weight, _ = gate(features, Tokens(ids))
    group = gate.key.choose(features, Tokens(ids))
    assert bool((index * 8 // 31 == group[:, None]).all()), "of each group's experts, three"
    assert torch.bincount(index.flatten(), minlength=31).min() > 0, "which three, the features decide"
    torch.testing.assert_close(weight.sum(1), torch.full((N,), 3.0))
    assert torch.equal(output(block, ids, features), block.dense(features))
    control, _, _ = born(31, {"kind": "lora", "width": 6}, kind="type", **LOSS_FREE, **{**fine, "prior": 0.0})
    free = control.banks[0].gate(features, Tokens(ids))[0]
    assert float((free * 8 // 31 == group[:, None]).float().mean()) < 0.25, "without a prior the table says nothing"


@pytest.mark.parametrize("kind", ["type", "pair", "hash", "token", "previous"])
def test_a_gain_is_one_at_birth_and_the_key_goes_on_to_choose(kind: str) -> None:
    block, ids, features = born(4, kind=kind, weight="gain", learn=True)
    gate = block.banks[0].gate
    assert not gate.reads_loads
    tokens = Tokens(ids, previous=before(ids))
    torch.testing.assert_close(output(block, ids, features), block.dense(features), rtol=1e-5, atol=1e-6)
    index, weight, loss = gate(features, tokens)
    assert loss is None and torch.equal(weight, torch.ones(N, 1))
    assert torch.equal(index[:, 0], gate.key.choose(features, tokens))
    torch.nn.init.normal_(gate.cluster_residual.requires_grad_())
    moved, given, _ = gate(features, tokens)
    assert torch.equal(moved, index), "what is learned only weighs"
    w = gate.cluster_residual.detach().numpy()[index[:, 0].numpy()]
    np.testing.assert_allclose(given[:, 0].detach().numpy(), 2 * sigmoid((w * features.numpy()).sum(1)), rtol=1e-5)
    given.sum().backward()
    assert bool(gate.cluster_residual.grad.abs().sum(1).gt(0).all())


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"kind": "type", "weight": "gain"}, "needs learn"),
        ({"kind": "type", "weight": "gain", "learn": True, "top_k": 2}, "top_k 1"),
        ({"kind": "type", "weight": "sigmoid"}, "tables with learn"),
        ({"kind": "token", "weight": "sigmoid", "learn": True}, "tables with learn"),
        ({"kind": "type", "prior": 1.0}, "for a table in a router that learns"),
        ({"kind": "token", "weight": "softmax", "learn": True, "learn_prior": True}, "for a table in a router"),
        ({"kind": "type", "weight": "gain", "learn": True, "groups": 2}, "for a table in a router"),
        ({"kind": "type", "weight": "softmax", "learn": True, "groups": 5}, "groups = 5 must lie between"),
        ({"kind": "type", "std": 0.1}, "learned tables"),
        ({"kind": "type", "weight": "softmax", "learn": True, "prior": 0.0}, "prior = 0 without std"),
        ({"kind": "type", "weight": "softmax", "learn": True, "groups": 2}, "groups = 2 without router.std"),
        ({"kind": "type", **LOSS_FREE, "std": 0.1, "prior": 0.0, "shuffled": True}, "shuffled changes a table"),
        ({"kind": "type", "weight": "gain", "learn": True, "aux": 0.1}, "has no such loss"),
    ],
)
def test_refusals(router: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MocteConfig.from_dict({"modules": "m", "router": router})
