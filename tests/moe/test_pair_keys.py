"""Tables of hashed pairs: rows, documents and clusters are those of plain Python, numpy and scikit-learn."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from mocte_ds.clusters import pair_tables
from mocte_ds.clusters.control import shuffled_table
from mocte_ds.config import MocteConfig
from mocte_ds.controller.apply import _output
from mocte_ds.controller.birth import set_gate
from mocte_ds.controller.collect import FeatureCollector, SampleStream
from mocte_ds.controller.feature_sample import FeatureSample, Rows, TokenRows
from mocte_ds.controller.reading import BlockReading
from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.errors import MocteError
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe.context import Tokens
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.moe.keys import PairHashKey, PairKey
from mocte_ds.remote_code.pair_keys_mocte import pair_rows
from mocte_ds.router_config import RouterConfig
from tests.moe.random_keys import randomise_key
from tests.small_models import small_llama

D, E, EOD, V, R = 8, 4, 0, 64, 1024
MESH = mesh_of_processes()
PRIME = 2**31 - 1


def before_in_document(ids: list[int], real: list[bool]) -> list[int]:
    """The id before each token in its document, its own for the first one; padding is skipped."""
    found, last = [], None
    for token, counts in zip(ids, real, strict=True):
        found.append(token if last is None else last)
        if counts:
            last = None if token == EOD else token
    return found


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of three sequences with several documents, and a mask: one is padded on either side."""
    ids, mask = torch.randint(1, V, (3, 24)), torch.ones(3, 24, dtype=torch.long)
    ids[0, 3] = ids[0, 7] = ids[1, 12] = ids[2, 18] = EOD
    mask[1, :4], mask[2, 20:] = 0, 0
    return ids, mask


def test_rows_of_pairs_are_exact_and_spread() -> None:
    factors = torch.tensor([PRIME - 1, PRIME - 2])  # the largest products
    before, ids = torch.randint(2**31, (2, 500))
    both = zip(before.tolist(), ids.tolist(), strict=True)
    expected = [((PRIME - 1) * first + (PRIME - 2) * second) % PRIME % R for first, second in both]
    assert pair_rows(before, ids, factors, R).tolist() == expected
    every = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    load = torch.bincount(pair_rows(*every.T, torch.randint(1, PRIME, (2,)), R), minlength=R)
    assert load.min() > 0 and load.max() < 6 * 65536 / R, "no row takes much more than its share"


@pytest.mark.parametrize("make", [PairKey, PairHashKey])
def test_a_pair_is_looked_up_within_its_document(make: type[PairHashKey]) -> None:
    key = make(D, E, V, rows=R)
    table = torch.randint(-1 if make is PairKey else 0, E, (R,))
    key.set(torch.tensor([12345, 678910]), table)
    own = torch.randint(E, (V,))
    if isinstance(key, PairKey):
        key.cluster_table.copy_(own)
    ids, mask = packed()
    tokens = ForwardState(ids, EOD, {"attention_mask": mask}).tokens((3, 24, D))
    found = key.choose(torch.zeros(72, D), tokens).view(3, 24)
    missed = 0
    for row in range(3):
        before = before_in_document(ids[row].tolist(), mask[row].bool().tolist())
        for place, (first, second) in enumerate(zip(before, ids[row].tolist(), strict=True)):
            if mask[row, place]:
                expert = int(table[(12345 * first + 678910 * second) % PRIME % R])
                missed += expert < 0
                assert found[row, place] == (own[second] if expert < 0 else expert)
    assert (missed > 5) is (make is PairKey)


@pytest.mark.parametrize("kind", ["pair", "pair-hash", "previous", "prefix", "document"])
def test_features_that_a_model_flattens_are_of_the_same_documents(kind: str) -> None:
    gate = ClusterGate(D, E, RouterConfig(kind), V)
    randomise_key(gate.key)
    (ids, mask), features = packed(), torch.randn(72, D)
    given = {"attention_mask": mask}
    expected = gate(features, ForwardState(ids, EOD, given).tokens((3, 24, D), True))[0]
    flat = ForwardState(ids, EOD, given)
    assert torch.equal(gate(features, flat.tokens((72, D), True))[0], expected)
    assert torch.equal(flat.counted((72, D)).flatten(), mask.flatten().bool())
    with pytest.raises(MocteError, match="where sequences begin"):
        gate(features, Tokens(ids.flatten()))


