"""How far the experts of a checkpoint have grown apart since they were born as copies of one FFN."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.names import EXPERT_NAME, EXPERT_PARAMETER
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.values import read_plain
from mocte_ds.ownership.manifest import Manifest
from mocte_ds.text_table import MISSING, text_table


def expert_likeness(checkpoint: str | Path) -> list[dict[str, Any]]:
    """Compare the weights of every two experts of each bank that has emerged.

    Hidden units are compared place by place. That is right for copies of one dense FFN; experts that were drawn
    independently (`expert.redraw: 1`) have no common order of units, and their cosines are near 0.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag; only read. One parameter
            of all experts of a bank is in memory at a time.

    Returns:
        A dict for each bank, in the order of the model: "block" (its name), "bank" (number), "experts" (E), "cosine"
        (E, E) between their weights as one vector each, and "apart" (E,), |w_e - m| / |m| with m the experts' mean: 0
        for equal experts.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    folder = find_tag(checkpoint)
    files = sorted(name for name in Manifest.read(folder).files if EXPERT_NAME.fullmatch(name))
    require_whole(folder, files)
    banks: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
    for name in sorted(files, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
        content = read_plain(folder / name, mmap=True)
        for path in list(content)[:1]:  # empty before emergence
            found = EXPERT_PARAMETER.fullmatch(path)
            assert found is not None
            banks.setdefault((found[1], int(found[2])), []).append(content)
    return [
        {"block": block, "bank": number, "experts": len(experts), **_compare(_products(experts))}
        for (block, number), experts in banks.items()
    ]


def _products(experts: list[dict[str, Tensor]]) -> Tensor:
    """(E, E) fp64 scalar products of the experts' weights; every expert has its tensors in the same order."""
    products = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for same in zip(*(expert.values() for expert in experts), strict=True):
        rows = torch.stack([tensor.flatten() for tensor in same]).double()
        products += rows @ rows.T
    return products


def _compare(products: Tensor) -> dict[str, Any]:
    """Cosines and distances from the mean, of the scalar products (E, E) of the experts' weights."""
    size = products.diagonal().clamp(min=1e-300).sqrt()
    mean = products.mean()  # |m|^2
    apart = (products.diagonal() - 2 * products.mean(dim=1) + mean).clamp(min=0) / mean.clamp(min=1e-300)
    return {"cosine": (products / (size[:, None] * size)).tolist(), "apart": apart.sqrt().tolist()}


def likeness_text(found: list[dict[str, Any]]) -> str:
    """A line for each bank; cosines are those of all pairs."""
    if not found:
        return "no block has emerged: there are no experts to compare"
    rows = []
    for entry in found:
        cosine = torch.tensor(entry["cosine"], dtype=torch.float64)
        pairs = cosine[tuple(torch.triu_indices(len(cosine), len(cosine), 1))]
        apart = torch.tensor(entry["apart"], dtype=torch.float64)
        spread = [f"{value:.4f}" for value in (pairs.mean(), pairs.min(), pairs.max())] if len(pairs) else [MISSING] * 3
        spread += [f"{apart.mean():.3f}", f"{apart.max():.3f}"]
        rows.append([entry["block"], str(entry["bank"]), str(entry["experts"]), *spread])
    head = ("block", "bank", "experts", "cosine, mean", "least", "most", "apart, mean", "most apart")
    return text_table(head, rows, left=("block",))
