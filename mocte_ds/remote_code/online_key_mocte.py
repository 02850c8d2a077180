"""A routing key whose clusters follow the features, in training and in an exported model; needs torch alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .keys_mocte import Key
from .tokens_mocte import RoutingError, Tokens

# Shapes: n tokens, d features, E experts, r whitened directions.

TEMPERATURE = 0.1
"""By which cosines are divided."""


class OnlineKey(Key):
    """`online`: the centroid with the nearest direction, moved a little toward its tokens after each optimizer step.

    x = (W h - o) / |W h - o|, with W whitening the features in some directions but the leading ones; chosen is the
    largest cos(x, m_e) / .1 + b_e. In training m_e <- (1 - a) m_e + a (mean x of its tokens in the global batch),
    a = `centroid_rate`. No gradient. (arXiv 2605.12476)
    """

    has_logits, moves = False, True
    settings = ("directions", "dropped", "centroid_rate")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        vocab_size: int | None = None,
        directions: int = 32,
        dropped: int = 2,
        centroid_rate: float = 0.01,
    ) -> None:
        """An empty key.

        Args:
            hidden_size: d.
            num_experts: E.
            vocab_size: unused.
            directions: r.
            dropped: leading directions that are left out.
            centroid_rate: part of the way to their tokens' mean that centroids go in a step.
        """
        super().__init__(hidden_size, num_experts, vocab_size)
        self.directions, self.dropped, self.centroid_rate = directions, dropped, centroid_rate
        self.register_buffer("cluster_whitening", torch.zeros(directions, hidden_size))
        self.register_buffer("cluster_offset", torch.zeros(directions))
        self.register_buffer("cluster_centroids", torch.zeros(num_experts, directions))
        self.register_buffer("cluster_bias", torch.zeros(num_experts))
        self._seen: Tensor | None = None

    def fit(self, birth: Any) -> None:
        self.set(*birth.whitened_clusters(self.directions, self.dropped))

    def set(self, whitening: Tensor, offset: Tensor, centroids: Tensor, bias: Tensor) -> None:
        """Store (r, d), (r,), (E, r) and (E,)."""
        self.cluster_whitening.copy_(whitening)
        self.cluster_offset.copy_(offset)
        self.cluster_centroids.copy_(centroids)
        self.cluster_bias.copy_(bias)

    def points(self, features: Tensor) -> Tensor:
        """(n, r) fp32 unit vectors x."""
        # Never in autocast: logits that are rounded to bf16 send tokens elsewhere.
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(F.linear(features.float(), self.cluster_whitening) - self.cluster_offset, dim=1)

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        x = self.points(features)
        self._seen = x if self.counting else None
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, F.normalize(self.cluster_centroids, dim=1)) / TEMPERATURE + self.cluster_bias

    def no_sums(self) -> Tensor:
        return torch.zeros(self.cluster_centroids.shape, dtype=torch.float64)

    def take_sums(self, index: Tensor, real: Tensor | None) -> Tensor:
        """(E, r) fp64 sums of x; see :meth:`Key.take_sums`."""
        x, self._seen = self._seen, None
        assert x is not None  # a choice has been made
        x = x.detach().double() if real is None else torch.where(real[:, None], x.detach().double(), 0.0)
        sums = self.no_sums().to(x.device)
        for column in index.unbind(1):
            # Sorted on CUDA, so that the order of the additions is always the same.
            sums.index_put_((column,), x, accumulate=True)
        return sums

    @torch.no_grad()
    def follow(self, sums: Tensor, load: Tensor) -> None:
        """Move the centroids of experts that had tokens; see :meth:`Key.follow`."""
        if not bool(torch.isfinite(sums).all()):
            raise RoutingError("its tokens' features are NaN or infinite, and its centroids would follow them.")
        sums, load = (t.to(self.cluster_centroids.device) for t in (sums, load))
        mean = (sums / load.clamp(min=1)[:, None]).float()
        moved = (1 - self.centroid_rate) * self.cluster_centroids + self.centroid_rate * mean
        self.cluster_centroids.copy_(torch.where((load > 0)[:, None], moved, self.cluster_centroids))

    def spread(self, features: Tensor) -> Tensor:
        """(n,) by how much rounding of the features is larger in the logits, relative to their size."""
        z = F.linear(features, self.cluster_whitening) - self.cluster_offset
        size = self.cluster_whitening.norm() * features.norm(dim=1) + self.cluster_offset.norm()
        return size / z.norm(dim=1).clamp(min=1e-12) / TEMPERATURE

    @classmethod
    def flops(cls, hidden_size: int, num_experts: int, **settings: Any) -> float:
        return 2.0 * settings["directions"] * (hidden_size + num_experts)
