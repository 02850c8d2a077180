"""The gate of a bank in training: the choice of a token's experts, and the loss for even loads.

The choice itself travels with exported models (mocte_ds/remote_code/).
"""

import torch
from torch import Tensor

from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.moe.balance import Balance, balance_loss
from mocte_ds.moe.keys import LinearKey, key_class
from mocte_ds.remote_code.gates_mocte import Gate
from mocte_ds.remote_code.tokens_mocte import RoutingError, Tokens
from mocte_ds.router_config import RouterConfig

_KEPT = 0.95
"""Weight of the old value in the running mean of the weights, per step."""


class ClusterGate(Gate):
    """Chooses the experts of each token. Shapes: T tokens, d features, E experts, k experts per token."""

    router: RouterConfig

    def __init__(self, hidden_size: int, num_experts: int, router: RouterConfig, vocab_size: int | None) -> None:
        """Make an empty gate.

        Args:
            hidden_size: d.
            num_experts: E.
            router: kind of key, weight, and whether it learns.
            vocab_size: entries of a table.
        """
        key = key_class(router.kind)
        if "dropped" in key.taken() and router.directions + router.dropped > hidden_size:
            raise ConfigError(
                f"router.directions = {router.directions} and router.dropped = {router.dropped} are more than the "
                f"{hidden_size} features of a token; lower one of them."
            )
        super().__init__(key.of(router, hidden_size, num_experts, vocab_size), router)

    @property
    def balanced(self) -> bool:
        """Whether the gate learns to choose and has a loss for even loads."""
        return self.router.learns_choice and self.router.aux > 0

    @property
    def reads_loads(self) -> bool:
        """Whether the loads of each optimizer step change how the next one is routed."""
        return self.balanced or self.router.balance_rate > 0 or self.router.unit_mean or self.key.moves

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move what is added to the choice toward even loads (Wang et al., arXiv 2408.15664, algorithm 1).

        Args:
            load: (E,) int64 tokens of each expert in an optimizer step, all ranks together.
        """
        if self.router.balance_rate:
            missing = load.sum() - len(load) * load
            added = self.cluster_correction if self.router.weight == "sigmoid" else self.key.cluster_bias
            added += self.router.balance_rate * missing.sign().to(added)

    @torch.no_grad()
    def follow_mean(self, mean: float) -> None:
        """Move the running mean of the weights by what an optimizer step had.

        Args:
            mean: sum of the weights of a token's experts, on average over the global batch; 1 if the running mean is
                right.
        """
        if self.router.unit_mean and mean > 0:
            self.cluster_mean *= _KEPT + (1 - _KEPT) * mean

    @torch.no_grad()
    def begin_mean(self, features: Tensor, tokens: Tokens) -> tuple[Tensor, int]:
        """Sum of some tokens' weights at birth, before any division, and the number of these tokens.

        Args:
            features: (n, d).
            tokens: what else is known of them.
        """
        self.cluster_mean.fill_(1.0)
        _, weight, _ = self.choose(features.to(self.cluster_mean), tokens)
        assert weight is not None  # unit_mean is refused for hard weights
        return weight.double().sum() / self.router.scale, len(features)

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
        try:
            index, weight, scores = self.choose(features, tokens)
        except RoutingError as error:
            raise MocteError(str(error)) from None
        if scores is None or not self.router.learn:
            return index, weight, None
        balance = balance or Balance(scores.new_full((scores.shape[1],), 1.0 / scores.shape[1]))
        loss = balance_loss(scores, balance, normalised=self.router.weight != "sigmoid")
        return index, weight, self.router.aux * loss

    def linear(self) -> tuple[Tensor, Tensor]:
        """(E, d) and (E,) of the whole gate, prior and residual, in fp32; for linear keys only."""
        assert isinstance(self.key, LinearKey)
        weight, bias = self.key.cluster_weight, self.key.cluster_bias
        if self.router.learn:
            weight = weight + self.cluster_residual.detach().float()
        return weight, bias

    def _set_ep_group(self, _group: object) -> None:
        """DeepSpeed hands every gate its expert-parallel group; this gate needs none."""
