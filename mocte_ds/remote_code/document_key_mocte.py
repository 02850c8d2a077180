"""A routing key that reads what a document is about, in training and in an exported model; needs torch alone."""

from typing import Any

import torch
from torch import Tensor

from .keys_mocte import TableKey
from .tokens_mocte import Tokens

# Shapes: B sequences of T tokens, n = B T rows, E experts or groups of them, V token ids.


class DocumentKey(TableKey):
    """`document`: the cluster of documents for which the document's tokens so far speak most, this one included.

    A table holds for each id how much it speaks for each cluster: the logarithm of its frequency there (naive Bayes).
    The mean over the document so far decides, so that E running sums per sequence are all the state: causal, the same
    in one pass or token by token, and every document of a packed sequence begins anew.
    """

    remembers = True

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int | None = None, **settings: Any) -> None:
        super().__init__(hidden_size, num_experts, vocab_size, **settings)
        self.register_buffer("cluster_scores", torch.zeros(self.vocab_size, self.groups))

    def fit_table(self, birth: Any) -> None:
        scores = birth.scores_of_documents(self.vocab_size) if birth.tokens else birth.random_scores(self.vocab_size)
        self.set(scores)

    def set(self, scores: Tensor) -> None:
        """Store the table: (V, E) score of each token id for each cluster."""
        self.cluster_scores.copy_(scores)

    def renumber(self, order: Tensor) -> None:
        self.set(self.cluster_scores[:, order])

    def choose(self, features: Tensor, tokens: Tokens) -> Tensor:
        own = self.cluster_scores[self.ids(features, tokens).to(self.cluster_scores.device)]
        if tokens.begins is None:
            tokens.before()  # refuses rows that are not known to stand alone
            return own.argmax(dim=-1)
        mean = tokens.running_mean(self.name, own.view(*tokens.begins.shape, -1))
        return mean.view_as(own).argmax(dim=-1)
