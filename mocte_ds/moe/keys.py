"""Routing keys: what of a token decides its expert. Each reads features, token ids or the document up to the token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.errors import MocteError
from mocte_ds.moe.context import Tokens

# Shapes: B sequences of T tokens, n = B T rows, d features, E experts, V token ids.

# A table as a prior of a learned router: the logit of its expert over the others. science: +4 ties with a fixed table.
TABLE_LOGIT = 4.0


class Key(nn.Module):
    """A routing key: token ids, features and documents in, a choice or logits out. Nothing in it is trained."""

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n,) int64 expert of each token.

        Args:
            features: (n, d) fp32.
            tokens: what else is known of them.
        """
        return self.logits(features, tokens).argmax(dim=-1)

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(n, E) fp32; the largest one is the choice."""
        raise MocteError(f"{type(self).__name__} has no logits.")


class LinearKey(Key):
    """`token`: the nearest cluster of the token's own feature; `random`: the same with random directions.

    logits = 2 C V^T (h - mu) - |C|^2 + prices (docs/method.md, section 4), as an (E, d) matrix and an (E,) vector.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("cluster_weight", torch.zeros(num_experts, hidden_size))
        self.register_buffer("cluster_bias", torch.zeros(num_experts))

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Store the map: (E, d) and (E,)."""
        self.cluster_weight.copy_(weight)
        self.cluster_bias.copy_(bias)

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        return F.linear(features, self.cluster_weight, self.cluster_bias)


class PrefixKey(LinearKey):
    """`prefix`: the nearest cluster of the document's mean feature up to and with this token.

    The mean of linear logits is the logit of the mean, so E running sums a sequence are all the state: causal, the same
    in one pass or token by token, and each document of a packed sequence starts anew.
    """

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        own = super().logits(features, tokens)
        if tokens.document is None:
            return own
        batch, length = tokens.document.shape
        own = own.view(batch, length, -1)
        document = tokens.document.to(own.device)
        # Sums from the start of the sequence, less what stood there when the token's document began. In fp64: the
        # difference of two long sums must not depend on how far away the start is.
        sums = own.double().cumsum(dim=1)
        count = torch.arange(1, length + 1, device=own.device, dtype=torch.float64).expand(batch, length)
        first = torch.ones_like(document, dtype=torch.bool)
        first[:, 1:] = document[:, 1:] != document[:, :-1]
        place = torch.arange(length, device=own.device).expand(batch, length)
        start = torch.where(first, place, 0).cummax(dim=1).values
        padded = F.pad(sums, (0, 0, 1, 0))
        sums = sums - padded.gather(1, start[..., None].expand_as(sums))
        count = count - start
        if tokens.memory is not None:
            sums, count = self._carried(sums, count, start == 0, tokens)
        return (sums / count[..., None]).float().view(batch * length, -1)

    @staticmethod
    def _carried(sums: Tensor, count: Tensor, in_first: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Add what the last call left to each sequence's first document, and keep what this one leaves."""
        memory = tokens.memory
        if tokens.continues and "sums" in memory:
            if memory["sums"].shape[0] != sums.shape[0]:
                raise MocteError(
                    f"router.kind 'prefix' keeps a state for each of the {memory['sums'].shape[0]} sequences; "
                    f"generation went on with {sums.shape[0]}. Use greedy search or sampling, not beams."
                )
            going_on = in_first & ~memory["ended"][:, None]
            sums = sums + going_on[..., None] * memory["sums"][:, None]
            count = count + going_on * memory["count"][:, None]
        ended = torch.zeros(sums.shape[0], dtype=torch.bool, device=sums.device)
        if tokens.ids is not None and tokens.eod_id is not None:
            ended = tokens.ids[:, -1].to(sums.device) == tokens.eod_id
        memory.update(sums=sums[:, -1], count=count[:, -1], ended=ended)
        return sums, count


class TableKey(Key):
    """`type` and `hash`: a fixed table from the token's id to its expert, made of clusters or at random."""

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer("cluster_table", torch.zeros(vocab_size, dtype=torch.int64))

    def set(self, table: Tensor) -> None:
        """Store the table: (V,) expert of each token id."""
        self.cluster_table.copy_(table)

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        ids = tokens.ids
        if ids is None or ids.numel() != features.shape[0]:
            raise MocteError("a router by token ids needs them: call the model with input_ids=(batch, length).")
        return self.cluster_table[ids.reshape(-1).to(self.cluster_table.device)]

    def logits(self, features: Tensor, tokens: Tokens) -> Tensor:
        return TABLE_LOGIT * F.one_hot(self.choose(features, tokens), self.num_experts).float()


class PreviousKey(TableKey):
    """`previous`: a random table from the id of the token before; the first token of a document counts its own id."""

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        ids = tokens.ids
        if ids is None or tokens.document is None or ids.shape != tokens.document.shape:
            return super().choose(features, tokens)  # single rows: there is no token before
        before = torch.cat([ids[:, :1], ids[:, :-1]], dim=1)
        if tokens.continues and tokens.memory and "last" in tokens.memory:
            before = torch.cat([tokens.memory["last"][:, None], ids[:, :-1]], dim=1)
        if tokens.memory is not None:
            tokens.memory["last"] = ids[:, -1]
        if tokens.eod_id is not None:
            before = torch.where(before == tokens.eod_id, ids, before)
        return self.cluster_table[before.reshape(-1).to(self.cluster_table.device)]


KINDS = ("token", "type", "prefix", "previous", "hash", "random")
TABLES = ("type", "previous", "hash")


def make_key(kind: str, hidden_size: int, num_experts: int, vocab_size: int | None) -> Key:
    """An empty key of a kind (see :data:`KINDS`)."""
    if kind in TABLES:
        table = PreviousKey if kind == "previous" else TableKey
        return table(vocab_size or 0, num_experts)
    return PrefixKey(hidden_size, num_experts) if kind == "prefix" else LinearKey(hidden_size, num_experts)
