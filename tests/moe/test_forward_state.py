"""State belongs to the forward pass that made it: recomputation, several passes before a backward, padding, packing."""

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing as deepspeed_checkpointing
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from mocte_ds.config import MocteConfig
from mocte_ds.controller.collect import FeatureCollector, SampleStream
from mocte_ds.controller.samples import Samples
from mocte_ds.dist.mesh import ALONE
from mocte_ds.errors import MocteError
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe.forward import ForwardState, documents_of
from tests.moe.random_keys import randomise_key

V, E, EOD, D = 64, 4, 0, 32
LEARNED = {"kind": "prefix", "weight": "softmax", "learn": True, "aux": 1.0}
ROUTERS: dict[str, dict[str, Any]] = {
    "previous": {"kind": "previous"},
    "prefix": {"kind": "prefix"},
    "type": {"kind": "type"},
    "pair": {"kind": "pair"},
    "document": {"kind": "document"},
    "learned": LEARNED,
}


def made(router: dict[str, Any], **config: Any) -> tuple[LlamaForCausalLM, list[Block]]:
    """A Llama whose experts and gates all differ, ready to train."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, attn_implementation="eager", **sizes, **config))
    settings = {"modules": "model.layers.*.mlp", "num_experts": E, "router": router, "eod_id": EOD}
    blocks = attach(model, MocteConfig.from_dict(settings))
    for block in blocks:
        gate, layer = block.banks[0].gate, block.banks[0].deepspeed_moe
        randomise_key(gate.key)
        layer.loads.share = torch.tensor([0.7, 0.1, 0.1, 0.1])
        block.banks.requires_grad_(True)
        for parameter in block.banks[0].local_experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        block.mode = BlockMode.SPECIALISING
    return model.train(), blocks


def texts(seed: int, batch: int = 3, length: int = 14) -> torch.Tensor:
    ids = torch.randint(1, V, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 5] = EOD
    return ids


def checkpointed(model: LlamaForCausalLM, how: str) -> None:
    """Recompute every layer, or all layers in one piece."""
    if how in ("plain", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    elif how == "deepspeed":
        for layer in model.model.layers:
            _wrap(layer, lambda run, x: deepspeed_checkpointing.checkpoint(run, x))
    elif how in ("whole", "whole reentrant"):
        _wrap(model.model.layers[0], lambda run, x: checkpoint(run, x, use_reentrant="reentrant" in how))
        _wrap(model.model.layers[1], lambda run, x: checkpoint(run, x, use_reentrant="reentrant" in how))


def _wrap(layer: torch.nn.Module, around: Callable) -> None:
    call = layer.__class__.__call__

    class Wrapped(layer.__class__):
        def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return around(lambda x: call(self, x, *args, **kwargs), hidden)

    layer.__class__ = Wrapped


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def both(model: LlamaForCausalLM) -> None:
    (loss_of(model, texts(1)) + loss_of(model, texts(2))).backward()


def evaluation_between(model: LlamaForCausalLM) -> None:
    loss = loss_of(model, texts(1))
    model.eval()
    with torch.no_grad():
        model(input_ids=texts(2)[:2, :9])
    model.train()
    loss.backward()


def first_first(model: LlamaForCausalLM) -> None:
    losses = [loss_of(model, texts(1)), loss_of(model, texts(2)[:2])]
    losses[0].backward()
    losses[1].backward()


def last_first(model: LlamaForCausalLM) -> None:
    losses = [loss_of(model, texts(1)), loss_of(model, texts(2))]
    losses[1].backward()
    losses[0].backward()


def one_given_up(model: LlamaForCausalLM) -> None:
    kept = loss_of(model, texts(1))
    loss_of(model, texts(2))
    kept.backward()


PATTERNS = [both, evaluation_between, first_first, last_first, one_given_up]
HOW = ["plain", "reentrant", "deepspeed", "whole", "whole reentrant"]


def gradients(router: dict[str, Any], how: str) -> list[dict[str, torch.Tensor]]:
    """Of each pattern."""
    model, blocks = made(router)
    checkpointed(model, how)
    found = []
    for pattern in PATTERNS:
        model.zero_grad()
        pattern(model)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert not blocks[0].context.pending() and not blocks[0].context._passes
    return found


@pytest.mark.parametrize("name", ROUTERS)
def test_recomputation_finds_its_own_pass(name: str) -> None:
    expected = gradients(ROUTERS[name], "none")
    for how in HOW:
        for pattern, plain, found in zip(PATTERNS, expected, gradients(ROUTERS[name], how), strict=True):
            assert plain.keys() == found.keys()
            for parameter, gradient in plain.items():
                torch.testing.assert_close(found[parameter], gradient, msg=f"{how}, {pattern.__name__}, {parameter}")


@pytest.mark.parametrize("how", HOW)
def test_moving_clusters_read_each_token_once_and_none_in_evaluation(how: str) -> None:
    found = []
    for way in ("none", how):
        model, blocks = made({"kind": "online", "directions": 8})
        checkpointed(model, way)
        both(model)
        loads = [block.banks[0].loads for block in blocks]
        found.append([(each.step.clone(), each.sums.clone()) for each in loads])
        assert all(block.banks[0].gate.key._seen is None for block in blocks), "nothing is held after a recomputation"
        with torch.no_grad():
            model.eval()(input_ids=texts(3))
        assert all(block.banks[0].gate.key._seen is None for block in blocks)
        for each, (step, sums) in zip(loads, found[-1], strict=True):
            assert torch.equal(each.step, step) and torch.equal(each.sums, sums)
    for (step, sums), (expected, wanted) in zip(*found, strict=True):
        assert torch.equal(step, expected) and int(step.sum()) == 2 * 3 * 14
        torch.testing.assert_close(sums, wanted)


def test_each_pass_brings_its_own_balance_loss_once() -> None:
    model, blocks = made(LEARNED)
    residuals = [block.banks[0].gate.cluster_residual for block in blocks]

    def by_hand(ids: torch.Tensor) -> torch.Tensor:
        """E sum f P from the gates' own inputs, with a graph."""
        seen: list[torch.Tensor] = []
        hooks = [block.register_forward_pre_hook(lambda _b, args: seen.append(args[0])) for block in blocks]
        model.eval()(input_ids=ids, use_cache=False)  # in evaluation no loss travels along
        model.train()
        for hook in hooks:
            hook.remove()
        total = torch.zeros(())
        for block, x in zip(blocks, seen, strict=True):
            key = block.banks[0].gate.key
            prior = key.logits(x.detach().flatten(0, 1), ForwardState(ids, EOD).tokens(x.shape))
            logits = prior + x.flatten(0, 1) @ block.banks[0].gate.cluster_residual.T
            total = total + E * (block.banks[0].loads.share * logits.softmax(1).mean(0)).sum()
        return total

    auxiliary = lambda: sum(block.auxiliary_loss() for block in blocks)  # noqa: E731
    wanted = [by_hand(texts(seed)) for seed in (1, 2)]
    expected = [torch.autograd.grad(value, residuals) for value in wanted]
    loss_of(model, texts(3))
    assert blocks[0].auxiliary_loss() is None, "a pass whose graph is gone adds nothing"
    outputs = [model(input_ids=texts(seed), use_cache=False).logits for seed in (1, 2)]
    torch.testing.assert_close(auxiliary(), sum(wanted).detach())
    found = torch.autograd.grad(outputs[1].sum() * 0, residuals, retain_graph=True)
    torch.testing.assert_close(found, expected[1])
    torch.testing.assert_close(auxiliary(), wanted[0].detach())
    found = torch.autograd.grad(outputs[0].sum() * 0, residuals)
    torch.testing.assert_close(found, expected[0])
    assert blocks[0].auxiliary_loss() is None


