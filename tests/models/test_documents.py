"""Packed documents with a mask: each is computed as if it stood alone, and none of them reaches into another."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mocte_ds.models import Decoder, DecoderConfig
from mocte_ds.models.decoder import documents
from mocte_ds.models.layers import causal_attention
from tests.models.test_decoder import GPT2, LLAMA, randomise

END = 5
LENGTHS = ((7, 1, 12, 4), (16, 8))  # of the documents of two sequences of 24


def packed() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(6, 96, (2, 24), generator=generator)
    for row, lengths in enumerate(LENGTHS):
        ids[row, torch.tensor(lengths[:-1]).cumsum(0) - 1] = END
    return ids


def decoder(config: DecoderConfig, end: int | None = END) -> Decoder:
    model = Decoder(config, end)
    randomise(model)
    return model


CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "window": replace(LLAMA, sliding_window=3),
    "recomputed": replace(GPT2, activation_checkpointing=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_document_is_computed_as_if_it_stood_alone(name: str) -> None:
    """Logits and gradients are those of a decoder without a mask that sees one document after the other."""
    together, alone = decoder(CONFIGS[name]), decoder(CONFIGS[name], None)
    ids = packed()
    logits = together(ids)
    parts = [part for row, lengths in zip(ids, LENGTHS, strict=True) for part in row.split(lengths)]
    apart = [alone(part[None])[0] for part in parts]
    torch.testing.assert_close(logits.flatten(0, 1), torch.cat(apart), rtol=1e-5, atol=1e-6)
    labels = torch.roll(ids, -1, dims=1)
    together(ids, labels).backward()
    F.cross_entropy(torch.cat(apart), labels.flatten()).backward()
    for mine, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_a_changed_document_changes_no_other(config: DecoderConfig, kind: torch.dtype) -> None:
    ids = packed()
    other = ids.clone()
    other[0, :6], other[1, 18:] = 90, 91
    for end, leaks in ((END, False), (None, True)):
        model = decoder(config, end).to(kind)
        before, after = model(ids), model(other)
        assert torch.equal(before[0, 7:], after[0, 7:]) is not leaks
        assert torch.equal(before[1, :18], after[1, :18]), "later text never reaches back"
        assert not torch.equal(before[0, :7], after[0, :7])


def test_numbers_and_positions() -> None:
    number, position = documents(torch.tensor([[END, 1, END, END, 2], [1, 2, 3, 4, END]]), END)
    assert number.tolist() == [[0, 1, 1, 2, 3], [0, 0, 0, 0, 0]]
    assert position.tolist() == [[0, 0, 1, 0, 0], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [2, 6])
def test_the_short_way_in_bf16(heads: int, window: int | None) -> None:
    """The CPU's own attention in bf16 against plain softmax attention in fp64 with the mask written out."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, n, 24, 8, generator=generator).bfloat16() for n in (6, heads, heads))
    number, _ = documents(packed(), END)
    i, j = torch.arange(24)[:, None], torch.arange(24)[None, :]
    seen = (j <= i) & (i - j < (window or 24)) & (number[:, :, None] == number[:, None, :])
    wide = [x.double().repeat_interleave(6 // x.shape[1], 1) for x in (q, k, v)]
    scores = (wide[0] @ wide[1].transpose(2, 3) / 8**0.5).masked_fill(~seen[:, None], float("-inf"))
    found = causal_attention(q, k, v, window, number)
    torch.testing.assert_close(found.double(), scores.softmax(-1) @ wide[2], rtol=0.02, atol=0.02)
