"""Batches from prepared data. The state is the number of sequences read, which decides what each rank reads."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mocte_ds.data.manifest import Manifest, open_indexed, prefix
from mocte_ds.data.stored_tokenizer import tokenizer_in
from mocte_ds.data.verify import Amount, require_ids
from mocte_ds.errors import DataError

# Length of the pattern in which domains follow each other; weights are rounded to multiples of 1/_PERIOD.
_PERIOD = 1024


class PackedDomain:
    """Sequences of one domain: documents in an order that changes with every epoch, packed without gaps.

    Megatron-core's GPTDataset fixes the number of sequences, and with it the orders, when it is built; here the number
    is open, so that a run can be prolonged, and the order of an epoch follows from the seed alone. Tokens stay
    memory-mapped; in memory are lengths and orders, some 40 bytes per document.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        domain: str,
        split: str,
        context: int,
        seed: int,
        verify: Amount | None = "auto",
    ) -> None:
        """Open the indexed data.

        Args:
            folder: prepared data.
            manifest: of the folder.
            domain: its name.
            split: `train` or `validation`.
            context: tokens of a sequence; a sample holds one more, for the labels.
            seed: of the orders.
            verify: see :func:`mocte_ds.data.manifest.open_indexed`.

        Raises:
            DataError: files are missing or damaged, or hold fewer tokens than one sample.
        """
        self._data, self._context = open_indexed(folder, manifest, domain, split, verify), context
        self._name, self._vocab_size = f"{prefix(folder, domain, split)}.bin", manifest.vocab_size
        self._lengths = np.asarray(self._data.sequence_lengths, dtype=np.int64)
        self._key = [seed, *domain.encode(), len(split)]
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.tokens = int(self._lengths.sum())
        self.samples = (self.tokens - 1) // context
        if self.samples < 1:
            raise DataError(
                f"domain '{domain}' of {folder} has {self.tokens} {split} tokens, fewer than one sequence of {context} "
                "+ 1; take a shorter context, add text, or give the domain the weight 0."
            )

    def __getitem__(self, number: int) -> np.ndarray:
        """Sample ``number`` (any number; epochs follow each other): (context + 1,) int64.

        Raises:
            DataError: a token id outside of the vocabulary: the file was changed after it was opened.
        """
        epoch, place = divmod(number, self.samples)
        documents, ends, order = self._epoch(epoch)
        start = int(order[place]) * self._context
        parts, missing = [], self._context + 1
        at = int(np.searchsorted(ends, start, side="right"))
        offset = start - (int(ends[at - 1]) if at else 0)
        while missing:
            document = int(documents[at])
            length = min(missing, int(self._lengths[document]) - offset)
            parts.append(self._data.get(document, offset=offset, length=length))
            missing, offset, at = missing - length, 0, at + 1
        sample = np.concatenate(parts)
        require_ids(sample, self._vocab_size, self._name)
        return sample.astype(np.int64)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the documents, their cumulated lengths, and the order of the samples."""
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # reading goes forward, with neighbours around the end of an epoch
                self._epochs.pop(next(iter(self._epochs)))
            generator = np.random.default_rng([*self._key, epoch])
            documents = generator.permutation(len(self._lengths))
            self._epochs[epoch] = documents, np.cumsum(self._lengths[documents]), generator.permutation(self.samples)
        return self._epochs[epoch]


class BlendedLoader:
    """Micro-batches of one rank from all domains, by weight.

    Global sequence p is the same whatever the number of ranks and micro-batches. Accumulation step g of rank r takes
    the sequences position + (g * world_size + r) * micro_batch + [0, micro_batch).
    """

    def __init__(
        self,
        prepared: str | Path,
        split: str,
        context: int,
        batch_size: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        seed: int = 0,
        weights: dict[str, float] | None = None,
        position: int = 0,
        verify: Amount | None = "auto",
        left_out: Sequence[int] = (),
    ) -> None:
        """Open prepared data.

        Args:
            prepared: folder made by tools/prepare_data.py.
            split: `train` or `validation`.
            context: tokens of a sequence.
            batch_size: sequences of a global batch (an optimizer step).
            rank: this data-parallel rank.
            world_size: data-parallel ranks.
            micro_batch: sequences of a micro-batch on one rank.
            seed: of all orders.
            weights: share of each domain, any scale; a domain that is not named gets nothing. None: by tokens.
            position: global sequences already consumed.
            verify: how much is held against its hashes; None: nothing, since that was done already.
            left_out: positions at which the global batches begin that are passed over.

        Raises:
            DataError: sizes that do not fit together, unknown or negative weights, too little text, damaged files, or a
                tokenizer that is not the one the data was prepared with.
        """
        for name, value in {"context": context, "micro_batch": micro_batch, "batch_size": batch_size}.items():
            if value < 1:
                raise DataError(f"{name} = {value} must be 1 or more.")
        if not 0 <= rank < world_size:
            raise DataError(f"rank = {rank} must be one of the {world_size} ranks from 0.")
        if batch_size % (world_size * micro_batch):
            raise DataError(
                f"a global batch of {batch_size} sequences is not a multiple of {world_size} ranks x {micro_batch} "
                "sequences of a micro-batch."
            )
        if seed < 0:
            raise DataError(f"seed = {seed} must be 0 or more.")
        folder = Path(prepared)
        self.manifest = Manifest.read(folder)
        self.manifest.require_tokenizer(tokenizer_in(folder))
        self.domains = sorted(self.manifest.domains)
        for domain in weights or {}:
            if domain not in self.domains:
                raise DataError(f"data.weights names the domain '{domain}', which is not among {self.domains}.")
        tokens = {domain: facts[split]["tokens"] for domain, facts in self.manifest.domains.items()}
        raw = [weights.get(d, 0.0) if weights else tokens[d] for d in self.domains]
        self._counts = _pattern_counts(np.asarray(raw, dtype=np.float64))
        self._sets = {
            number: PackedDomain(folder, self.manifest, domain, split, context, seed, verify)
            for number, domain in enumerate(self.domains)
            if self._counts[number]
        }
        self._patterns: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.batch_size, self.rank, self.world_size, self.micro_batch = batch_size, rank, world_size, micro_batch
        self.seed, self._left_out = seed, frozenset(left_out)
        self.seek(position)

    def seek(self, position: int) -> None:
        """Go on after ``position`` consumed global sequences.

        Raises:
            DataError: a negative position.
        """
        if position < 0:
            raise DataError(f"position = {position} must be 0 or more.")
        self.position = position

    def sequence(self, number: int) -> tuple[int, np.ndarray]:
        """Domain and tokens (context + 1,) of global sequence ``number``."""
        period, place = divmod(number, _PERIOD)
        pattern, ranks = self._pattern(period)
        domain = int(pattern[place])
        return domain, self._sets[domain][period * int(self._counts[domain]) + int(ranks[place])]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Endless micro-batches: input_ids and labels (micro_batch, context), domain (micro_batch,)."""
        while True:
            while self.position in self._left_out:
                self.position += self.batch_size
            for turn in range(self.batch_size // (self.world_size * self.micro_batch)):
                first = self.position + (turn * self.world_size + self.rank) * self.micro_batch
                found = [self.sequence(first + i) for i in range(self.micro_batch)]
                last = turn == self.batch_size // (self.world_size * self.micro_batch) - 1
                tokens = torch.from_numpy(np.stack([ids for _, ids in found]))
                if last:
                    self.position += self.batch_size
                yield {
                    "input_ids": tokens[:, :-1].contiguous(),
                    "labels": tokens[:, 1:].contiguous(),
                    "domain": torch.tensor([domain for domain, _ in found]),
                }

    def _pattern(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each place of a period, and how many places before it have the same domain."""
        if period not in self._patterns:
            if len(self._patterns) == 2:
                self._patterns.pop(next(iter(self._patterns)))
            pattern = np.repeat(np.arange(len(self._counts)), self._counts)
            np.random.default_rng([self.seed, 7, period]).shuffle(pattern)
            ranks = np.empty_like(pattern)
            for domain in range(len(self._counts)):
                mine = pattern == domain
                ranks[mine] = np.arange(mine.sum())
            self._patterns[period] = pattern, ranks
        return self._patterns[period]


def _pattern_counts(weights: np.ndarray) -> np.ndarray:
    """Places of each domain in a period: largest remainders, at least one for a positive weight."""
    if (weights < 0).any() or not np.isfinite(weights).all() or weights.sum() <= 0:
        raise DataError(f"data.weights must be positive numbers, not {weights.tolist()}.")
    exact = weights / weights.sum() * _PERIOD
    counts = np.maximum(np.floor(exact).astype(np.int64), (weights > 0).astype(np.int64))
    for domain in np.argsort(counts - exact, kind="stable")[: max(0, _PERIOD - counts.sum())]:
        counts[domain] += 1
    while counts.sum() > _PERIOD:
        counts[np.argmax(counts)] -= 1
    return counts


def validation_batches(
    prepared: str | Path, context: int, max_sequences: int, verify: Amount | None = "auto"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Fixed validation sequences of every domain.

    Args:
        prepared: folder made by tools/prepare_data.py.
        context: tokens of a sequence.
        max_sequences: at most so many of a domain (1 or more).
        verify: how much is held against its hashes; None: nothing, since that was done already.

    Returns:
        By domain: input_ids and labels, both (n, context). A domain without validation text is left out, and one with
        less than one sequence with a warning.

    Raises:
        DataError: no domain has a whole sequence, or files are missing or damaged.
    """
    result, folder = {}, Path(prepared)
    manifest = Manifest.read(folder)
    for domain, facts in sorted(manifest.domains.items()):
        tokens = facts["validation"]["tokens"]
        if not tokens:  # a cluster of training documents
            continue
        if tokens <= context:
            warnings.warn(
                f"domain '{domain}' is not validated: its {tokens} tokens are fewer than a sequence of {context} + 1.",
                stacklevel=2,
            )
            continue
        packed = PackedDomain(folder, manifest, domain, "validation", context, 0, verify)
        rows = torch.from_numpy(np.stack([packed[i] for i in range(min(max_sequences, packed.samples))]))
        result[domain] = (rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    if not result:
        raise DataError(
            f"no domain of {folder} has one validation sequence of {context} + 1 tokens; take a shorter context or a "
            "larger validation share."
        )
    return result