def test_a_recomputation_that_could_be_of_two_passes_is_refused() -> None:
    model, _ = made(ROUTERS["prefix"])
    checkpointed(model, "reentrant")
    shared = model.model.embed_tokens(texts(1))
    one, other = (model(inputs_embeds=shared, use_cache=False).logits.sum() for _ in range(2))
    with pytest.raises(MocteError, match="2 forward passes have read the same tensor.*clone"):
        (one + other).backward()
    model, blocks = made(ROUTERS["type"])
    with pytest.raises(RuntimeError, match="boom"):
        blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
        model(input_ids=texts(1))
    assert not blocks[0].context._passes, "a failed pass is over too"
    assert int(blocks[0].banks[0].loads.total.sum()) == 0, "and counts nothing"


def test_states_go_with_their_graphs_and_copies_have_their_own() -> None:
    model, blocks = made(LEARNED)
    context = blocks[0].context
    loss = model(input_ids=texts(1), labels=texts(1)).loss  # with a cache
    (state,) = [weakref.ref(state) for state in context._alive]
    loss.backward()
    del loss
    assert state() is None, "no circle through the graph keeps a pass alive"
    twin = copy.deepcopy(model)
    other = next(m for m in twin.modules() if isinstance(m, Block)).context
    assert other is not context
    kept = loss_of(twin, texts(2))
    assert len(list(other._alive)) == 1 and not list(context._alive)
    kept.backward()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["previous", "prefix", "pair", "document", "learned"])
