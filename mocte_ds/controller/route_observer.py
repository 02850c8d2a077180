"""Which way the tokens of a forward pass took: what the probe set's passes are watched by."""

from torch import Tensor

from mocte_ds.moe.bank import ClusterMOELayer
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.observer import Observer


class RouteObserver(Observer):
    """By layer of experts, of the passes that begin within :meth:`BatchContext.watched_by`."""

    def __init__(self, places: Tensor | None = None) -> None:
        """Nothing is recorded yet.

        Args:
            places: (B, T, c) integers below 2**24 per token that travel to the experts with it; None: nothing travels.
        """
        self.places = places
        self.routes: dict[ClusterMOELayer, Tensor] = {}
        """(n,) best expert of each token."""
        self.rows: dict[ClusterMOELayer, dict[int, list[Tensor]]] = {}
        """By global expert, for each of its calls (m, c) int64 places of the rows that it read."""

    def routed(self, layer: ClusterMOELayer, hidden: Tensor, index: Tensor, state: ForwardState) -> None:
        """See :meth:`Observer.routed`."""
        self.routes[layer] = index[:, 0]
        if self.places is not None and self.places.shape[:-1].numel() == len(index):
            self.rows[layer] = layer.rows_of_experts(index, self.places.flatten(0, -2))
