"""What a watched pass tells: each block and bank once, nothing of recomputations, nothing that changes the pass."""

import copy

import pytest
import torch
from torch import Tensor

from mocte_ds.errors import ConfigError
from mocte_ds.moe import Block, BlockMode
from mocte_ds.moe.bank import ClusterMOELayer
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.observer import Observer
from tests.moe.test_forward_state import ROUTERS, D, checkpointed, made, texts


class Heard(Observer):
    """Keeps everything that it is told."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Block, Tensor]] = []
        self.layers: list[tuple[ClusterMOELayer, Tensor, Tensor]] = []
        self.lost = 0

    def features(self, block: Block, hidden: Tensor, state: ForwardState) -> None:
        assert not hidden.requires_grad and state.ids is not None
        self.blocks.append((block, hidden))

    def routed(self, layer: ClusterMOELayer, hidden: Tensor, index: Tensor, state: ForwardState) -> None:
        self.layers.append((layer, hidden, index))

    def abandoned(self) -> None:
        self.lost += 1


@pytest.mark.parametrize("how", ["plain", "reentrant"])
def test_each_block_and_bank_is_told_once(how: str) -> None:
    results = []
    for heard in (Heard(), None):
        model, blocks = made(ROUTERS["prefix"])
        checkpointed(model, how)
        blocks[0].context.announce(observer=heard)
        output = model(input_ids=texts(1), use_cache=False).logits
        output.square().mean().backward()  # computes all layers again
        results.append([output, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
        if heard is None:
            continue
        assert [block for block, _ in heard.blocks] == blocks
        layers = [block.banks[0].deepspeed_moe for block in blocks]
        assert [layer for layer, *_ in heard.layers] == layers
        for (_, seen), (layer, hidden, index) in zip(heard.blocks, heard.layers, strict=True):
            assert seen.shape == hidden.shape == (3, 14, D) and torch.equal(seen, hidden.detach())
            counts = torch.bincount(index[:, 0], minlength=4)
            assert index.shape == (42, 1) and torch.equal(counts, layer.exp_counts)
        model(input_ids=texts(2), use_cache=False)
        assert len(heard.blocks) == len(heard.layers) == 3 and not heard.lost, "it was handed over with one pass"
    for watched, alone in zip(*results, strict=True):
        assert torch.equal(watched, alone), "watching changes nothing"


def test_within_a_context_every_pass_is_told_and_a_copy_is_not() -> None:
    model, blocks = made(ROUTERS["prefix"])
    one, other = Heard(), Heard()
    with torch.no_grad(), blocks[0].context.watched_by(one):
        model(input_ids=texts(1))
        with blocks[0].context.watched_by(other):
            model(input_ids=texts(2))
        copy.deepcopy(model)(input_ids=texts(3))
        model(input_ids=texts(4))
    model(input_ids=texts(5))
    assert (len(one.blocks), len(other.blocks)) == (6, 3)


def test_a_pass_that_breaks_off_is_told_as_lost() -> None:
    model, blocks = made(ROUTERS["prefix"])
    heard = Heard()
    blocks[0].context.announce(observer=heard)
    hook = blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        model(input_ids=texts(1))
    hook.remove()
    assert heard.lost == 1 and len(heard.blocks) == len(heard.layers) == 1
    blocks[0].context.announce(observer=heard)
    model(input_ids=texts(1))
    assert heard.lost == 1 and len(heard.blocks) == len(heard.layers) == 4


@pytest.mark.parametrize("kind", ["type", "hash", "pair"])
def test_a_key_that_reads_ids_is_refused_in_warm_up_where_there_are_none(kind: str) -> None:
    model, blocks = made({"kind": kind})
    for block in blocks:
        block.mode = BlockMode.WARMUP
    features = model.get_input_embeddings()(texts(1))
    blocks[0].context.announce(observer=Heard())
    with pytest.raises(ConfigError, match=f"router.kind '{kind}' reads token ids, and the model was called without"):
        model(inputs_embeds=features)
    blocks[0].context.announce(observer=Heard())
    model(input_ids=texts(1))