def test_padding_changes_nothing_and_is_not_counted(name: str, side: str) -> None:
    """Padding is the very token that ends documents."""
    ids, more = texts(1), 6
    filling = torch.full((3, more), EOD)
    padded = torch.cat([filling, ids] if side == "left" else [ids, filling], dim=1)
    mask = (torch.arange(14 + more) >= more if side == "left" else torch.arange(14 + more) < 14).long().repeat(3, 1)
    where = mask[0].bool()
    results = []
    for given, known in ((ids, torch.ones_like(ids)), (padded, mask)):
        model, blocks = made(ROUTERS[name])
        stream = SampleStream(16, 8, 0, EOD, ALONE)
        collector = FeatureCollector(D, stream)
        samples = Samples(MocteConfig(modules="x", num_experts=E), blocks, ALONE)
        samples.features = lambda block, *seen, own=blocks[1], see=collector.see: see(*seen) if block is own else None
        blocks[0].context.announce(observer=samples, domain=torch.tensor([0, 1, 2]), sources=3)
        positions = (known.cumsum(1) - 1).clamp(min=0)
        output = model(input_ids=given, attention_mask=known, position_ids=positions, use_cache=False)
        (output.logits[:, known[0].bool()].square().mean()).backward()
        layer = blocks[1].banks[0].deepspeed_moe
        facts = [output.logits[:, known[0].bool()], layer.loads.total, samples.by_source[layer], layer.loads.step]
        facts += [*collector.tokens(), stream.tokens.keys, *collector.documents()]
        facts += [block.banks[0].gate.cluster_residual.grad for block in blocks if name == "learned"]
        results.append([*facts, torch.tensor(int(blocks[0].context.step_tokens))])
    assert where.sum() == 14 and int(results[1][1].sum()) == 42 == int(results[1][-1])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_labels_say_of_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 3, 3, 3], [5, 6, 7, 8, 9, 3, 3], [5, 6, 7, 8, 9, 10, 11]])
    labels = torch.where(ids == 3, -100, ids)
    labels[:, :3] = -100  # a prompt is text
    counted = ForwardState(ids, EOD, {"labels": labels}).counted((3, 7, D))
    assert torch.equal(counted, ids != 3)
    labels[2, -1] = -100  # the last token has nothing to predict
    assert ForwardState(ids, EOD, {"labels": labels}).counted((3, 7, D))[2].all()
    everything = {"labels": labels, "attention_mask": torch.ones_like(ids)}
    assert ForwardState(ids, EOD, everything).counted((3, 7, D)).all(), "a mask knows better"
    assert ForwardState(ids, EOD, {"labels": labels}).tokens((3, 7, D)).real is None, "labels never change the way"


def test_packed_documents_however_they_are_told() -> None:
    lengths = [4, 1, 7, 2]
    ids = torch.randint(1, V, (1, sum(lengths)))
    ends = list(itertools.accumulate(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    told = {
        "position_ids": positions,
        "cu_seq_lens_q": torch.tensor([0, *ends], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, *ends, ends[-1]], dtype=torch.int32),
        "seq_idx": numbers.int(),
    }
    alone = [ForwardState(part, None).tokens((1, part.shape[1], D)).before() for part in ids.split(lengths, dim=1)]
    values = torch.randn(1, sum(lengths), E)
    parts = values.split(lengths, dim=1)
    means = torch.cat([part.cumsum(1) / torch.arange(1, part.shape[1] + 1)[:, None] for part in parts], dim=1)
    for name, value in told.items():
        state = ForwardState.of_call({name: value, "input_ids": ids}, None, None)
        tokens = state.tokens((1, sum(lengths), D))
        assert torch.equal(documents_of(tokens, None, ids.device), numbers), name
        assert torch.equal(tokens.before(), torch.cat(alone, dim=1)), name
        torch.testing.assert_close(tokens.running_mean("x", values), means)
    seen = []
    model, blocks = made(ROUTERS["previous"])
    blocks[0].register_forward_pre_hook(lambda *_: seen.append(blocks[0].context.current().tokens((1, 14, D)).before()))
    model(input_ids=ids, position_ids=positions, use_cache=False)
    assert torch.equal(seen[0], torch.cat(alone, dim=1))


def test_sources_of_another_batch_are_refused() -> None:
    model, blocks = made(ROUTERS["type"])
    blocks[0].context.announce(domain=torch.zeros(5), sources=1)
    with pytest.raises(MocteError, match=r"\(5,\) sequences, and the next forward pass has 3"):
        model(input_ids=texts(1))
