"""How well a model predicts texts: bits per byte by domain, loss by place, calibration, and which experts read them."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.data import read_corpus
from mocte_ds.dist.collectives import sum_over_ranks
from mocte_ds.evaluation.routes import banks, routes
from mocte_ds.text_table import brief

Windows = Iterator[tuple[list[int], list[int]]]

LEVELS = 10
"""Bins of equal width that the probability of the likeliest token falls into."""


def score_corpus(model: Any, folder: str | Path, limit: int | None, batch_size: int) -> dict[str, dict[str, Any]]:
    """Score the texts of a corpus (collective where several ranks run).

    Args:
        model: a :class:`mocte_ds.evaluation.harness_models.RankedLM`.
        folder: with a file, or a folder of files, for each domain.
        limit: documents of each domain; None: all.
        batch_size: sequences of a forward.

    Returns:
        As of :func:`score_texts`.

    Raises:
        DataError: no such folder, files that cannot be read, or a domain without any text.
    """
    texts = {name: itertools.islice(found, limit) for name, found in read_corpus(folder).items()}
    return score_texts(model, texts, batch_size)


def score_texts(model: Any, domains: Mapping[str, Iterable[str]], batch_size: int) -> dict[str, dict[str, Any]]:
    """Score texts, each by itself, after the token that begins a text (collective).

    A text that is longer than the context is cut into windows that follow each other; the first token of a later one is
    predicted from the last token before it. lm-eval's rolling log-likelihood fills its last window up with tokens that
    were scored before, so that the sums agree for texts of whole windows only.

    Args:
        model: as of :func:`score_corpus`.
        domains: texts by domain, at least one of each; the same on all ranks.
        batch_size: sequences of a forward.

    Returns:
        For each domain: "documents", "tokens", "bytes", "bits_per_byte" (nats of all tokens, over ln 2
        and the UTF-8 bytes), "nats_per_token", "by_position": for places 0, 1, 2 to 3, 4 to 7, ... in the window
        {"first", "last", "tokens", "nats_per_token"}, and of the likeliest token at each place "accuracy",
        "by_probability": for each of LEVELS bins that has tokens {"tokens", "probability", "accuracy"} (means), and
        "calibration_error": the mean of |accuracy - probability| over bins, weighted by tokens (Guo et al., 2017,
        equation 3); of a model with blocks of experts "load": by bank the share of the choices that each expert got.
    """
    names = sorted(domains)
    bins = max(1, model.max_length).bit_length() + 1
    sums = torch.zeros(len(names), bins, dtype=torch.float64)
    counts, sizes = torch.zeros(len(names), bins, dtype=torch.int64), torch.zeros(len(names), 2, dtype=torch.int64)
    levels = torch.zeros(len(names), LEVELS, 3, dtype=torch.float64)
    replicas, network = model.replicas, getattr(model, "model", None)
    held = {} if network is None else banks(network)
    loads = {bank: torch.zeros(len(names), len(part.experts), dtype=torch.int64) for bank, part in held.items()}
    for row, name in enumerate(names):
        mine = itertools.islice(domains[name], replicas.number, None, replicas.count)
        windows: list[tuple[list[int], list[int]]] = []
        for text in mine:
            if replicas.place == 0:
                sizes[row] += torch.tensor([1, len(text.encode("utf-8", "surrogatepass"))])
            windows += _windows(
                model.tok_encode(text, add_special_tokens=False), model.prefix_token_id, model.max_length
            )
            while len(windows) >= batch_size:
                _add(model, windows[:batch_size], sums[row], counts[row], levels[row], _of_row(loads, row))
                del windows[:batch_size]
        if windows:
            _add(model, windows, sums[row], counts[row], levels[row], _of_row(loads, row))
    if replicas.place != 0:  # the ranks of a replica have seen the same texts
        for seen in (sums, counts, levels, *loads.values()):
            seen.zero_()
    sums, counts, levels, sizes = (sum_over_ranks(t, replicas.world) for t in (sums, counts, levels, sizes))
    loads = {bank: sum_over_ranks(load, replicas.world) for bank, load in loads.items()}
    return {
        name: {
            **_facts(sums[i], counts[i], sizes[i], model.max_length),
            **_calibration(levels[i]),
            **(
                {"load": {bank: (load[i] / load[i].sum().clamp(min=1)).tolist() for bank, load in loads.items()}}
                if loads
                else {}
            ),
        }
        for i, name in enumerate(names)
        if sizes[i, 0]
    }


def _windows(ids: list[int], begin: int, length: int) -> Windows:
    """Inputs and the tokens that follow them, at most so many at once."""
    before = [begin, *ids]
    for start in range(0, len(ids), length):
        yield before[start : start + length], ids[start : start + length]


def _of_row(loads: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {bank: load[row] for bank, load in loads.items()}


@torch.no_grad()
def _add(
    model: Any,
    windows: list[tuple[list[int], list[int]]],
    sums: Tensor,
    counts: Tensor,
    levels: Tensor,
    loads: Mapping[str, Tensor],
) -> None:
    """Add some windows' losses to the bins of their places, likeliest tokens to those of probability, and loads."""
    longest = max(len(inputs) for inputs, _ in windows)
    inputs = torch.zeros(len(windows), longest, dtype=torch.int64)
    labels = torch.full_like(inputs, -100)
    for row, (before, after) in enumerate(windows):
        inputs[row, : len(before)], labels[row, : len(after)] = torch.tensor(before), torch.tensor(after)
    # Padding stands after the texts, where causal attention and routing do not look.
    real = (labels != -100).flatten()
    with routes(model.model if loads else nn.Module()) as chosen:
        logits = model._model_call(inputs.to(model.device)).flatten(0, 1)[real.to(model.device)].float()
    for bank, load in loads.items():
        load += torch.bincount(chosen[bank].cpu()[real].flatten(), minlength=len(load))
    after = labels.flatten()[real].to(logits.device)
    losses = F.cross_entropy(logits, after, reduction="none").double().cpu()
    bins = _bin(torch.arange(longest)).expand_as(labels).flatten()[real]
    sums.index_add_(0, bins, losses)
    counts.index_add_(0, bins, torch.ones_like(bins))
    best, likeliest = logits.max(dim=-1)
    probability, right = (best - logits.logsumexp(dim=-1)).exp(), likeliest == after
    seen = torch.stack([torch.ones_like(probability), probability, right.to(probability)], dim=1).double().cpu()
    levels.index_add_(0, (seen[:, 1] * LEVELS).long().clamp(0, LEVELS - 1), seen)  # NaN counts too


