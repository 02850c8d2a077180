"""Which tokens count, whatever shape the mask has that says so."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mocte_ds.errors import MocteError
from mocte_ds.moe.forward import ForwardState

B, T = 2, 6
REAL = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()


def additive(seen: Tensor, hidden: float) -> Tensor:
    return torch.where(seen, 0.0, hidden)


def counted(mask: Any, **given: Tensor) -> Tensor | None:
    ids = torch.arange(B * T).view(B, T)
    return ForwardState.of_call({"input_ids": ids, "attention_mask": mask, **given}, None, None).counted((B, T, 8))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_that_no_query_sees_are_padding(causal: bool, side: str) -> None:
    real = REAL if side == "right" else REAL.flip(1)
    seen = real[:, None, :] & (CAUSAL if causal else torch.ones_like(CAUSAL))
    masks = [seen, seen[:, None], seen[:, None].long(), seen[:, None].expand(B, 3, T, T)]
    masks += [additive(seen[:, None], hidden) for hidden in (-1e4, torch.finfo(torch.float32).min, -torch.inf)]
    if causal:
        masks.append(~seen[:, None])  # Megatron's: True hides
    for mask in [real.long(), *masks]:
        assert torch.equal(counted(mask), real), (mask.shape, mask.dtype)


def test_masks_by_kind_of_layer() -> None:
    """As transformers hands them to models with sliding windows."""
    seen = REAL[:, None, None, :] & CAUSAL
    near = seen & CAUSAL.triu(-2)
    for masks in ({"full_attention": seen, "sliding_attention": near}, {"sliding_attention": additive(near, -1e9)}):
        assert torch.equal(counted(masks), REAL)
    assert counted({"full_attention": None, "sliding_attention": None}) is None


def test_a_mask_that_is_not_read_is_refused() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = create_block_mask(lambda b, h, q, kv: q >= kv, B, None, T, T, device="cpu")
    for mask in (blocks, {"full_attention": blocks}):
        with pytest.raises(
            MocteError, match="attention_mask is a BlockMask, which does not say which tokens are padding"
        ):
            counted(mask)


def test_a_mask_that_tells_of_no_padding_leaves_it_to_the_labels() -> None:
    labels = torch.full((B, T), 5)
    labels[:, -2:] = -100
    ids = torch.full((B, T), 5)
    for mask in (CAUSAL[None, None], ~CAUSAL[None, None], additive(CAUSAL, -torch.inf)[None, None]):
        assert counted(mask) is None
        found = counted(mask, labels=labels, input_ids=ids)
        assert torch.equal(found, labels != -100)


def test_a_longer_mask_needs_a_cache() -> None:
    """The mask of another sequence is not cut to fit."""
    longer = torch.cat([REAL, torch.zeros(B, 3, dtype=torch.bool)], dim=1)
    assert counted(longer) is None
    ids = torch.arange(B * T).view(B, T)
    state = ForwardState(ids, None, {"attention_mask": longer}, cached=3)
    assert torch.equal(state.counted((B, T, 8)), longer[:, 3:])
