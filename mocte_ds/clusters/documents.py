"""From clusters of documents to a table that reads a document's cluster from its tokens."""

import torch
from torch import Tensor

from mocte_ds.clusters.balance import balanced_kmeans
from mocte_ds.clusters.prices import even_prices

_EVEN, _SWEEPS, _ROUNDS = 0.01, 20, 20
# Scores (documents or tokens times clusters) above which prices are moved in fewer sweeps.
_LARGE, _FEW_SWEEPS = 1 << 18, 3
# Documents that are read from their beginning to see what loads tokens give, and how many tokens of each.
_READ, _TOKENS = 256, 64

# Shapes: n sampled tokens of D documents, r directions, E clusters, V token ids, S ids that were sampled.


def document_scores(
    token_ids: Tensor, documents: Tensor, coordinates: Tensor, vocab_size: int, count: int, seed: int
) -> Tensor:
    """How much each token id speaks for each cluster of documents.

    Documents are clustered by the mean of their sampled features. From there a mixture of unigrams is fitted with even
    clusters (classification EM: Celeux and Govaert, 1992; the mixture: Nigam et al., 2000, "Text classification from
    labeled and unlabeled documents using EM"), so that clusters are those that tokens can tell apart.

    Args:
        token_ids: (n,) int64 ids of the sampled tokens.
        documents: (n,) int64, the same number for tokens of one document; -1: unknown, and the token is left out.
        coordinates: (n, r) their features in the leading directions.
        vocab_size: V.
        count: E.
        seed: of the clusters, and of the scores where fewer documents than clusters were sampled.

    Returns:
        (V, E) fp32: logarithm of the id's frequency in each cluster less the mean over the clusters, plus what evens
        out the tokens of the clusters while documents are read. An id that was not sampled speaks for none.
    """
    known = documents >= 0
    token_ids, coordinates = token_ids[known], coordinates[known]
    numbers, document = documents[known].unique(return_inverse=True)
    if len(numbers) < count:
        return random_scores(vocab_size, count, seed)
    seen, word = token_ids.unique(return_inverse=True)
    length = torch.bincount(document).double()
    sums = torch.zeros(len(numbers), coordinates.shape[1], dtype=torch.float64)
    means = sums.index_add_(0, document, coordinates.double()) / length[:, None]
    labels = balanced_kmeans(means, count, seed, mass=length).labels
    cells, ones = torch.stack([document, word]), torch.ones(len(word), dtype=torch.float64)
    counts = torch.sparse_coo_tensor(cells, ones, (len(numbers), len(seen)), check_invariants=True).coalesce()
    prices = torch.zeros(count, dtype=torch.float64)
    for _ in range(_ROUNDS):
        speaks = _log_frequencies(word, labels[document], len(seen), count)
        mean_score = torch.sparse.mm(counts, speaks) / length[:, None]
        prices = _even(mean_score, length, prices)
        new = (mean_score + prices).argmax(dim=1)
        if torch.equal(new, labels):
            break
        labels = new
    half = _halves(labels, seed)
    held_out = torch.stack(
        [
            _log_frequencies(word[half[document] != h], labels[document[half[document] != h]], len(seen), count)
            for h in (0, 1)
        ]
    )
    prices = _reading_prices(held_out, half, word, document, length, seed)
    table = prices.repeat(vocab_size, 1)
    table[seen] += speaks
    return table.float()


def shuffled_scores(scores: Tensor, token_ids: Tensor, documents: Tensor, seed: int) -> Tensor:
    """The control: the scores of the sampled ids dealt out to other ids, and prices that even out the loads again.

    What is read is then constant within a document as before, but for the noise of its first tokens. Documents with the
    same words still go together, so that it is not wholly by chance. In documents much longer than the sampled parts
    loads are less even.

    Args:
        scores: (V, E).
        token_ids: as of :func:`document_scores`.
        documents: as there.
        seed: of the deal.

    Returns:
        (V, E) fp32.
    """
    known = documents >= 0
    if not bool(known.any()):
        return scores
    seen, word = token_ids[known].unique(return_inverse=True)
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    table = scores.double().clone()
    table[seen] = table[seen[order]]
    document = documents[known].unique(return_inverse=True)[1]
    length = torch.bincount(document).double()
    half = torch.zeros(len(length), dtype=torch.int64)
    return (table + _reading_prices(table[seen][None], half, word, document, length, seed)).float()


def random_scores(vocab_size: int, count: int, seed: int) -> Tensor:
    """(V, E) normal scores by chance."""
    return torch.randn(vocab_size, count, generator=torch.Generator().manual_seed(seed))


def _log_frequencies(word: Tensor, cluster: Tensor, words: int, count: int) -> Tensor:
    """(S, E) fp64 log of each id's frequency in each cluster, less its mean over the clusters.

    Frequencies are drawn to those of all clusters together, as if each cluster had seen one more token per id (Zhai and
    Lafferty, 2004, Dirichlet smoothing): an id that was sampled once says little.
    """
    each = torch.bincount(word * count + cluster, minlength=words * count).double().view(words, count)
    usual = each.sum(dim=1, keepdim=True) / each.sum()
    speaks = ((each + words * usual) / (each.sum(dim=0) + words)).log()
    # An id without tokens here speaks for none.
    return torch.where(usual > 0, speaks - speaks.mean(dim=1, keepdim=True), 0.0)


def _halves(labels: Tensor, seed: int) -> Tensor:
    """(D,) 0 or 1 of each document, by chance and each half of a cluster's documents, to one."""
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    half = torch.empty_like(labels)
    half[mixed[labels[mixed].argsort(stable=True)]] = torch.arange(len(labels)) % 2
    return half


def _reading_prices(speaks: Tensor, half: Tensor, word: Tensor, document: Tensor, length: Tensor, seed: int) -> Tensor:
    """(E,) prices under which the clusters get as many tokens while documents are read from their beginning.

    A document is read with scores that its own tokens are not in: with those its cluster is so far ahead that prices
    can grow until they, and no tokens, decide where new documents go. The first tokens of a document say little, and
    whoever wins them wins them in all documents. In a mixture of unigrams every order of a document's tokens is as
    likely, so that documents are read in drawn ones.

    Args:
        speaks: (H, S, E) scores of the sampled ids to read a document of each half with.
        half: (D,) below H, of each document.
        word: (n,) number of each token's id.
        document: (n,) number of its document.
        length: (D,) fp64 tokens of each.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    words = word[(document * speaks.shape[1] + word).argsort()]
    some = torch.randperm(len(length), generator=generator)[:_READ]
    start, draws = length.cumsum(0) - length, torch.rand(len(some), _TOKENS, generator=generator, dtype=torch.float64)
    places = (start[some, None] + (draws * length[some, None]).floor()).long()
    so_far = speaks[half[some, None], words[places]].cumsum(dim=1) / torch.arange(1, _TOKENS + 1)[None, :, None]
    mass = length[some, None].expand(-1, _TOKENS).reshape(-1)
    return _even(so_far.flatten(0, 1), mass, torch.zeros(speaks.shape[2], dtype=torch.float64))


def _even(mean_score: Tensor, mass: Tensor, prices: Tensor) -> Tensor:
    """(E,) prices under which each cluster wins as much of the mass (D,) by scores (D, E)."""
    # even_prices scores 2 z C^T - |C|^2; with C = 1 that is the score less the same number for all.
    one, sweeps = torch.eye(len(prices), dtype=torch.float64), _SWEEPS if mean_score.numel() <= _LARGE else _FEW_SWEEPS
    return even_prices(mean_score / 2, mass, one, prices, False, _EVEN, sweeps)