def _bin(place: Tensor) -> Tensor:
    """0, 1, 2 to 3, 4 to 7, ... become 0, 1, 2, 3, ..."""
    edges = 2 ** torch.arange(63)
    return torch.bucketize(place, edges, right=True)


def _facts(sums: Tensor, counts: Tensor, sizes: Tensor, length: int) -> dict[str, Any]:
    tokens, documents, size = int(counts.sum()), int(sizes[0]), int(sizes[1])
    nats = float(sums.sum())
    places = []
    for number, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
        if count:
            first = 0 if number == 0 else 2 ** (number - 1)
            last = min(length - 1, max(0, 2**number - 1))
            places.append({"first": first, "last": last, "tokens": count, "nats_per_token": total / count})
    return {
        "documents": documents,
        "tokens": tokens,
        "bytes": size,
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / max(1, tokens),
        "by_position": places,
    }


def _calibration(levels: Tensor) -> dict[str, Any]:
    """What (LEVELS, 3) tokens, their probabilities and how many were right come to."""
    tokens, _, right = levels.sum(0).tolist()
    tokens = max(1.0, tokens)
    bins = [
        {"tokens": int(count), "probability": p / count, "accuracy": hits / count}
        for count, p, hits in levels.tolist()
        if count
    ]
    error = sum(abs(p - hits) for _, p, hits in levels.tolist()) / tokens
    return {"accuracy": right / tokens, "by_probability": bins, "calibration_error": error}


def largest_load(load: Mapping[str, list[float]]) -> float:
    """The busiest expert's share over an even one, mean over the banks."""
    return sum(len(shares) * max(shares) for shares in load.values()) / len(load)


def texts_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Domains as lines to read, and the loss by place over all of them."""
    wide = max([len(name) for name in found] + [12]) + 2
    head = f"{'domain':<{wide}}{'documents':>10}{'bytes':>12}{'bits/byte':>11}{'nats/token':>12}"
    routed = any("load" in facts for facts in found.values())
    lines = [head + f"{'accuracy':>10}{'calib. error':>14}" + (f"{'largest load':>14}" if routed else "")]
    for name, facts in found.items():
        numbers = f"{facts['bits_per_byte']:>11.4f}{facts['nats_per_token']:>12.4f}"
        numbers += f"{facts['accuracy']:>10.4f}{facts['calibration_error']:>14.4f}"
        numbers += f"{brief(largest_load(facts['load'])):>14}" if routed else ""
        lines.append(f"{name:<{wide}}{facts['documents']:>10,}{facts['bytes']:>12,}{numbers}")
    places: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for facts in found.values():
        for place in facts["by_position"]:
            places.setdefault((place["first"], place["last"]), []).append((place["tokens"], place["nats_per_token"]))
    lines += ["", f"{'place':<{wide}}{'tokens':>10}{'nats/token':>12}"]
    for (first, last), parts in sorted(places.items()):
        tokens = sum(count for count, _ in parts)
        mean = sum(count * nats for count, nats in parts) / tokens
        lines.append(f"{(str(first) if first == last else f'{first}-{last}'):<{wide}}{tokens:>10,}{mean:>12.4f}")
    return "\n".join(lines)
