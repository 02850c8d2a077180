"""Which documents are held out for validation: whole groups of near-duplicates, chosen by a hash of their text."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mocte_ds.data.duplicates import LinkFinder, Links
from mocte_ds.data.grams import GRAM, mixed
from mocte_ds.data.signatures import Signatures
from mocte_ds.errors import DataError

# Text in more documents than this is boilerplate and no longer links them, step by step, for a domain whose documents
# otherwise hang together so much that too few could be held out. 0: copies only.
_COMMON = (1000, 300, 100, 30, 10, 3, 0)


@dataclass
class Split:
    """What goes where, and what was found."""

    held_out: dict[str, np.ndarray]
    """By domain: (documents,) bool."""
    found: dict[str, dict[str, Any]]
    """By domain: numbers of documents that share text with another one ("documents"), of their "groups" and of the
    "largest" group's documents; "common": text in more documents than that did not count (null: all did)."""
    facts: dict[str, Any]
    """Of the whole search: "words" of a run, and the "kept_share" of their hashes."""


class Splitter:
    """Sees the signatures of all documents once, then splits."""

    def __init__(self, halvings: int = 0) -> None:
        """Look at hashes below 2^(64 - halvings) only."""
        self._finder = LinkFinder(halvings)
        self._domains: list[str] = []
        self._counts: list[int] = []

    def begin(self, domain: str) -> None:
        """The documents that follow are of this domain."""
        self._domains.append(domain)
        self._counts.append(0)

    def add(self, signatures: Signatures) -> None:
        """Take the next documents."""
        self._finder.add(signatures)
        self._counts[-1] += len(signatures.places)

    def split(self, share: float, names: dict[str, str]) -> Split:
        """Hold out about ``share`` of the documents of every domain, at least one.

        Near-duplicates stay together, also those in two domains. Groups of more than the share are trained on. The
        choice hangs on the text alone, so a document stays on its side when others come or go, as long as they are not
        near-duplicates of it.

        Args:
            share: 0 to 1.
            names: what messages call each domain.

        Raises:
            DataError: a domain cannot be split.
        """
        links = self._finder.links()
        groups = _Groups(links, self._finder.places(), np.asarray(self._counts), share)
        held_out = groups.held_out([names[domain] for domain in self._domains])
        ends = np.cumsum(self._counts)
        parts = np.split(held_out, ends[:-1])
        found = {domain: groups.found(number) for number, domain in enumerate(self._domains)}
        facts = {"words": GRAM, "kept_share": links.kept_share}
        return Split(dict(zip(self._domains, parts, strict=True)), found, facts)


class _Groups:
    """Groups of near-duplicates, and which of them may be held out. G groups, D domains, n documents."""

    def __init__(self, links: Links, places: np.ndarray, counts: np.ndarray, share: float) -> None:
        self._share, self._counts = share, counts
        self._owner = np.repeat(np.arange(len(counts)), counts)
        self.common = np.full(len(counts), np.inf)
        for common in (*_COMMON, None):
            self._label = links.groups(links.spread <= self.common[self._owner[links.document]])
            self._measure(places)
            # Four times what is to be held out, so that it is chosen and not just what is left.
            wanted = min(4 * share, (1 + share) / 2) * counts
            short = (self._free < wanted) & (self.common > 0)
            if common is None or not short.any():
                break
            self.common[short] = common

    def _measure(self, places: np.ndarray) -> None:
        """Sizes of groups by domain, whether each may be held out, and its place."""
        domains = len(self._counts)
        cells, sizes = np.unique(self._label * domains + self._owner, return_counts=True)
        self._cell_group, self._cell_domain, self._cell_size = cells // domains, cells % domains, sizes
        total = int(self._label.max(initial=-1)) + 1
        small = sizes <= np.maximum(1, self._share * self._counts)[self._cell_domain]
        self._eligible = np.ones(total, dtype=bool)
        self._eligible[self._cell_group[~small]] = False
        free = self._eligible[self._cell_group]
        self._free = np.bincount(self._cell_domain[free], sizes[free], minlength=domains)
        # One document stands for all, chosen by another hash: by the smallest place, large groups would win.
        order = np.lexsort((mixed(places), self._label))
        first = np.ones(len(order), dtype=bool)
        first[1:] = self._label[order[1:]] != self._label[order[:-1]]
        self._place = places[order[first]]

    def held_out(self, names: list[str]) -> np.ndarray:
        """(n,) bool."""
        chosen = self._eligible.copy()
        for domain, name in enumerate(names):
            mine = self._cell_group[self._cell_domain == domain]
            chosen[mine] &= self._place[mine] < self._threshold(domain, mine, name)
        for domain, name in enumerate(names):
            self._give_one(domain, chosen, name)
        return chosen[self._label]

    def _threshold(self, domain: int, mine: np.ndarray, name: str) -> np.uint64:
        """Groups of a domain with a smaller place are held out; neither side is left empty."""
        free = mine[self._eligible[mine]]
        if len(mine) < 2 or not len(free):
            raise DataError(
                f"{name}: one document (or copies of one) cannot be split into training and validation; cut it into "
                "several documents or add more."
            )
        # In powers of two, so that documents that come or go hardly ever move it.
        factor = 2.0 ** np.round(np.log2(self._counts[domain] / self._free[domain]))
        share = min(self._share * factor, max(self._share, 0.5))
        order = np.argsort(self._place[free])
        free, sizes = self._place[free[order]], self._documents(domain)[free[order]]
        # Chance may leave a small domain with hardly anything: at least half of what was asked for.
        least = int(np.searchsorted(np.cumsum(sizes), self._share * self._counts[domain] / 2))
        threshold = max(int(share * 2**64), int(free[min(least, len(free) - 1)]) + 1)
        if len(free) == len(mine):
            threshold = min(threshold, int(free[-1]))
        return np.uint64(min(threshold, 2**64 - 1))

    def _documents(self, domain: int) -> np.ndarray:
        """(G,) documents of a domain in each group."""
        mine = self._cell_domain == domain
        return np.bincount(self._cell_group[mine], self._cell_size[mine], minlength=len(self._place))

    def _give_one(self, domain: int, chosen: np.ndarray, name: str) -> None:
        """Hold out a group of a domain of which nothing is: its own first, else one that other domains share."""
        mine = self._cell_group[self._cell_domain == domain]
        if chosen[mine].any():
            return
        shared = np.bincount(self._cell_group, minlength=len(chosen))
        free = mine[self._eligible[mine]]
        for group in free[np.lexsort((self._place[free], shared[free]))]:
            trial = chosen.copy()
            trial[group] = True
            touched = self._cell_domain[self._cell_group == group]
            if not any(trial[self._cell_group[self._cell_domain == other]].all() for other in touched):
                chosen[group] = True
                return
        raise DataError(
            f"{name}: all of its documents are near-duplicates of other domains' documents, so none can be held out "
            "for validation; put them into one domain."
        )

    def found(self, domain: int) -> dict[str, Any]:
        """See :attr:`Split.found`."""
        total = np.bincount(self._cell_group, self._cell_size)
        mine = self._cell_domain == domain
        groups, sizes = self._cell_group[mine], self._cell_size[mine]
        several = total[groups] > 1
        common = self.common[domain]
        return {
            "documents": int(sizes[several].sum()),
            "groups": int(several.sum()),
            "largest": int(total[groups].max()),
            "common": None if np.isinf(common) else int(common),
        }
