"""Which experts a token goes to, and with what weight, in training and in an exported model; needs torch alone.

A gate is made of a prior, which is read from clusters at emergence and never trained (keys_mocte.py), and, if it is to
learn, of a residual W h that starts at zero.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .keys_mocte import Key
from .tokens_mocte import Tokens

# Shapes: n tokens, d features, E experts, k experts per token.

_TINY = 1e-20


class Gate(nn.Module):
    """Chooses the experts of each token."""

    def __init__(self, key: Key, router: Any) -> None:
        """Allocate an empty gate.

        Args:
            key: the prior.
            router: `weight` ("hard", "softmax", "sigmoid" or "gain"), `learn`, `top_k`, `normalise`, `scale`,
                `unit_mean`, `prior` and `learn_prior` of its config.
        """
        super().__init__()
        self.router, self.key = router, key
        self.unit_mean = bool(getattr(router, "unit_mean", False))  # configs of older exports lack it
        if self.unit_mean:
            # The sum of a token's weights, on average; training measures it.
            self.register_buffer("cluster_mean", torch.ones(1))
        if router.weight == "sigmoid":
            self.register_buffer("cluster_correction", torch.zeros(key.num_experts))
        if router.learn:
            # DeepSpeed takes names with "expert" in them for expert parameters and drops them from checkpoints.
            self.cluster_residual = nn.Parameter(torch.zeros(key.num_experts, key.hidden_size))
        self.learns_prior = bool(getattr(router, "learn_prior", False))
        if self.learns_prior:
            # A matrix: sets of optimizer options are found by the number of dimensions.
            self.cluster_prior = nn.Parameter(torch.full((1, 1), router.prior))

    @property
    def soft(self) -> bool:
        """Whether the expert's output is weighted."""
        return self.router.weight != "hard"

    def choose(self, features: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Choose.

        Args:
            features: (n, d).
            tokens: what else is known of them.

        Returns:
            (n, k) int64 experts of each token, the best first; their weights (n, k), or None for the hard weight 1; and
            the scores (n, E) that the weights are taken from, or None.

        Raises:
            RoutingError: the key needs token ids and there are none.
        """
        # Never in autocast: logits that are rounded to bf16 send tokens elsewhere.
        with torch.autocast(features.device.type, enabled=False):
            if not self.soft:
                return self.key.choose(features.detach().float(), tokens)[:, None], None, None
            if self.router.weight == "gain":
                return (*self._gain(features.float(), tokens), None)
            return self._weigh(features.float(), tokens)

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n, E) fp32 of the key, and of what is learned beside it."""
        if not self.router.learn:
            return self.key.logits(features.detach(), tokens)
        prior = {"prior": self.cluster_prior.float()} if self.learns_prior else {}
        return self.key.learned_logits(features, tokens, self.cluster_residual.float(), **prior)

    def compared(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n, E) fp32 logits that :meth:`choose` decides by, or weighs by where weights are a softmax or sigmoids."""
        with torch.autocast(features.device.type, enabled=False):
            if self.router.weight in ("hard", "gain"):
                return self.key.logits(features.detach().float(), tokens)
            return self.logits(features.float(), tokens)

    def _gain(self, features: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The key's choice, and the factor 2 sigmoid(w_e h), which is 1 at birth."""
        index = self.key.choose(features.detach(), tokens)[:, None]
        return index, 2 * F.linear(features, self.cluster_residual.float()).gather(1, index).sigmoid()

    def _weigh(self, features: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(features, tokens)
        k, sigmoid = self.router.top_k, self.router.weight == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        order = self.order(logits)
        index = order.argmax(dim=-1, keepdim=True) if k == 1 else order.topk(k, dim=-1).indices
        weight = scores.gather(1, index)
        if self.router.normalise:
            # Sigmoids may all be zero.
            weight = weight / (weight.sum(dim=-1, keepdim=True) + (_TINY if sigmoid else 0.0))
        if sigmoid:
            weight = weight * self.router.scale
        if self.unit_mean:
            weight = weight / self.cluster_mean
        return index, weight, scores

    def order(self, logits: Tensor) -> Tensor:
        """Scores (n, E) whose largest are chosen: logits, or with weight `sigmoid` sigmoids plus the correction."""
        if self.router.weight != "sigmoid":
            return logits
        return logits.detach().sigmoid() + self.cluster_correction

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """Moves with the model but keeps its precision: a boundary rounded to bf16 sends tokens elsewhere."""
        kept = [
            (module._buffers, name, buffer)
            for module in (self, *self.key.modules())
            for name, buffer in module._buffers.items()
        ]
        super()._apply(fn, recurse)
        for buffers, name, buffer in kept:
            now = buffers[name].device
            buffers[name] = torch.empty_like(buffer, device=now) if buffer.is_meta else buffer.to(now)
        return self
