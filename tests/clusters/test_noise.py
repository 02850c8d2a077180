"""From token ids to a verdict: documents of one source of noise are not clusters, those of four sources are four.

The whole path of a check but the ranks: a decoder's forward passes, the collector's document means, their leading
centred directions, detection.
"""

import pytest
import torch
from torch import Tensor

from mocte_ds.clusters import agreement, detect
from mocte_ds.config import MocteConfig
from mocte_ds.controller.samples import Samples
from mocte_ds.dist.mesh import ALONE
from mocte_ds.moe import attach
from mocte_ds.spectrum import sampled_svd
from tests.small_models import FFNS, loss_of, small_model

pytestmark = pytest.mark.slow
VOCAB, HIDDEN, EOD, BATCH, LENGTH, DOCUMENTS, RANK = 256, 32, 0, 16, 64, 512, 8
METHODS = ("dbscan", "hdbscan")


class Source:
    """Sequences of independent tokens, each sequence of one of several unigram distributions (domains, VOCAB)."""

    def __init__(self, chances: Tensor, seed: int, end: float = 0.0) -> None:
        """``end`` is the chance of a token to end a document, so that sequences hold documents of all lengths."""
        self.chances, self.end = chances, end
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Ids (B, T + 1) and the domain of each sequence (B,)."""
        domain = torch.randint(len(self.chances), (BATCH,), generator=self.generator)
        ids = torch.multinomial(self.chances[domain], LENGTH + 1, replacement=True, generator=self.generator)
        ends = torch.rand(ids.shape, generator=self.generator) < self.end
        return torch.where(ends, EOD, ids), domain


def noise(exponent: float, seed: int, end: float = 0.0) -> Source:
    """One domain: Zipf's law."""
    order = torch.randperm(VOCAB - 1, generator=torch.Generator().manual_seed(seed)) + 1
    chances = torch.zeros(1, VOCAB)
    chances[0, order] = torch.arange(1, VOCAB).float().pow(-exponent)
    return Source(chances, seed, end)


def four_domains(disjoint: bool, seed: int) -> Source:
    """Four: each with a quarter of the tokens of its own, or all with all tokens, but each with other frequent ones."""
    generator, chances = torch.Generator().manual_seed(seed), torch.zeros(4, VOCAB)
    order = torch.randperm(VOCAB - 1, generator=generator) + 1
    for k in range(4):
        own = order[k::4] if disjoint else order.roll(k * VOCAB // 4)
        chances[k, own] = torch.arange(1, len(own) + 1).float().reciprocal()
    return Source(chances, seed)


def coordinates(style: str, steps: int, seed: int, source: Source) -> list[tuple[Tensor, Tensor]]:
    """Document means (m, 8) of every block of a decoder after ``steps`` of training, and their domains (m,)."""
    torch.manual_seed(seed)
    model = small_model(style, VOCAB, HIDDEN, positions=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids, _ = source.batch()
        optimizer.zero_grad()
        loss_of(model, ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    spectrum = {"rows": 64, "documents": DOCUMENTS, "doublings": 0}
    config = MocteConfig.from_dict({"modules": FFNS[style], "eod_id": EOD, "seed": seed, "spectrum": spectrum})
    blocks = attach(model, config)
    samples = Samples(config, blocks, ALONE)
    with torch.no_grad():
        for step in range(DOCUMENTS // BATCH):
            ids, domain = source.batch()
            blocks[0].context.announce(first_sequence=step * BATCH, domain=domain, observer=samples)
            model(ids[:, :-1])
    found = []
    for collector in samples.collectors:
        means, domain = collector.documents()
        assert len(means) == DOCUMENTS
        space = sampled_svd(means, RANK, ALONE)
        found.append(((means - space.mean) @ space.directions, domain))
    return found


@pytest.mark.parametrize("end", [0.0, 1 / 24], ids=["sequences", "packed"])
@pytest.mark.parametrize("steps", [0, 40], ids=["untrained", "trained"])
@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_one_domain_of_noise_has_no_clusters(style: str, steps: int, end: float) -> None:
    # The steeper law makes one giant cluster with crumbs of trained features, a cloud the flatter one.
    for seed, exponent in enumerate((1.0, 1.0, 2.0, 2.0)):
        for block, (z, _) in enumerate(coordinates(style, steps, seed, noise(exponent, seed, end))):
            for method in METHODS:
                found = detect(z, method=method)
                assert not found.found, f"seed {seed}, exponent {exponent}, block {block}, {method}: {found.reason}"


@pytest.mark.parametrize("disjoint", [True, False], ids=["disjoint", "overlapping"])
@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_four_domains_are_found_on_the_same_path(style: str, disjoint: bool) -> None:
    for seed in range(2):
        # Domains that share their tokens come apart in both methods once the model has read a little of them.
        steps = 0 if disjoint else 40
        for block, (z, domain) in enumerate(coordinates(style, steps, seed, four_domains(disjoint, seed))):
            for method in METHODS:
                found = detect(z, method=method)
                assert found.found and found.count == 4, f"seed {seed}, block {block}, {method}: {found.reason}"
                assert agreement(found.labels, domain)["purity"] > 0.99