def test_the_output_at_birth_is_that_of_the_sampled_pairs() -> None:
    block = born()
    block.mode = BlockMode.SPECIALISING
    experts = block.banks[0].local_experts
    for expert in experts:
        for parameter in expert.parameters():
            torch.nn.init.normal_(parameter)
    before, ids, features = (part[:50] for part in planted())
    index = block.banks[0].gate.key.choose(features, Tokens(ids, previous=before))
    expected = torch.stack([experts[int(k)](row) for k, row in zip(index, features, strict=True)])
    run: Any = SimpleNamespace(context=block.context)
    reading = BlockReading(TokenRows(features, ids, ids, before, ids), 50, mean=features.mean(0))
    found = _output(run, SimpleNamespace(block=block), reading)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_sample_knows_the_tokens_before() -> None:
    ids, mask = packed()
    stream = SampleStream(1000, 100, 0, EOD, ALONE)
    collector = FeatureCollector(D, stream)
    features = torch.arange(72.0).view(3, 24, 1).expand(3, 24, D)  # each token's place
    state = ForwardState(ids, EOD, {"attention_mask": mask})
    collector.see(features, state)
    rows, found, _, before, _ = collector.tokens()
    expected = torch.tensor(
        [before_in_document(line.tolist(), real.bool().tolist()) for line, real in zip(ids, mask, strict=True)]
    )
    place = rows[:, 0].long()
    assert len(place) == int(mask.sum())
    assert torch.equal(before, expected.flatten()[place]) and torch.equal(found, ids.flatten()[place])
    assert not state.tokens((3, 24, D)).kept, "nothing is left for a cache"
    again = SampleStream(1000, 100, 0, EOD, ALONE)
    old = stream.state_dict()
    old["token_facts"] = {"rows": old["token_facts"]["rows"][:, :2]}  # of an older version
    again.load_state_dict(old)
    facts = again.token_facts.rows()
    assert torch.equal(facts[:, :2], stream.token_facts.rows()[:, :2]) and bool((facts[:, 2] == -1).all())


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every pair of 20 ids 15 times: ids before, ids, and features (n, D), which (before + id) mod E decides."""
    before, ids = torch.cartesian_prod(torch.arange(20), torch.arange(20)).repeat(15, 1)[torch.randperm(6000)].T
    return before, ids, 6.0 * torch.eye(D)[(before + ids) % E] + torch.randn(6000, D)


def test_tables_are_clusters_of_the_means() -> None:
    before, ids, features = planted()
    pairs = before * 20 + ids
    of_ids, of_pairs = pair_tables(ids, pairs, features, V, R, E, 0)
    assert bool((of_pairs[400:] == -1).all()) and torch.bincount(of_ids[20:], minlength=E).min() >= 5
    x, rows = features.double().numpy(), pairs.numpy()
    seen = np.unique(rows)
    means = np.stack([x[rows == row].mean(0) for row in seen])
    expected = KMeans(E, n_init=10, random_state=0).fit_predict(means)
    assert adjusted_rand_score(expected, of_pairs[seen].numpy()) == 1.0
    assert adjusted_rand_score((seen // 20 + seen % 20) % E, of_pairs[seen].numpy()) == 1.0


def test_loads_are_even_over_pairs_and_what_is_new() -> None:
    frequency = 1 / (torch.arange(V) + 3.0)  # as words have it
    before, ids = torch.multinomial(frequency, 2 * 8000, replacement=True).view(2, -1)
    centres = torch.randn(V, D)
    features = centres[ids] + centres[before].flip(1) + torch.randn(8000, D)
    pairs = before * V + ids
    first, second = pairs[:4000], pairs[4000:]
    of_ids, of_pairs = pair_tables(ids[:4000], first, features[:4000], V, V * V, E, 0)
    known = of_pairs[second]
    assert 0.02 < float((known < 0).float().mean()) < 0.6
    load = torch.bincount(torch.where(known < 0, of_ids[ids[4000:]], known), minlength=E)
    assert load.max() < 1.25 * 1000 and load.min() > 0.75 * 1000, "held-out tokens"
    nearest = torch.stack(
        [features[:4000][ids[:4000] == token].mean(0) for token in range(V) if (ids[:4000] == token).any()]
    )
    of_experts = torch.stack([features[:4000][of_pairs[first] == expert].mean(0) for expert in range(E)])
    seen = ids[:4000].unique()
    alike = torch.cdist(nearest, of_experts).argmin(1) == of_ids[seen]
    assert float(alike.float().mean()) > 0.6, "single tokens go where pairs like them go"


def born(shuffled: bool = False, data: tuple[torch.Tensor, ...] | None = None, rows: int = R) -> Block:
    """A block from ids before, ids and features; None: those of planted()."""
    router = {"kind": "pair", "rows": rows, "shuffled": shuffled}
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "router": router})
    (block,) = attach(small_llama(V, D, 24, 1), config)
    before, ids, features = data or planted()
    mean = features.mean(0)
    basis = torch.linalg.svd(features - mean, full_matrices=False).Vh[:5].T.contiguous()
    set_gate(block, config, MESH, FeatureSample(Rows(features, basis, mean), ids, None, before))
    return block


def test_the_birth_of_a_block_and_its_control() -> None:
    torch.manual_seed(0)
    blocks = {shuffled: born(shuffled) for shuffled in (False, True)}
    before, ids, _ = planted()
    routes = {}
    for shuffled, block in blocks.items():
        key = block.banks[0].gate.key
        assert 0.2 < float((key.cluster_pairs >= 0).float().mean()) < 0.6
        routes[shuffled] = block.banks[0].gate(torch.zeros(6000, D), Tokens(ids, previous=before))[0].flatten()
        load = torch.bincount(routes[shuffled], minlength=E)
        assert load.max() < 1.25 * 1500 and load.min() > 0.75 * 1500
    group = (before + ids) % E
    # Pairs that share a row: 400 of 1,024.
    assert adjusted_rand_score(group.numpy(), routes[False].numpy()) > 0.5
    assert adjusted_rand_score(group.numpy(), routes[True].numpy()) < 0.02
    pairs = {flag: block.banks[0].gate.key.cluster_pairs >= 0 for flag, block in blocks.items()}
    assert torch.equal(pairs[False], pairs[True]), "what was sampled, and only that, is dealt out"


def test_the_control_keeps_the_loads_of_pairs_and_of_single_tokens() -> None:
    frequency = 1 / (torch.arange(V) + 3.0)
    before, ids = torch.multinomial(frequency, 2 * 1500, replacement=True).view(2, -1)
    data = before, ids, torch.randn(V, D)[ids] + torch.randn(1500, D)
    keys = [born(shuffled, data=data, rows=1 << 16).banks[0].gate.key for shuffled in (False, True)]
    assert torch.equal(keys[0].cluster_factors, keys[1].cluster_factors)
    pairs = pair_rows(before, ids, keys[0].cluster_factors, 1 << 16)
    new = torch.zeros(V, dtype=torch.float64)  # tokens of each id whose pair was sampled once
    for token, pair in zip(ids.tolist(), pairs.tolist(), strict=True):
        new[token] += int((pairs == pair).sum()) == 1
    seen = ids.unique()
    wanted, load = (torch.bincount(key.cluster_table[seen], weights=new[seen], minlength=E) for key in keys)
    torch.testing.assert_close(load, wanted, rtol=0.1, atol=0.0)
    assert adjusted_rand_score(*(key.cluster_table[seen].numpy() for key in keys)) < 0.2
    wanted, load = (torch.bincount(key.cluster_pairs[pairs], minlength=E) for key in keys)
    torch.testing.assert_close(load, wanted, rtol=0.05, atol=0.0)
    none = torch.full((R,), -1)
    assert torch.equal(shuffled_table(none, torch.arange(3), E, 1), none), "nothing was sampled, nothing is dealt out"


def test_without_a_sample_both_are_tables_by_chance() -> None:
    for kind in ("pair", "pair-hash"):
        router = {"kind": kind, "rows": R}
        config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "router": router})
        (block,) = attach(small_llama(V, D, 24, 1), config)
        set_gate(block, config, MESH)
        key = block.banks[0].gate.key
        assert torch.bincount(key.cluster_pairs, minlength=E).tolist() == [R // E] * E
        assert len(set(key.cluster_factors.tolist())) == 2 and key.cluster_factors.min() > 0
