"""What blocks and banks tell whoever watches a forward pass, such as a check; without an observer they tell nobody."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from mocte_ds.moe.bank import ClusterMOELayer
    from mocte_ds.moe.block import Block
    from mocte_ds.moe.forward import ForwardState


class Observer:
    """Handed over with a pass (:meth:`BatchContext.announce`, :meth:`BatchContext.watched_by`); hears of it once.

    Recomputations are not told. The methods here do nothing, so that an observer need only have those that it wants.
    """

    def features(self, block: "Block", hidden: Tensor, state: "ForwardState") -> None:
        """A block is reached for the first time in a pass.

        Args:
            block: which.
            hidden: (..., d) its features, without a graph.
            state: of the pass.
        """

    def routed(self, layer: "ClusterMOELayer", hidden: Tensor, index: Tensor, state: "ForwardState") -> None:
        """The tokens of a pass have been through the experts of a bank; on every rank that shares the bank.

        Args:
            layer: of experts; :meth:`ClusterMOELayer.rows_of_experts` sends what belongs to the tokens the same way.
            hidden: (..., d) features of T tokens.
            index: (T, k) int64 experts of each, the best first.
            state: of the pass.
        """

    def abandoned(self) -> None:
        """A pass has ended with an exception: some blocks have told of it, others have not."""
