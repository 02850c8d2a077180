"""Do the sources of text want different changes of the same weights? For each FFN and expert of a checkpoint."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.errors import MocteError
from mocte_ds.evaluation.features import FFN, Reader, ffn_sites, listening
from mocte_ds.evaluation.routes import banks, routes
from mocte_ds.text_table import brief, text_table
from mocte_ds.trainability import coherence, conflict, ghost_gram

ROWS, LEAST = 512, 64
"""Rows of a module for kappa, whose floor is one over it, and for Q; tokens that each half of a domain needs."""
Key = tuple[str, int | None]
"""Name of a dense FFN and None, or of a bank and the number of an expert."""
NUMBERS = ("cosine", "negative", "noise", "kappa", "Q")

# Shapes: n rows, d features, P parameters of a module.


class _Sample:
    """Up to ROWS rows of a module, their loss gradients and sources, by random keys: any row may be in it alike."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self.rows = self.gradient = torch.empty(0)
        self.source = torch.empty(0, dtype=torch.int64)

    def offer(self, rows: Tensor, gradient: Tensor, source: Tensor) -> None:
        keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        kept = torch.cat([self._keys, keys])
        chosen = kept.argsort()[:ROWS]
        self._keys = kept[chosen]
        if len(self.rows):
            rows, gradient = torch.cat([self.rows, rows]), torch.cat([self.gradient, gradient])
            source = torch.cat([self.source, source])
        self.rows, self.gradient, self.source = rows[chosen], gradient[chosen], source[chosen]


@dataclass
class Sums:
    """Gradients of the loss by a module's weights, summed over the tokens of each domain and half of its sequences."""

    gradient: Tensor
    """(domains, 2, P)."""
    tokens: Tensor
    """(domains, 2) that the module has read."""


