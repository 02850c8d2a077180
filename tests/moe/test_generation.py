"""Generation with a cache by the model that trains: what routers remember is selected, repeated and cropped with it."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from mocte_ds.errors import MocteError
from mocte_ds.moe import Block
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.moe.keys import LinearKey
from mocte_ds.remote_code.tokens_mocte import RoutingState
from tests.moe.test_forward_state import EOD, ROUTERS, D, E, V, made, texts

KINDS = ["previous", "prefix", "pair", "document"]


def model_of(kind: str) -> tuple[LlamaForCausalLM, list[Block]]:
    model, blocks = made({"kind": kind, "weight": "hard"}, pad_token_id=EOD, eos_token_id=V + 1, bos_token_id=None)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # sharper, so that beams part
    return model.eval(), blocks


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Of three lengths, padded on the left with the token that ends documents; one document ends inside."""
    ids, mask = texts(4, 3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, missing in ((1, 3), (2, 6)):
        ids[row, missing:] = ids[row, : 9 - missing].clone()
        ids[row, :missing], mask[row, :missing] = EOD, 0
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_way_to_generate_gives_the_tokens_of_no_cache(kind: str) -> None:
    model, _ = model_of(kind)
    ids, mask = prompts()
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "beams": {"num_beams": 4},
        "beams, several": {"num_beams": 4, "num_return_sequences": 3},
        "samples": {"do_sample": True, "num_return_sequences": 3},
    }
    for name, way in ways.items():
        found = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "use_cache": use_cache, **way}
            found.append(model.generate(ids, **how))
        assert torch.equal(*found), name
    # One after the other, without padding.
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, missing in ((0, 0), (1, 3), (2, 6)):
        how = {"attention_mask": mask[row : row + 1, missing:], "max_new_tokens": 12, "use_cache": False}
        alone = model.generate(ids[row : row + 1, missing:], do_sample=False, **how)
        assert torch.equal(together[row, missing:], alone[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_guesses_that_are_taken_back(kind: str) -> None:
    model, _ = model_of(kind)
    helper, _ = model_of(kind)
    for parameter in helper.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))  # guesses some tokens wrong
    prompt = texts(6, 1, 6).repeat(1, 3)
    plain = model.generate(prompt, max_new_tokens=16, do_sample=False, use_cache=False)
    cropped: list[int] = []
    crop = RoutingState.crop
    RoutingState.crop = lambda self, length: (cropped.append(length), crop(self, length))[1]
    try:
        looked_up = model.generate(prompt, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4)
        assisted = model.generate(prompt, max_new_tokens=16, do_sample=False, assistant_model=helper)
    finally:
        RoutingState.crop = crop
    assert cropped and torch.equal(looked_up, plain) and torch.equal(assisted, plain)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_generations_at_once_and_a_batch_that_is_chosen_from(kind: str) -> None:
    model, blocks = model_of(kind)
    texts_of = [texts(5, 3, 12), texts(8, 3, 12)]
    caches, logits = [DynamicCache(), DynamicCache()], [[], []]
    for t in range(0, 12, 4):
        for ids, cache, found in zip(texts_of, caches, logits, strict=True):
            found.append(model(input_ids=ids[:, t : t + 4], past_key_values=cache).logits)
            blocks[0].context.announce()  # and a training pass in between
            model.train()(input_ids=texts(9), use_cache=False)
            model.eval()
    for ids, found in zip(texts_of, logits, strict=True):
        torch.testing.assert_close(torch.cat(found, dim=1), model(input_ids=ids, use_cache=False).logits)
    caches[0].batch_repeat_interleave(2)
    caches[0].batch_select_indices(torch.tensor([1, 4]))
    longer = torch.cat([texts_of[0], texts_of[1][:, :5]], dim=1)[[0, 2]]
    found = model(input_ids=longer[:, 12:], past_key_values=caches[0]).logits
    torch.testing.assert_close(found, model(input_ids=longer, use_cache=False).logits[:, 12:])


@torch.no_grad()
def test_caches_that_cannot_carry_the_state_are_refused() -> None:
    model, _ = model_of("prefix")
    cache = model(input_ids=texts(1), use_cache=True).past_key_values
    assert isinstance(cache.layers.pop(), RoutingState)
    with pytest.raises(MocteError, match="begin with an empty cache"):
        model(input_ids=texts(1)[:, :1], past_key_values=cache)
    with pytest.raises(MocteError, match="static cache"):
        model(input_ids=texts(1), past_key_values=StaticCache(config=model.config, max_cache_len=32))
    tables, _ = made(ROUTERS["type"])
    how = {"max_new_tokens": 6, "do_sample": False}
    static = tables.eval().generate(texts(1), cache_implementation="static", **how)
    assert torch.equal(static, tables.generate(texts(1), use_cache=False, **how)), "tables remember nothing"


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "token", "weight": "hard"},
        {"kind": "token", "weight": "softmax"},
        {"kind": "prefix", "weight": "hard"},
        {"kind": "token", "weight": "softmax", "learn": True},
        {"kind": "prefix", "weight": "softmax", "learn": True, "top_k": 2},
        {"kind": "random", "weight": "softmax", "learn": True},
        {"kind": "random", "weight": "sigmoid", "learn": True, "unit_mean": True, "aux": 0.0, "balance_rate": 0.01},
    ],
    ids=str,
)
def test_the_gate_runs_without_autocast(router: dict[str, Any]) -> None:
    from mocte_ds.moe.forward import ForwardState
    from mocte_ds.router_config import RouterConfig

    gate = ClusterGate(D, E, RouterConfig(**router), None)
    assert isinstance(gate.key, LinearKey)
    gate.key.set(torch.randn(E, D), torch.randn(E))
    if gate.router.learn:
        torch.nn.init.normal_(gate.cluster_residual)
    features = torch.randn(2000, D) + 30 * torch.randn(D)
    tokens = ForwardState().tokens((20, 100, D))
    expected, plain, _ = gate(features, tokens)
    logits = gate.key.logits(features, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, rounded, _ = gate(features, tokens)
        assert torch.equal(gate.key.logits(features, tokens), logits)
        assert (features @ gate.key.cluster_weight.T).dtype is torch.bfloat16
    assert torch.equal(found, expected) and (plain is None or torch.equal(plain, rounded))
