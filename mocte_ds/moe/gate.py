"""Which expert a token goes to, and with what weight: one small interface, a few keys behind it.

A gate is made of a prior, which is read from clusters at emergence and never trained, and, if it is to learn, of a
residual W h that starts at zero. The keys (the priors' kinds) are in mocte_ds/moe/keys.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.config import RouterConfig
from mocte_ds.moe.balance import Balance, balance_loss
from mocte_ds.moe.keys import Key, LinearKey, key_class
from mocte_ds.remote_code.tokens_mocte import Tokens

_TINY = 1e-20


class ClusterGate(nn.Module):
    """Chooses the experts of each token. Shapes: T tokens, d features, E experts, k experts a token."""

    def __init__(self, hidden_size: int, num_experts: int, router: RouterConfig, vocab_size: int | None) -> None:
        """Allocate an empty gate.

        Args:
            hidden_size: d.
            num_experts: E.
            router: kind of key, weight, and whether it learns.
            vocab_size: entries of a table.
        """
        super().__init__()
        self.router = router
        self.key: Key = key_class(router.kind)(hidden_size, num_experts, vocab_size)
        if router.weight == "sigmoid":
            self.register_buffer("cluster_correction", torch.zeros(num_experts))
        if router.learn:
            # DeepSpeed takes names with "expert" in them for expert parameters and drops them from checkpoints.
            self.cluster_residual = nn.Parameter(torch.zeros(num_experts, hidden_size))

    @property
    def soft(self) -> bool:
        """Whether the expert's output is weighted."""
        return self.router.weight != "hard"

    @property
    def balanced(self) -> bool:
        """Whether the gate learns and has a loss for even loads."""
        return self.router.learn and self.router.aux > 0

    def forward(
        self, features: Tensor, tokens: Tokens, balance: Balance | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Choose.

        Args:
            features: (T, d).
            tokens: what else is known of them.
            balance: what the auxiliary loss is made with; None: even loads, every token counts.

        Returns:
            (T, k) int64 experts of each token, the best first; their weights (T, k), or None for the hard weight 1;
            and where the gate learns the auxiliary loss (), else None.

        Raises:
            MocteError: the key needs token ids and there are none.
        """
        # Never in autocast: logits that are rounded to bf16 send tokens elsewhere.
        with torch.autocast(features.device.type, enabled=False):
            return self._choose(features, tokens, balance)

    def _choose(
        self, features: Tensor, tokens: Tokens, balance: Balance | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self.soft:
            return self.key.choose(features.detach().float(), tokens)[:, None], None, None
        learns = self.router.learn
        features = features.float()
        through = learns and self.key.by_chance
        logits = self.key.logits(features if through else features.detach(), tokens)
        if learns:
            logits = logits + F.linear(features, self.cluster_residual.float())
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
        if not learns:
            return index, weight, None
        balance = balance or Balance(scores.new_full((scores.shape[1],), 1.0 / scores.shape[1]))
        return index, weight, self.router.aux * balance_loss(scores, balance, normalised=not sigmoid)

    def order(self, logits: Tensor) -> Tensor:
        """(T, E) of which the largest are chosen: the logits, or their sigmoids and what is added to them."""
        if self.router.weight != "sigmoid":
            return logits
        return logits.detach().sigmoid() + self.cluster_correction

    def linear(self) -> tuple[Tensor, Tensor]:
        """(E, d) and (E,) of the whole gate, prior and residual, in fp32; for linear keys only."""
        assert isinstance(self.key, LinearKey)
        weight, bias = self.key.cluster_weight, self.key.cluster_bias
        if self.router.learn:
            weight = weight + self.cluster_residual.detach().float()
        return weight, bias

    def _apply(self, fn: Callable, recurse: bool = True) -> "ClusterGate":
        """Moves with the model but keeps its precision: a boundary rounded to bf16 sends tokens elsewhere."""
        kept = [
            (module._buffers, name, buffer) for module in (self, self.key) for name, buffer in module._buffers.items()
        ]
        super()._apply(fn, recurse)
        for buffers, name, buffer in kept:
            buffers[name] = buffer.to(buffers[name].device)
        return self

    def _set_ep_group(self, _group: object) -> None:
        """DeepSpeed hands every gate its expert-parallel group; this gate needs none."""
