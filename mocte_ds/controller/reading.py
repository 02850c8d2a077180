"""What one check read from one block."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mocte_ds.clusters import BalancedClusters, Detection
from mocte_ds.controller.feature_sample import FeatureSample, Rows, TokenRows

PROJECTED_DOCUMENTS = 400
# What only one rank has: rows that it sampled.
_OWN = ("tokens", "documents")


@dataclass
class ClusterFacts:
    """What the search for clusters found in one block's documents."""

    detection: Detection
    clusters: BalancedClusters
    """Clusters of equal mass, one per expert: for the log, the figures and the conflict of gradients."""
    stability: float | None
    """Adjusted Rand index between the detected clusters and those of the block's last reading, on the current
    documents; None if either had fewer than two."""
    agreement: dict[str, float] | None
    """"nmi" and "purity" with the documents' sources; None where no source is known."""
    published: dict[str, float]
    """Result of the published rule on the sampled tokens."""
    seconds: float
    """Of the search."""
    flops: int = 0
    """FLOPs of the search: matrix products, and distances between all pairs where scikit-learn looks for neighbours."""


@dataclass
class BlockReading:
    """The same on all ranks but for ``tokens`` and ``documents``."""

    tokens: TokenRows
    """What this rank has sampled."""
    rows: int
    """Number of sampled token features, all ranks; 0: nothing was seen or read, and all but the loads is empty."""
    order: Tensor | None = None
    """(rows,) index that puts the gathered token features of all ranks into the order of their hashes."""
    mean: Tensor | None = None
    basis: Tensor | None = None
    """(d, k) the leading centred singular directions that a gate is built in."""
    singular_values: list[float] = field(default_factory=list)
    explained: list[float] = field(default_factory=list)
    certificate: float | None = None
    """Sine of the angle between the subspaces of two half-samples, all directions."""
    certified: int | None = None
    """Number of leading directions that the sample determines."""
    coordinates: Tensor | None = None
    """(m, r) document means of all ranks in the span of their centred singular directions."""
    plane: Tensor | None = None
    """(m, 2) the same documents in their first two singular directions."""
    domains: Tensor | None = None
    """(m,) sources of those documents, -1 where unknown."""
    documents: Rows | None = None
    """This rank's document means, with the mean and the directions of all ranks."""
    domain_load: list[list[int]] | None = None
    """Tokens by source (rows) and expert (columns, bank after bank) while features were sampled."""
    found: ClusterFacts | None = None
    """None during the search, without one, and where there were too few documents."""
    read: bool = True
    """Whether the features were read."""
    seconds: dict[str, float] = field(default_factory=lambda: {"spectrum": 0.0, "clusters": 0.0})
    bytes: dict[str, int] = field(default_factory=lambda: {"spectrum": 0, "clusters": 0})

    @classmethod
    def unread(cls, width: int) -> "BlockReading":
        """Of a block of d ``width`` whose features are not read at this check."""
        return cls(TokenRows.none(width), 0, read=False)

    def sample(self) -> FeatureSample:
        """What a gate is made of."""
        rows = self.tokens
        features = Rows(rows.features, self.basis, self.mean, self.order)
        return FeatureSample(features, rows.ids, self.documents, rows.before, rows.documents)

    def facts(self, names: list[str]) -> dict[str, Any]:
        """The numbers of the check's event; ``names`` are the sources."""
        found = self.found
        load, by_domain = None, None
        if self.domain_load is not None:
            table = torch.tensor(self.domain_load, dtype=torch.float64)
            load = table.sum(0).long().tolist()
            shares = table / table.sum(1, keepdim=True).clamp(min=1)
            by_domain = {name: shares[i].tolist() for i, name in enumerate(names) if table[i].sum() > 0}
        return {
            "rows": self.rows,
            "rank": len(self.singular_values),
            "singular_values": self.singular_values,
            "explained": self.explained,
            "certificate": self.certificate,
            "certified_rank": self.certified,
            "gate_rank": None if self.basis is None else self.basis.shape[1],
            "documents": 0 if self.coordinates is None else self.coordinates.shape[0],
            **_detection_facts(found.detection if found else None, self.read),
            "token_line": found.published if found else None,
            "stability": found.stability if found else None,
            "nmi": found.agreement["nmi"] if found and found.agreement else None,
            "purity": found.agreement["purity"] if found and found.agreement else None,
            "load": load,
            "domain_load": by_domain,
        }

    def projection(self, names: list[str]) -> dict[str, Any]:
        """Document means in their first two singular directions, at most a few hundred."""
        if self.plane is None or self.found is None or self.domains is None:
            return {"points": [], "cluster": [], "domain": []}
        some = slice(0, PROJECTED_DOCUMENTS)
        domains = self.domains[some].tolist()
        return {
            "points": [[round(x, 4), round(y, 4)] for x, y in self.plane[some].tolist()],
            "cluster": self.found.clusters.labels[some].tolist(),
            "domain": [names[i] if 0 <= i < len(names) else "unknown" for i in domains],
        }

    def drop_rows(self) -> None:
        """Forget this rank's own rows, which only a gate would be made of."""
        self.tokens = TokenRows(*(part[:0] for part in self.tokens))
        if self.documents:
            self.documents = Rows(self.documents.features[:0], self.documents.basis, self.documents.mean)
        self.order = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors of what all ranks have; the search is over."""
        state = {name: value for name, value in vars(self).items() if name not in (*_OWN, "found")}
        if self.found:
            parts = {"detection": vars(self.found.detection), "clusters": vars(self.found.clusters)}
            state["found"] = {**vars(self.found), **parts}
        return state

    def own_state_dict(self) -> dict[str, Any]:
        """Plain values and tensors of what this rank has."""
        return {"tokens": tuple(self.tokens), "documents": vars(self.documents) if self.documents else None}

    @classmethod
    def restored(cls, state: Mapping[str, Any], own: Mapping[str, Any], device: torch.device) -> "BlockReading":
        """A reading from what :meth:`state_dict` and :meth:`own_state_dict` returned; rows go to ``device``."""
        found, documents = state.get("found"), own["documents"]
        if found:
            parts = {"detection": Detection(**found["detection"]), "clusters": BalancedClusters(**found["clusters"])}
            found = ClusterFacts(**{**found, **parts})
        rows = Rows(**{name: _to(value, device) for name, value in documents.items()}) if documents else None
        moved = {
            name: value.to(device) for name in ("mean", "basis", "order") if (value := state.get(name)) is not None
        }
        known = [value.to(device) for value in own["tokens"]]
        # Checkpoints of older versions do not know the ids before and the documents.
        tokens = TokenRows(*known, *[torch.full_like(known[1], -1)] * (len(TokenRows._fields) - len(known)))
        return cls(**{**state, **moved, "found": found, "tokens": tokens, "documents": rows})


def _to(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)


def _detection_facts(found: Detection | None, read: bool) -> dict[str, Any]:
    none = "no document was sampled" if read else "not read at this check"
    names = ("noise", "largest", "silhouette", "eps")
    return {
        "clusters": found.count if found else None,
        "sizes": torch.bincount(found.labels[found.labels >= 0]).tolist() if found else None,
        **{name: getattr(found, name) if found else None for name in names},
        "eps_sensitivity": [list(pair) for pair in found.sensitivity] if found else None,
        "found": bool(found and found.found) if read else None,
        "reason": found.reason if found else none,
    }
