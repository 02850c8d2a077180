"""Which expert a token goes to, and with what weight: one small interface, a few keys behind it.

A gate is made of a prior, which is read from clusters at emergence and never trained, and, if it is to learn, of a
residual W h that starts at zero. The keys (the priors' kinds) are in mocte_ds/moe/keys.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.config import RouterConfig
from mocte_ds.moe.context import Tokens
from mocte_ds.moe.keys import Key, LinearKey, make_key


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
        self.key: Key = make_key(router.kind, hidden_size, num_experts, vocab_size)
        if router.learn:
            # DeepSpeed takes names with "expert" in them for expert parameters and drops them from checkpoints.
            self.cluster_residual = nn.Parameter(torch.zeros(num_experts, hidden_size))

    @property
    def soft(self) -> bool:
        """Whether the expert's output is weighted by its probability."""
        return self.router.weight == "softmax"

    def forward(self, features: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Choose.

        Args:
            features: (T, d).
            tokens: what else is known of them.

        Returns:
            (T, k) int64 experts of each token, the best first; their weights (T, k), or None for the hard weight 1;
            and where the gate learns the auxiliary loss (), else None.

        Raises:
            MocteError: the key needs token ids and there are none.
        """
        if not self.soft:
            return self.key.choose(features.detach().float(), tokens)[:, None], None, None
        learns = self.router.learn
        features = features.float()
        # Clusters' logits are sharp: through them the features would get gradients many times those of the loss.
        of_clusters = not learns or self.router.kind != "random"
        logits = self.key.logits(features.detach() if of_clusters else features, tokens)
        if learns:
            logits = logits + F.linear(features, self.cluster_residual.float())
        k = self.router.top_k
        index = logits.argmax(dim=-1, keepdim=True) if k == 1 else logits.topk(k, dim=-1).indices
        probability = logits.softmax(dim=-1)
        weight = probability.gather(1, index)
        if self.router.normalise:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return index, weight, self._balance_loss(index, probability) if learns else None

    def linear(self) -> tuple[Tensor, Tensor]:
        """(E, d) and (E,) of the whole gate, prior and residual, in fp32; for linear keys only."""
        assert isinstance(self.key, LinearKey)
        weight, bias = self.key.cluster_weight, self.key.cluster_bias
        if self.router.learn:
            weight = weight + self.cluster_residual.detach().float()
        return weight, bias

    def _balance_loss(self, index: Tensor, probability: Tensor) -> Tensor:
        """E * sum over experts of (share of choices) * (mean probability): 1 when even (Fedus et al., Switch, 2021)."""
        experts = probability.shape[1]
        share = torch.bincount(index.flatten(), minlength=experts).float() / max(1, index.numel())
        return self.router.aux * experts * (share * probability.mean(dim=0)).sum()

    def _apply(self, fn: Callable, recurse: bool = True) -> "ClusterGate":
        """Moves with the model but keeps its precision: a boundary rounded to bf16 sends tokens elsewhere."""
        kept = dict(self.key._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self.key._buffers[name] = buffer.to(self.key._buffers[name].device)
        return self

    def _set_ep_group(self, _group: object) -> None:
        """DeepSpeed hands every gate its expert-parallel group; this gate needs none."""