def read_conflicts(checkpoint: str | Path, prepared: str | Path, sequences: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conflict between the domains' gradients in every dense FFN and in every expert.

    A domain's mean gradient m_c is that of the loss by the module's weights, over all of the domain's tokens that it
    reads. Tokens of a sequence are not independent, but sequences are: |m_c|^2 is estimated by the product of the means
    of two halves of the domain's sequences, so that noise adds nothing to it. A domain counts where each half has LEAST
    tokens. kappa and Q are those of :func:`mocte_ds.trainability.conflict` on ROWS rows drawn by chance; a module with
    fewer is left out of them.

    Args:
        checkpoint: as of :func:`mocte_ds.evaluation.features.read_features`, and so
        prepared: and
        sequences: and
        seed: which also draws the rows.

    Returns:
        For each dense FFN and bank of experts "module", "experts" (their number; None for an FFN), "tokens" (read);
        "cosine": the mean of m_c m_d over pairs of domains, over the mean of |m_c|^2 (for vectors of one length their
        mean cosine: 1 all equal, 0 orthogonal), both means over all experts together; "negative" (share of pairs whose
        product is under zero); "noise" (share of the plain |m_c|^2 that is noise); "kappa" and "Q" (means over them).

    Raises:
        CheckpointError, DataError, ConfigError: as of read_features.
    """
    reader = Reader(checkpoint, prepared, sequences, seed)
    network = reader.network
    dense = {name: network.get_submodule(path) for name, path in _dense(network).items()}
    members = {name: list(bank.experts) for name, bank in banks(network).items()}
    modules: dict[Key, nn.Module] = {(name, None): module for name, module in dense.items()}
    modules |= {(name, k): expert for name, experts in members.items() for k, expert in enumerate(experts)}
    sums, samples = _gradients(reader, modules)
    found = []
    for name in (*dense, *members):
        numbers = []
        for key in (key for key in modules if key[0] == name):
            numbers.append(_spread(modules[key].cpu(), samples[key]))
        means = {number: _mean([one[number] for one in numbers if number in one]) for number in ("kappa", "Q")}
        means |= directions([sums[key] for key in modules if key[0] == name])
        tokens = sum(int(sums[key].tokens.sum()) for key in modules if key[0] == name)
        found.append({"module": name, "experts": None if name in dense else len(numbers), "tokens": tokens, **means})
    return found


def _gradients(reader: Reader, modules: dict[Key, nn.Module]) -> tuple[dict[Key, Sums], dict[Key, _Sample]]:
    """One pass to and fro over all sequences, domain by domain and half by half."""
    batches = list(reader.batches())
    text = {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels", "domain")}
    weights = {key: list(module.parameters()) for key, module in modules.items()}
    sums = {
        key: Sums(
            torch.zeros(len(reader.domains), 2, sum(p.numel() for p in mine)), torch.zeros(len(reader.domains), 2)
        )
        for key, mine in weights.items()
    }
    samples = {key: _Sample(number) for number, key in enumerate(modules)}
    with routes(reader.network) as chosen, listening(modules, _with_graph) as seen, torch.enable_grad():
        for domain, half, part in _parts(text["domain"], reader.size):
            seen.clear()
            logits = reader.network(input_ids=text["input_ids"][part], use_cache=False).logits
            labels = text["labels"][part].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
            keys = list(seen)
            wanted = [seen[key][1] for key in keys] + [weight for key in keys for weight in weights[key]]
            found = torch.autograd.grad(loss, wanted)
            by_weight = iter(found[len(keys) :])
            for key, gradient in zip(keys, found, strict=False):
                flat = torch.cat([next(by_weight).flatten().float().cpu() for _ in weights[key]])
                name, k = key
                sums[key].gradient[domain, half] += flat
                sums[key].tokens[domain, half] += len(labels) if k is None else int((chosen[name] == k).sum())
                rows, gradient = (t.reshape(-1, t.shape[-1]).float().cpu() for t in (seen[key][0], gradient))
                there = (gradient != 0).any(dim=1)
                samples[key].offer(rows[there], gradient[there], torch.full((int(there.sum()),), domain))
    return sums, samples


def _parts(source: Tensor, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Domain, half and numbers of sequences, at most so many at once; a domain's sequences go to its halves in turn."""
    for domain in source.unique().tolist():
        mine = (source == domain).nonzero()[:, 0]
        for half in (0, 1):
            for part in mine[half::2].split(size):
                if len(part):
                    yield domain, half, part


def directions(sums: Sequence[Sums]) -> dict[str, float | None]:
    """How the domains' mean gradients lie to each other: "cosine", "negative" and "noise" of :func:`read_conflicts`.

    Args:
        sums: of the experts of a bank, or of one FFN.
    """
    products, squares, plain = [], [], []
    for one in sums:
        enough = (one.tokens >= LEAST).all(dim=1)
        gradient, tokens = one.gradient[enough].double(), one.tokens[enough].double()
        halves = gradient / tokens[..., None]
        means = gradient.sum(dim=1) / tokens.sum(dim=1, keepdim=True)
        between = means @ means.T
        first, second = torch.triu_indices(len(means), len(means), 1)
        products.append(between[first, second])
        squares.append((halves[:, 0] * halves[:, 1]).sum(dim=1))
        plain.append(between.diagonal())
    product, square, both = torch.cat(products), torch.cat(squares), torch.cat(plain)
    if not len(product) or not float(square.mean()) > 0:
        return {"cosine": None, "negative": None, "noise": None}
    return {
        "cosine": float(product.mean() / square.mean()),
        "negative": float((product < 0).double().mean()),
        "noise": float(1 - square.mean() / both.mean()),
    }


def conflicts_text(facts: Sequence[dict[str, Any]]) -> str:
    """The facts as a table."""
    head = ["module", "experts", *NUMBERS]
    return text_table(head, [[f["module"], *(brief(f[name]) for name in head[1:])] for f in facts], left=("module",))


def _dense(network: nn.Module) -> dict[str, str]:
    """Paths of the FFNs outside of blocks by their names."""
    blocked = {name.rpartition(".banks.")[0] for name in banks(network)}
    sites = ffn_sites(network)
    return {name: path for (name, kind), path in sites.items() if kind == FFN and name not in blocked}


def _with_graph(_key: Key, args: tuple, output: Tensor) -> tuple[Tensor, Tensor]:
    """What a module read, and what it gave with its graph."""
    return args[0].detach(), output


def _spread(module: nn.Module, sample: _Sample) -> dict[str, float]:
    """kappa and Q of the drawn rows; nothing where they are too few."""
    if len(sample.rows) < ROWS:
        return {}
    gram = ghost_gram(module, sample.rows, sample.gradient)
    numbers = {"kappa": coherence(gram)}
    with contextlib.suppress(MocteError):  # all rows of one domain
        numbers["Q"] = conflict(gram, sample.source).q
    return numbers


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
