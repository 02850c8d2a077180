"""What a user sees of the blocks during a run: modes, trainability and tokens of every expert, on every rank."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mocte_ds.clusters import BalancedClusters
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.trainability.policy import Probe

_ROWS_AT_ONCE = 1024


@dataclass
class ExpertHandle:
    """One expert, wherever it lives; the same values on all ranks."""

    mode: ExpertMode = ExpertMode.DORMANT
    """`dormant`, `training` or `frozen`."""
    tokens: int = 0
    """Tokens routed to it since emergence, up to the last check, all ranks together."""
    history: list[Probe] = field(default_factory=list)
    """Its probes, a check each."""
    annealed_from: float | None = None
    """Share of the budget at which its own learning-rate decay began; None while there is none."""
    changed_at: int = -1
    """Optimizer step of its last change of mode."""
    thawed: bool = False
    """Whether it has thawed by itself, which happens at most once."""
    held: bool = False
    """Whether it was frozen by hand; then it stays frozen until `thaw` is called."""

    @property
    def trainability(self) -> float | None:
        """Largest eigenvalue of its neural-tangent kernel over `freeze.rows`, the number of rows, at its last probe.

        None before the first. It depends on the number of rows: compare it at an equal one.
        """
        return self.history[-1].value if self.history else None

    def rows(self, step: int) -> int:
        """Rows that its trainability was measured on at the check of ``step``; 0 if it was not measured."""
        return self.history[-1].tokens if self.history and self.history[-1].step == step else 0


@dataclass(frozen=True)
class LastClusters:
    """What the last check that read a block knew about its documents; all on the CPU."""

    mean: Tensor
    """(d,)."""
    basis: Tensor
    """(d, r)."""
    centroids: Tensor
    """(E, r)."""
    prices: Tensor
    """(E,)."""

    def assign(self, features: Tensor) -> Tensor:
        """(n,) int64 cluster of each feature (n, d): by that check's mean, basis and boundaries."""
        clusters = BalancedClusters(self.centroids, self.prices, torch.empty(0, dtype=torch.int64), directions=False)
        return clusters.assign((features - self.mean) @ self.basis)


@dataclass(frozen=True)
class LastDetection:
    """What the last check that read a block detected in its documents; all on the CPU."""

    mean: Tensor
    """(d,)."""
    basis: Tensor
    """(d, r)."""
    points: Tensor
    """(m, r) its documents."""
    labels: Tensor
    """(m,) cluster of each document, -1: none."""

    def assign(self, features: Tensor) -> Tensor:
        """(n,) int64 cluster of each feature (n, d): that of the nearest document that is in a cluster."""
        known = self.labels >= 0
        points, z = self.points[known].double(), ((features - self.mean) @ self.basis).double()
        half = points.square().sum(1) / 2
        nearest = [(part @ points.T - half).argmax(dim=1) for part in z.split(_ROWS_AT_ONCE)]
        return self.labels[known][torch.cat(nearest)]


class BlockHandle:
    """One block; `.mode` and `.experts[k]` are the public interface."""

    def __init__(self, index: int, block: Block) -> None:
        self.index, self.block = index, block
        self.experts = [ExpertHandle() for _ in range(block.num_experts)]
        self.born_share: float | None = None
        self.streak = 0
        """Checks in a row that found stable clusters."""
        self.token_basis: Tensor | None = None
        self.document_basis: Tensor | None = None
        self.document_mean: Tensor | None = None
        self.document_centroids: Tensor | None = None
        self.document_prices: Tensor | None = None
        self.document_points: Tensor | None = None
        self.document_labels: Tensor | None = None

    @property
    def name(self) -> str:
        """Path of the block in the model."""
        return self.block.name

    @property
    def mode(self) -> BlockMode:
        """`warmup`, `specialising` or `locked`."""
        return self.block.mode

    @property
    def last_clusters(self) -> LastClusters | None:
        """Clusters of the documents at the last check; None while none is known."""
        mean, basis, prices = self.document_mean, self.document_basis, self.document_prices
        if self.document_centroids is None or mean is None or basis is None or prices is None:
            return None
        return LastClusters(mean.cpu(), basis.cpu(), self.document_centroids, prices)

    @property
    def last_detection(self) -> LastDetection | None:
        """Clusters that the last check detected; None where it saw fewer than two."""
        mean, basis, points, labels = (
            self.document_mean,
            self.document_basis,
            self.document_points,
            self.document_labels,
        )
        if mean is None or basis is None or points is None or labels is None or not bool((labels > 0).any()):
            return None
        return LastDetection(mean.cpu(), basis.cpu(), points, labels)

    def refresh_mode(self) -> None:
        """Derive the block's mode from its experts'."""
        modes = {expert.mode for expert in self.experts}
        if modes == {ExpertMode.DORMANT}:
            self.block.mode = BlockMode.WARMUP
        else:
            self.block.mode = BlockMode.SPECIALISING if ExpertMode.TRAINING in modes else BlockMode.LOCKED

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, readable without unpickling foreign code."""
        return {
            "name": self.name,
            "mode": self.mode.value,
            "experts": [expert.mode.value for expert in self.experts],
            "tokens": [expert.tokens for expert in self.experts],
            "thawed": [expert.thawed for expert in self.experts],
            "held": [expert.held for expert in self.experts],
            "changed_at": [expert.changed_at for expert in self.experts],
            "annealed_from": [expert.annealed_from for expert in self.experts],
            "history": [[asdict(probe) for probe in expert.history] for expert in self.experts],
            "born_share": self.born_share,
            "streak": self.streak,
            "token_basis": self.token_basis,
            "document_basis": self.document_basis,
            "document_mean": self.document_mean,
            "document_centroids": self.document_centroids,
            "document_prices": self.document_prices,
            "document_points": self.document_points,
            "document_labels": self.document_labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for k, expert in enumerate(self.experts):
            expert.mode = ExpertMode(state["experts"][k])
            expert.tokens, expert.thawed = state["tokens"][k], state["thawed"][k]
            expert.held = bool(state.get("held", {k: False})[k])  # older checkpoints have none
            expert.annealed_from, expert.changed_at = state["annealed_from"][k], state["changed_at"][k]
            expert.history = [Probe(**probe) for probe in state["history"][k]]
        for name in ("born_share", "streak", "token_basis", "document_basis", "document_mean"):
            setattr(self, name, state[name])
        self.document_centroids, self.document_prices = state["document_centroids"], state["document_prices"]
        # Checkpoints of earlier versions do not say what was detected: the next check begins to compare.
        self.document_points, self.document_labels = state.get("document_points"), state.get("document_labels")
        self.refresh_mode()
