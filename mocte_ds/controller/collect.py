"""Collects, in the ordinary forward passes, the features that a check reads: single tokens and means of documents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mocte_ds.controller.feature_sample import TokenRows
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import MocteError
from mocte_ds.moe.forward import ForwardState, documents_of
from mocte_ds.spectrum.sample import Choice, Reservoir, Selection, Update, hash_keys

# A shorter stretch of a document says more about its last words than about its source.
MIN_DOCUMENT_TOKENS = 16
_POSITIONS = 1 << 24
_FACTS = 4

# Shapes: B sequences of T tokens with d features, D documents in them.


@dataclass(frozen=True)
class _Batch:
    """The part of a micro-batch that belongs to the sample, without padding; the same for all blocks."""

    real: Tensor | None
    """(B * T,) bool, False for padding; None: there is none. Rows below are those of real tokens."""
    tokens: Update | None
    documents: Update | None
    document: Tensor
    """(rows,) number of each token's document in the micro-batch."""
    lengths: Tensor
    """(D,) tokens of each document."""


class SampleStream:
    """Which tokens and documents of the stream of micro-batches are sampled: decided once for all blocks.

    Token ids and sources of what is sampled are kept here too. Blocks take their rows one after the other; the first
    one that is ready for the next micro-batch makes the stream move on.
    """

    def __init__(
        self, rows: int, documents: int, seed: int, eod_id: int | None, axis: Axis, doublings: int = 0
    ) -> None:
        """Nothing is sampled yet.

        Args:
            rows: token features of a sample over all ranks.
            documents: document means kept over all ranks.
            seed: seed of the sampling hash.
            eod_id: token that ends a document.
            axis: the ranks that sample together.
            doublings: how often the sample may be doubled; rows are kept for that.
        """
        self.sample_rows, self._axis = rows, axis
        self.tokens = Selection(rows << doublings, seed, axis.size)
        self.documents = Selection(documents, seed, axis.size)
        self.token_facts = Reservoir(1, _FACTS, seed, torch.int64, selection=self.tokens)
        """Id and source of each sampled token, the id before it in its document, and the document's number in the run;
        -1 where unknown."""
        self.document_facts = Reservoir(1, 1, seed, torch.int64, selection=self.documents)
        """Source of each sampled document."""
        self.version = 0
        """Micro-batches so far."""
        self._seed, self._eod_id = seed, eod_id
        self._batch: _Batch | None = None
        self._marked: tuple[int, _Batch | None] = 0, None

    @torch.no_grad()
    def batch(self, version: int, state: ForwardState, shape: tuple[int, int], device: torch.device) -> _Batch:
        """The micro-batch that comes next for a block that has taken ``version`` of them.

        Raises:
            MocteError: the block left one out, so that its rows would not be those of the other blocks.
        """
        if version == self.version:
            self._batch = self._choose(state, *shape, device)
            self.version += 1
        if self._batch is None or version != self.version - 1:
            raise MocteError(
                f"a block has been called for {version} micro-batches and another one for {self.version}; blocks must "
                "run in every forward pass, or features cannot be sampled alike. Leave such modules out of "
                "mocte.modules."
            )
        return self._batch

    def choose_tokens(self, doubled: int = 0) -> Choice:
        """The token sample of all ranks, once for all blocks (collective).

        Args:
            doubled: how often it is doubled; a larger one holds the smaller one's rows.
        """
        return self.tokens.choose(self._axis, self.sample_rows << doubled)

    def choose_documents(self) -> Choice:
        """The document sample of all ranks, once for all blocks (collective)."""
        return self.documents.choose(self._axis)

    def clear(self) -> None:
        """Forget everything, so that the next check reads the features of its own weights."""
        self.token_facts.clear()
        self.document_facts.clear()
        self.version, self._batch = 0, None

    def mark(self) -> None:
        """Remember the sample, for :meth:`take_back`."""
        self._marked = self.version, self._batch
        for part in (self.tokens, self.documents, self.token_facts, self.document_facts):
            part.mark()

    def take_back(self) -> None:
        """Forget the micro-batches since :meth:`mark`."""
        self.version, self._batch = self._marked
        for part in (self.tokens, self.documents, self.token_facts, self.document_facts):
            part.take_back()

    def _choose(self, state: ForwardState, batch: int, length: int, device: torch.device) -> _Batch:
        known = state.tokens((batch, length, 1))
        sequence, place, real = state.places((batch, length, 1), device)
        ids = before = torch.full((batch, length), -1, device=device)
        if known.ids is not None:
            ids, before = known.ids.to(device), known.before(keep=False).to(device)
        domain = state.domain.to(device) if state.domain is not None else torch.full((batch,), -1, device=device)
        source = domain[:, None].expand(batch, length)
        document = documents_of(known, real, device)
        within = document - document[:, :1]
        flat = [sequence, place, ids, before, source, document, within]
        rows = [t.reshape(-1) for t in flat] if real is None else [t[real] for t in flat]
        sequence, place, ids, before, source, document, within = rows
        tokens = self.tokens.offer(hash_keys(sequence, place, self._seed))
        numbers = hash_keys(sequence, _POSITIONS + within, self._seed)
        self.token_facts.apply(torch.stack([ids, source, before, numbers], dim=1), tokens)

        # Some numbers may have no token: those of sequences that are padding alone.
        number, row, lengths = _first_of_each(document)
        keys = hash_keys(sequence[row], _POSITIONS + within[row], self._seed)
        enough = (lengths >= MIN_DOCUMENT_TOKENS).nonzero()[:, 0]
        documents = self.documents.offer(keys[enough])
        if documents is not None:
            documents = Update(enough[documents.take], documents.slots)
        self.document_facts.apply(source[row][:, None], documents)
        return _Batch(None if real is None else real.reshape(-1), tokens, documents, number, lengths)

    def state_dict(self) -> dict[str, Any]:
        """Plain values of this rank, for a checkpoint between two checks."""
        return {
            "version": self.version,
            "tokens": self.tokens.state_dict(),
            "documents": self.documents.state_dict(),
            "token_facts": self.token_facts.state_dict(),
            "document_facts": self.document_facts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.version, self._batch = state["version"], None
        for name in ("tokens", "documents", "token_facts", "document_facts"):
            getattr(self, name).load_state_dict(state[name])
        # Checkpoints of older versions do not know the ids before and the documents.
        rows = self.token_facts.state_dict()["rows"]
        self.token_facts.load_state_dict({"rows": F.pad(rows, (0, _FACTS - rows.shape[1]), value=-1)})


def _first_of_each(document: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) document of each row, counted without gaps; (D,) first row and (D,) number of rows of each document."""
    if not len(document):
        return document, document, document
    change = torch.ones_like(document, dtype=torch.bool)
    change[1:] = document[1:] != document[:-1]
    number = change.long().cumsum(0) - 1
    return number, change.nonzero()[:, 0], torch.bincount(number)


class FeatureCollector:
    """The sampled features of one block on this rank, the same rows however many ranks share the batch."""

    def __init__(self, hidden_size: int, stream: SampleStream) -> None:
        """Make empty reservoirs.

        Args:
            hidden_size: d.
            stream: shared by all blocks of the model.
        """
        self._stream, self._version, self._marked = stream, 0, 0
        self._tokens = Reservoir(1, hidden_size, 0, selection=stream.tokens)
        self._documents = Reservoir(1, hidden_size, 0, selection=stream.documents)

    @torch.no_grad()
    def see(self, features: Tensor, state: ForwardState) -> None:
        """Take the sampled rows of one micro-batch.

        Args:
            features: (B, T, d), or (T, d) for one sequence.
            state: of the pass: token ids, padding, sources and place in the run.
        """
        if features.dim() == 2:
            ids = state.ids
            shape: tuple[int, ...] = (1, len(features))
            if ids is not None and ids.dim() == 2 and ids.numel() == len(features):
                shape = tuple(ids.shape)
            features = features.view(*shape, -1)
        batch, length, width = features.shape
        wanted = self._stream.batch(self._version, state, (batch, length), features.device)
        self._version += 1
        flat = features.reshape(-1, width)
        if wanted.real is not None:
            flat = flat[wanted.real]
        self._tokens.apply(flat, wanted.tokens)
        if wanted.documents is not None:
            sums = torch.zeros(len(wanted.lengths), width, device=flat.device)
            sums.index_add_(0, wanted.document, flat.float())
            self._documents.apply(sums / wanted.lengths[:, None], wanted.documents)

    def tokens(self, choice: Choice | None = None) -> TokenRows:
        """This rank's share of the token sample.

        Args:
            choice: of the stream's tokens, made since the last forward pass; None: made here (collective).
        """
        choice = self._stream.choose_tokens() if choice is None else choice
        facts = self._stream.token_facts.chosen_rows(choice)
        return TokenRows(self._tokens.chosen_rows(choice), *facts.unbind(1))

    def documents(self, choice: Choice | None = None) -> tuple[Tensor, Tensor]:
        """This rank's share of the document sample: means (m, d) and their sources (m,), -1 where unknown.

        Args:
            choice: of the stream's documents, as for :meth:`tokens`.
        """
        choice = self._stream.choose_documents() if choice is None else choice
        return self._documents.chosen_rows(choice), self._stream.document_facts.chosen_rows(choice)[:, 0]

    def clear(self) -> None:
        """Forget everything; the stream forgets with it."""
        self._tokens.clear()
        self._documents.clear()
        self._version = 0

    def mark(self) -> None:
        """Remember the rows, for :meth:`take_back`; the stream remembers which they are."""
        self._marked = self._version
        self._tokens.mark()
        self._documents.mark()

    def take_back(self) -> None:
        """Forget the micro-batches since :meth:`mark`."""
        self._version = self._marked
        self._tokens.take_back()
        self._documents.take_back()

    def state_dict(self) -> dict[str, Any]:
        """This rank's rows, for a checkpoint between two checks."""
        rows = {"tokens": self._tokens.state_dict(), "documents": self._documents.state_dict()}
        return {"version": self._version, **rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._version = state["version"]
        self._tokens.load_state_dict(state["tokens"])
        self._documents.load_state_dict(state["documents"])
