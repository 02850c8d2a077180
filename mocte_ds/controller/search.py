"""The search for clusters: shared out over the ranks, in a thread beside the next optimizer step."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from mocte_ds.clusters import PUBLISHED_POINTS, agreement, balanced_kmeans, detect, published_line, stability
from mocte_ds.config import MocteConfig
from mocte_ds.controller.flops import FlopCount
from mocte_ds.controller.handles import LastDetection
from mocte_ds.controller.reading import ClusterFacts
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import MocteError


@dataclass(frozen=True)
class Documents:
    """Document means of all ranks; all on the CPU."""

    coordinates: Tensor
    """(m, r)."""
    mean: Tensor
    """(d,)."""
    basis: Tensor
    """(d, r)."""
    domains: Tensor
    """(m,) sources, -1 where unknown."""
    tokens: Tensor
    """(n, k) coordinates of the sampled tokens."""
    last: LastDetection | None


class ClusterSearch:
    """Block i is worked on by rank i mod their number; :meth:`results` brings everybody's together."""

    def __init__(self, config: MocteConfig, work: Mapping[int, Documents], in_background: bool, axis: Axis) -> None:
        """Start the search.

        Args:
            config: the "mocte" block.
            work: by block, the same on all ranks.
            in_background: in a thread; False: when the results are asked for.
            axis: the ranks that share the work.
        """
        self._axis = axis
        mine = {block: documents for block, documents in work.items() if block % axis.size == axis.rank}
        self._results: Callable[[], dict[int, ClusterFacts]] = partial(_search, config, mine)
        if in_background:
            pool = ThreadPoolExecutor(1, thread_name_prefix="clusters")
            self._results = pool.submit(_search, config, mine).result
            pool.shutdown(wait=False)

    def results(self) -> dict[int, ClusterFacts]:
        """By block (collective; waits for the thread).

        Raises:
            MocteError: the search failed on some rank; on all of them, so that none waits for another.
        """
        mine: dict[int, ClusterFacts] | str
        try:
            mine = self._results()
        except MocteError as error:
            mine = str(error)
        except Exception as error:
            mine = f"the search for clusters failed: {type(error).__name__}: {error}"
        found: dict[int, ClusterFacts] = {}
        for part in gather_objects(mine, self._axis):
            if isinstance(part, str):
                raise MocteError(part)
            found.update(part)
        return found


def _search(config: MocteConfig, work: Mapping[int, Documents]) -> dict[int, ClusterFacts]:
    found = {}
    for block, documents in work.items():
        with FlopCount() as count:
            facts = find_clusters(config, documents)
        found[block] = replace(facts, flops=count.total + _distance_flops(documents, facts))
    return found


def _distance_flops(documents: Documents, facts: ClusterFacts) -> int:
    """Distances between all pairs: of tokens once; of documents for neighbours, each radius and the silhouette.

    An upper bound: search trees leave some out.
    """
    tokens, (m, r) = documents.tokens, documents.coordinates.shape
    passes = len(facts.detection.sensitivity) + 2
    looked = min(len(tokens), PUBLISHED_POINTS)
    return 3 * (passes * m * m * r + looked * looked * tokens.shape[1])


def find_clusters(config: MocteConfig, documents: Documents) -> ClusterFacts:
    """Detect clusters, and compare them with those that the last check detected, on today's documents.

    Both label the same documents, with today's features; so no second forward over a probe set is needed. How many
    experts there will be does not enter. Deterministic, and without a collective.
    """
    started, z = time.perf_counter(), documents.coordinates
    found = detect(z, config.clusters.min_silhouette, method=config.clusters.method)
    clusters = balanced_kmeans(z, config.num_experts, config.seed)
    stable, clear = None, found.labels >= 0
    if documents.last is not None and found.count > 1:
        # Today's documents as the last check would have seen them: its mean, its basis, its documents.
        before = documents.last.assign(z[clear] @ documents.basis.T + documents.mean)
        stable = stability(before, found.labels[clear])
    known = documents.domains >= 0
    agree = agreement(clusters.labels[known], documents.domains[known]) if bool(known.any()) else None
    published = published_line(documents.tokens)
    return ClusterFacts(found, clusters, stable, agree, published, time.perf_counter() - started)
