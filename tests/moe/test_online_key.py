"""Clusters that follow their tokens: whitening, choice and moves are those of numpy; loads come near even."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import copy_dense_weights, set_gate
from mocte_ds.controller.feature_sample import FeatureSample, Rows
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe.context import Tokens
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.moe.keys import OnlineKey
from mocte_ds.router_config import RouterConfig
from tests.small_models import small_llama

D, E, N, R, SKIP = 16, 4, 2000, 6, 2
MESH = mesh_of_processes()


def sample() -> torch.Tensor:
    """Features of four directions beside two that all tokens share and that vary most."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D))[0]
    z = 0.2 * torch.randn(N, D)
    z[:, :SKIP] = 9 * torch.randn(N, SKIP)
    z[torch.arange(N), SKIP + torch.arange(N) % E] += 3
    return z @ basis.T + torch.randn(D)


def born(features: torch.Tensor | None, **router: object) -> tuple[Block, OnlineKey]:
    values = {"kind": "online", "directions": R, "dropped": SKIP, **router}
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "router": values})
    (block,) = attach(small_llama(50, D, 24, 1), config)
    found = None
    if features is not None:
        basis = torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh[:4].T.contiguous()
        found = FeatureSample(Rows(features, basis, features.mean(0)), torch.randint(50, (len(features),)))
    set_gate(block, config, MESH, found)
    key = block.banks[0].gate.key
    assert isinstance(key, OnlineKey)
    return block, key


def test_whitened_directions_are_those_of_scikit_learn() -> None:
    features = sample()
    _, key = born(features)
    pca = PCA(SKIP + R, whiten=True, svd_solver="full").fit(features.double().numpy())
    expected = pca.transform(features.double().numpy())[:, SKIP:]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    x = key.points(features).double().numpy()
    # Directions have no sign and no order of their own: cosines between tokens tell all.
    np.testing.assert_allclose(x[:300] @ x[:300].T, expected[:300] @ expected[:300].T, atol=1e-3)


@pytest.mark.parametrize("shuffled", [False, True])
def test_born_clusters_are_the_directions_and_even(shuffled: bool) -> None:
    features = sample()
    block, _ = born(features, shuffled=shuffled)
    index = block.banks[0].gate(features, Tokens())[0].flatten()
    load = torch.bincount(index, minlength=E)
    assert load.max() < 1.1 * N / E and load.min() > 0.9 * N / E
    table = torch.bincount(E * (torch.arange(N) % E) + index, minlength=E * E).view(E, E)
    purity = float(table.amax(1).sum()) / N
    assert purity < 0.6 if shuffled else purity > 0.95, "the leading directions would hide the groups"
    copy_dense_weights(block)
    block.mode = BlockMode.SPECIALISING
    torch.testing.assert_close(block(features), block.dense(features), rtol=1e-5, atol=1e-6)


def test_a_step_is_that_of_numpy() -> None:
    gate = ClusterGate(D, E, RouterConfig("online", directions=R, dropped=SKIP, balance_rate=0.02), None)
    key = gate.key
    assert isinstance(key, OnlineKey)
    torch.manual_seed(1)
    key.set(torch.randn(R, D), torch.randn(R), torch.randn(E, R), torch.randn(E))
    key.cluster_bias[1] = -100.0  # gets no token, and keeps its centroid
    w, o, m, b = (t.double().numpy() for t in key.buffers())
    for _ in range(3):
        features = torch.randn(200, D)
        real = torch.rand(200) < 0.8
        x = features.double().numpy() @ w.T - o
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        cosines = x @ (m / np.linalg.norm(m, axis=1, keepdims=True)).T
        chosen = (cosines / 0.1 + b).argmax(1)
        key.counting = True
        index = gate(features, Tokens())[0]
        assert (index[:, 0].numpy() == chosen).all()
        counts = np.bincount(chosen[real.numpy()], minlength=E)
        for expert in np.flatnonzero(counts):
            m[expert] = 0.99 * m[expert] + 0.01 * x[real.numpy() & (chosen == expert)].mean(0)
        b = b + 0.02 * np.sign(counts.mean() - counts)
        load = torch.bincount(index[real, 0], minlength=E)
        key.follow(key.take_sums(index, real), load)
        gate.balance(load)
        np.testing.assert_allclose(key.cluster_centroids.numpy(), m, atol=1e-6)
        np.testing.assert_allclose(key.cluster_bias.numpy(), b, atol=1e-4)


def test_loads_come_near_even_where_one_group_has_grown() -> None:
    features = sample()
    block, key = born(features, balance_rate=0.05)
    gate, moved = block.banks[0].gate, torch.cat([features, features[::E], features[::E]])
    first = None
    for _ in range(400):
        key.counting = True
        index = gate(moved, Tokens())[0]
        load = torch.bincount(index.flatten(), minlength=E)
        first = load if first is None else first
        key.follow(key.take_sums(index, None), load)
        gate.balance(load)
    even = len(moved) / E
    assert first.max() > 1.8 * even
    assert load.max() < 1.15 * even and load.min() > 0.85 * even


def test_centroids_that_stand() -> None:
    _, key = born(sample(), centroid_rate=0.0)
    before = key.cluster_centroids.clone()
    key.follow(torch.randn(E, R, dtype=torch.float64), torch.full((E,), 9))
    assert torch.equal(key.cluster_centroids, before)


def test_features_that_are_not_finite_are_refused() -> None:
    found = sample()
    rows = Rows(found.index_fill(0, torch.tensor(7), torch.inf), torch.eye(D)[:, :4], found.mean(0))
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "router": {"kind": "online", "directions": R}})
    (block,) = attach(small_llama(50, D, 24, 1), config)
    with pytest.raises(MocteError, match="NaN or infinite"):
        set_gate(block, config, MESH, FeatureSample(rows, torch.randint(50, (N,))))
    _, key = born(sample())
    before = key.cluster_centroids.clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        key.follow(torch.full((E, R), torch.nan, dtype=torch.float64), torch.ones(E, dtype=torch.int64))
    assert torch.equal(key.cluster_centroids, before)


def test_without_a_sample_all_experts_have_tokens() -> None:
    block, _ = born(None)
    index = block.banks[0].gate(torch.randn(500, D), Tokens())[0]
    assert len(index.unique()) == E


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"kind": "online", "directions": 30, "dropped": 5}, "more than the 32 features"),
        ({"kind": "token", "dropped": 1}, "for kind 'online'"),
        ({"kind": "online", "weight": "softmax"}, "needs logits"),
        ({"kind": "online", "weight": "softmax", "learn": True}, "not for kind 'online'"),
        ({"kind": "online", "bias": False}, "always has one"),
        ({"kind": "token", "centroid_rate": 0.0}, "for kind 'online'"),
        ({"kind": "token", "balance_rate": 0.1}, "or kind 'online'"),
    ],
)
def test_refusals(router: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(small_llama(50, 32, 24, 1), MocteConfig.from_dict({"modules": "model.layers.*.mlp", "router": router}))
