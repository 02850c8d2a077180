"""Routing key `document`: what is read of a document, where it begins anew, and how it is born."""

import torch
from sklearn.metrics import adjusted_rand_score

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import set_gate
from mocte_ds.controller.collect import FeatureCollector, SampleStream
from mocte_ds.controller.feature_sample import FeatureSample, Rows, TokenRows
from mocte_ds.controller.reading import BlockReading
from mocte_ds.dist.mesh import ALONE
from mocte_ds.moe import Block, attach
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.keys import DocumentKey
from tests.clusters.test_documents import DOCUMENTS, E, R, V, planted
from tests.controller.test_birth import MESH
from tests.small_models import small_llama

EOD = 0


def test_the_document_so_far_decides() -> None:
    torch.manual_seed(0)
    key = DocumentKey(8, E, V)
    key.set(torch.randn(V, E))
    ids = torch.randint(1, V, (3, 20))
    ids[0, 6] = ids[2, 0] = ids[2, 11] = EOD
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :5] = 0  # padding on the left
    found = key.choose(torch.zeros(60, 8), ForwardState(ids, EOD, {"attention_mask": mask}).tokens((3, 20, 8)))
    for row in range(3):
        so_far = torch.zeros(E)
        for place in range(20):
            if not mask[row, place]:
                continue
            so_far += key.cluster_scores[ids[row, place]]
            assert found.view(3, 20)[row, place] == so_far.argmax()
            if ids[row, place] == EOD:
                so_far = torch.zeros(E)


def born(shuffled: bool = False) -> tuple[Block, torch.Tensor, torch.Tensor]:
    router = {"kind": "document", "shuffled": shuffled}
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "router": router})
    (block,) = attach(small_llama(V, R, 24, 1), config)
    ids, number, features, source = planted()
    mean = features.mean(0)
    basis = torch.linalg.svd(features - mean, full_matrices=False).Vh[:4].T.contiguous()
    set_gate(block, config, MESH, FeatureSample(Rows(features, basis, mean), ids, None, ids, number))
    return block, ids, source


def test_the_birth_of_a_block_and_its_control() -> None:
    agreements = []
    for shuffled in (False, True):
        block, ids, source = born(shuffled)
        texts = ids.view(DOCUMENTS, -1)
        tokens = ForwardState(texts).tokens((*texts.shape, R))
        routes = block.banks[0].gate(torch.zeros(len(ids), R), tokens)[0].view(DOCUMENTS, -1)
        load = torch.bincount(routes.flatten(), minlength=E) * E / len(ids)
        assert load.max() < 1.15 and load.min() > 0.85
        agreements.append(adjusted_rand_score(source, routes[:, -1]))
    assert agreements[0] > 0.95 and agreements[1] < 0.7


def test_without_a_sample_scores_are_by_chance() -> None:
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "router": {"kind": "document"}})
    (block,) = attach(small_llama(V, R, 24, 1), config)
    set_gate(block, config, MESH)
    assert abs(float(block.banks[0].gate.key.cluster_scores.std()) - 1) < 0.1


def test_a_sample_knows_the_documents_of_its_tokens() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, V, (3, 24))
    ids[0, 7] = ids[2, 15] = EOD
    stream = SampleStream(1000, 100, 0, EOD, ALONE)
    collector = FeatureCollector(1, stream)
    state = ForwardState(ids, EOD, first_sequence=5)
    collector.see(torch.arange(72.0).view(3, 24, 1), state)
    rows = collector.tokens()
    place = rows.features[:, 0].long()
    expected = (torch.tensor([0] * 8 + [1] * 16 + [2] * 24 + [3] * 16 + [4] * 8))[place]
    assert len(rows.documents) == 72 and int(rows.documents.min()) >= 0
    assert len(rows.documents.unique()) == 5 and adjusted_rand_score(expected, rows.documents) == 1
    # Sequences have numbers of their own in the run, and so have their documents.
    later = SampleStream(1000, 100, 0, EOD, ALONE)
    other = FeatureCollector(1, later)
    other.see(torch.arange(72.0).view(3, 24, 1), ForwardState(ids, EOD, first_sequence=8))
    assert not set(other.tokens().documents.tolist()) & set(rows.documents.tolist())
    old = stream.state_dict()
    old["token_facts"] = {"rows": old["token_facts"]["rows"][:, :3]}  # of an older version
    later.load_state_dict(old)
    assert bool((later.token_facts.rows()[:, 3] == -1).all())


def test_a_reading_of_an_older_checkpoint_knows_no_documents() -> None:
    features, ids = torch.randn(5, 3), torch.arange(5)
    reading = BlockReading(TokenRows(features, ids, ids + 1, ids + 2, ids + 3), 5, mean=torch.zeros(3))
    state, own = reading.state_dict(), reading.own_state_dict()
    assert type(own["tokens"]) is tuple, "plain values: what is saved names no class"
    again = BlockReading.restored(state, own, torch.device("cpu"))
    assert all(torch.equal(*pair) for pair in zip(again.tokens, reading.tokens, strict=True))
    assert torch.equal(again.sample().documents_of_tokens, ids + 3)
    for columns in (3, 4):
        older = BlockReading.restored(state, {**own, "tokens": own["tokens"][:columns]}, torch.device("cpu"))
        assert bool((older.tokens.documents == -1).all()) and torch.equal(older.tokens.ids, ids)
        assert bool((older.tokens.before == (-1 if columns == 3 else ids + 2)).all())
