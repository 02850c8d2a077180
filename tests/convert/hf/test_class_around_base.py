"""The class around a base model computes and generates what training does, for every router and kind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from pytest import fixture, mark, raises
from transformers import AutoModelForCausalLM, DynamicCache

from mocte_ds.moe import Block
from mocte_ds.remote_code.modeling_blocks_mocte import MocteBlocksForCausalLM
from mocte_ds.remote_code.tokens_mocte import RoutingState
from tests.checkpoints import tiny
from tests.checkpoints.held import write

ROOT = Path(__file__).resolve().parents[3]
ALL, OUTER = "*.{}.*.mlp", ["*.{}.0.mlp", "*.{}.2.mlp"]
LORA = {"kind": "lora", "width": 12}
EOD = 7
SOFT = {"weight": "softmax"}
LEARNED = {"weight": "softmax", "learn": True}
SIGMOID = {"kind": "random", "weight": "sigmoid", "learn": True, "top_k": 2, "normalise": True, "scale": 2.5}

# Name: decoder, blocks.
CASES = {
    "token with bias": ({}, {"modules": ALL}),
    "token, softmax": ({}, {"modules": OUTER, "router": SOFT}),
    "token, learned": ({}, {"modules": ALL, "router": LEARNED}),
    "type": ({}, {"modules": ALL, "router": {"kind": "type"}}),
    "type, learned": ({}, {"modules": ALL, "router": {"kind": "type", **LEARNED}}),
    "hash": ({"model_type": "gpt2"}, {"modules": ALL, "router": {"kind": "hash"}}),
    "random, learned": ({}, {"modules": ALL, "router": {"kind": "random", **LEARNED}}),
    "previous": ({}, {"modules": ALL, "router": {"kind": "previous"}}),
    "previous, documents": ({}, {"modules": ALL, "router": {"kind": "previous"}, "eod_id": EOD}),
    "previous, learned": ({}, {"modules": ALL, "router": {"kind": "previous", **LEARNED}, "eod_id": EOD}),
    "pair": ({}, {"modules": ALL, "router": {"kind": "pair", "rows": 512}, "eod_id": EOD}),
    "pair, learned": ({}, {"modules": ALL, "router": {"kind": "pair", **LEARNED}}),
    "pair-hash": ({}, {"modules": ALL, "router": {"kind": "pair-hash"}, "eod_id": EOD}),
    "online": ({}, {"modules": ALL, "router": {"kind": "online", "directions": 12}}),
    "type, gain": ({}, {"modules": ALL, "router": {"kind": "type", "weight": "gain", "learn": True}}),
    "type, a prior over groups": (
        {},
        {
            "modules": ALL,
            "expert": LORA,
            "router": {**SIGMOID, "kind": "type", "groups": 2, "std": 0.02, "learn_prior": True},
        },
    ),
    "prefix": ({}, {"modules": ALL, "router": {"kind": "prefix"}}),
    "prefix, documents": ({}, {"modules": ALL, "router": {"kind": "prefix"}, "eod_id": EOD}),
    "prefix, softmax, no bias": ({}, {"modules": ALL, "router": {"kind": "prefix", "bias": False, **SOFT}}),
    "document": ({}, {"modules": ALL, "router": {"kind": "document"}, "eod_id": EOD}),
    "document, learned": ({}, {"modules": ALL, "router": {"kind": "document", **LEARNED}}),
    "prefix, learned": ({}, {"modules": ALL, "router": {"kind": "prefix", **LEARNED}, "eod_id": EOD}),
    "lora": ({}, {"modules": OUTER, "expert": LORA, "router": {"kind": "prefix"}}),
    "gpt2, lora": ({"model_type": "gpt2"}, {"modules": OUTER, "expert": LORA, "router": {"kind": "previous"}}),
    "banks": ({}, {"modules": ALL, "banks": [{"kind": "previous"}, {"kind": "type"}], "eod_id": EOD}),
    "gpt2, banks": (
        {"model_type": "gpt2"},
        {"modules": ALL, "banks": [{"kind": "prefix"}, {"kind": "token", **SOFT}, {"kind": "previous"}], "eod_id": EOD},
    ),
    "lora, banks": ({}, {"modules": ALL, "expert": LORA, "banks": [{"kind": "hash"}, {"kind": "token", **LEARNED}]}),
    "a block in warm-up": (
        {"tie_word_embeddings": True},
        {"modules": ALL, "warmup": (1,), "router": {"kind": "prefix"}},
    ),
    "sigmoids of several": ({"model_type": "qwen3"}, {"modules": ALL, "expert": LORA, "router": SIGMOID}),
    "dense": ({"model_type": "gpt2"}, None),
}
# Those whose routers remember something.
STATEFUL = ["previous, documents", "pair", "document", "prefix, documents", "prefix, learned", "gpt2, banks"]


def trained(name: str) -> Any:
    """The trained model of a case."""
    changes, blocks = CASES[name]
    model = tiny.decoder(**changes)
    if blocks:
        layers = "transformer.h" if changes.get("model_type") == "gpt2" else "model.layers"
        patterns = blocks["modules"]
        named = [p.replace("*.{}", layers) for p in ([patterns] if isinstance(patterns, str) else patterns)]
        tiny.add_blocks(model, **{**blocks, "modules": named})
    return model


def exported(name: str, folder: Path, **how) -> tuple[Any, Any]:
    """The trained model of a case and its export, loaded."""
    model = trained(name)
    write(model, folder, choice="own")
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def blocks_of(model: torch.nn.Module) -> list[Any]:
    """The blocks of an export."""
    return [module for module in model.modules() if type(module).__name__ == "MocteBlock"]


def texts(seed: int = 5, batch: int = 3, length: int = 40) -> torch.Tensor:
    """Ids with ends of documents: inside, at the last place, and two in a row."""
    ids = tiny.ids(seed, batch, length)
    ids[0, 11] = ids[1, 6] = ids[1, length - 1] = ids[2, 20] = ids[2, 21] = EOD
    return ids


@mark.parametrize("name", CASES)
@torch.no_grad()
def test_one_pass_token_by_token_and_generation(name, tmp_path):
    ours, theirs = exported(name, tmp_path)
    assert type(theirs) is MocteBlocksForCausalLM
    ids = texts()
    expected = ours(ids).logits
    close = {"atol": 1e-5 * expected.abs().max().item(), "rtol": 0}
    torch.testing.assert_close(theirs(ids, use_cache=False).logits, expected, **close)
    for sizes in ([1] * 40, [6, 1, 14, 1, 18]):
        cache, logits = DynamicCache(), []
        for part in ids.split(sizes, dim=1):
            output = theirs(part, past_key_values=cache, use_cache=True)
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **close)
    prompt = tiny.ids(6, batch=2, length=6)
    prompt[0, 3] = EOD
    continued = tiny.greedy(ours, prompt, 20)
    for use_cache in (True, False):
        found = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, use_cache=use_cache
        )
        assert torch.equal(found, continued)


def test_what_save_pretrained_writes_loads_where_nothing_of_ours_is(tmp_path):
    """The code goes along, although the class was registered by this package."""
    _, theirs = exported("prefix, documents", tmp_path / "export")
    theirs.save_pretrained(tmp_path / "saved")
    command = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "how = {'trust_remote_code': True, 'dtype': torch.float32}\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **how).eval()\n"
        "assert 'mocte_ds' not in sys.modules\n"
        "torch.save(model(torch.arange(1, 20)[None]).logits.detach(), sys.argv[2])\n"
    )
    run = [sys.executable, "-c", command, str(tmp_path / "saved"), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        run,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = theirs(torch.arange(1, 20)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


@mark.parametrize("name", ["type", "hash", "previous", "banks", "type, learned", "token with bias"])
@torch.no_grad()
def test_an_export_from_before_tables_had_settings_loads(name, tmp_path):
    _, theirs = exported(name, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for block in config["blocks"]:
        for bank in block["banks"]:
            for key in ("prior", "learn_prior", "groups", "std", "rows", "directions", "dropped"):
                del bank[key]
    file.write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(again(texts()).logits, theirs(texts()).logits)


@mark.parametrize("name", CASES)
def test_the_comparison_covers_every_case(name, tmp_path):
    model = trained(name)
    facts = write(model, tmp_path / "out", choice="own")
    emerged = [m for m in model.modules() if isinstance(m, Block) and m.mode != "warmup"]
    assert facts["experts_compared"] == sum(block.num_experts for block in emerged)
    assert facts["logit_difference"] < 1e-5


@mark.parametrize("name", [name for name, (_, blocks) in CASES.items() if blocks])
@torch.no_grad()
def test_another_choice_of_experts_would_be_seen(name, tmp_path):
    """The control of the tests above: experts differ, and these ids reach several of them."""
    ours, theirs = exported(name, tmp_path)
    expected = ours(texts()).logits
    for block in blocks_of(theirs):
        for bank in block.banks:
            bank.experts = torch.nn.ModuleList([bank.experts[k] for k in (1, 2, 3, 0)])
        assert (theirs(texts()).logits - expected).abs().max() > 1e-2 * expected.abs().max()


@mark.parametrize("name", ["token with bias", *STATEFUL])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(name, tmp_path):
    """Padding is the very token that ends documents: it must not enter means, begin documents or count as a token."""
    ours, theirs = exported(name, tmp_path)
    lengths, ids = (9, 4, 1), texts(length=40)[:, :24]
    padded, mask = torch.full((3, 24), EOD), torch.zeros(3, 24, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 24 - 15 - length :] = ids[row, : length + 15]
        mask[row, 24 - 15 - length :] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)  # as generate gives them
    cache, first = DynamicCache(), 9
    logits = []
    for part in (slice(0, first), *(slice(t, t + 1) for t in range(first, 24))):
        seen = {"attention_mask": mask[:, : part.stop], "position_ids": places[:, part]}
        logits.append(theirs(padded[:, part], **seen, past_key_values=cache).logits)
    one_pass = theirs(padded, attention_mask=mask, position_ids=places, use_cache=False).logits
    for row, length in enumerate(lengths):
        expected = ours(ids[row : row + 1, : length + 15]).logits[0]
        close = {"atol": 1e-5 * expected.abs().max().item(), "rtol": 0}
        torch.testing.assert_close(torch.cat(logits, dim=1)[row, -length - 15 :], expected, **close)
        torch.testing.assert_close(one_pass[row, -length - 15 :], expected, **close)
    found = theirs.generate(padded[:, :9], attention_mask=mask[:, :9], max_new_tokens=12, do_sample=False)
    for row, length in enumerate(lengths):
        assert torch.equal(found[row, 9 - length :], tiny.greedy(ours, padded[row : row + 1, 9 - length : 9], 12)[0])


@mark.parametrize("name", STATEFUL)
@torch.no_grad()
def test_beams_take_their_routing_state_along(name, tmp_path):
    _, theirs = exported(name, tmp_path)
    prompt = tiny.ids(6, batch=2, length=6)
    prompt[0, 3] = EOD
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "num_beams": 4, "num_return_sequences": 3}
    with_cache, without = (theirs.generate(prompt, **how, do_sample=False, use_cache=flag) for flag in (True, False))
    assert torch.equal(with_cache, without)
    reorder, moved = RoutingState.reorder_cache, []
    RoutingState.reorder_cache = lambda self, beams: moved.append(beams)
    try:
        assert not torch.equal(theirs.generate(prompt, **how, do_sample=False, use_cache=True), without)
    finally:
        RoutingState.reorder_cache = reorder
    assert moved, "the beams of this case must move"


@mark.parametrize("name", STATEFUL)
@torch.no_grad()
def test_tokens_that_were_guessed_wrong_are_taken_back(name, tmp_path):
    ours, theirs = exported(name, tmp_path)
    prompt = tiny.ids(6, batch=1, length=6).repeat(1, 3)
    prompt[0, 10] = EOD
    found = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert torch.equal(found, tiny.greedy(ours, prompt, 20))


@mark.parametrize("name", STATEFUL)
@torch.no_grad()
def test_two_generations_at_once_and_a_cache_that_grows(name, tmp_path):
    ours, theirs = exported(name, tmp_path)
    one, other = texts(5)[:, :20], texts(8)[:, :20]
    caches, logits = (DynamicCache(), DynamicCache()), ([], [])
    for t in range(0, 20, 4):
        for ids, cache, found in zip((one, other), caches, logits, strict=True):
            found.append(theirs(ids[:, t : t + 4], past_key_values=cache).logits)
    for ids, found in zip((one, other), logits, strict=True):
        torch.testing.assert_close(torch.cat(found, dim=1), ours(ids).logits, atol=1e-4, rtol=1e-4)
    # Every sequence twice, then only some of them.
    caches[0].batch_repeat_interleave(2)
    caches[0].batch_select_indices(torch.tensor([1, 4]))
    after = torch.cat([one, other[:, :5]], dim=1)[[0, 2]]
    found = theirs(after[:, 20:], past_key_values=caches[0]).logits
    torch.testing.assert_close(found, ours(after).logits[:, 20:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_of_tokens_that_the_routers_have_not_seen_is_refused(tmp_path):
    _, theirs = exported("prefix", tmp_path)
    cache = theirs(texts(), use_cache=True).past_key_values
    assert isinstance(cache.layers.pop(), RoutingState)
    with raises(ValueError, match="begin with an empty cache"):
        theirs(texts()[:, :1], past_key_values=cache)
    with raises(ValueError, match="static cache"):
        theirs.generate(texts(), max_new_tokens=2, cache_implementation="static")
    _, tables = exported("type", tmp_path / "tables")
    with raises(ValueError, match="a router by token ids needs them"):
        tables(inputs_embeds=torch.zeros(1, 3, 32))


def test_loss_and_gradients_reach_every_expert_that_is_used(tmp_path):
    ours, theirs = exported("prefix, learned", tmp_path)
    ids = texts()
    theirs.train()
    loss = theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, ours(ids, labels=ids).loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    gradients = [e.gate_proj.weight.grad for e in blocks_of(theirs)[0].banks[0].experts]
    assert sum(g is not None and bool(g.any()) for g in gradients) >= 2
    assert blocks_of(theirs)[0].banks[0].gate.cluster_residual.grad.any()


@fixture
def folder(tmp_path) -> Path:
    """An export with two banks, of which one remembers."""
    write(trained("gpt2, banks"), tmp_path / "export", choice="own")
    return tmp_path / "export"


def run(code: str, folder: Path, *flags: str) -> str:
    """The output of a fresh process."""
    home = {"HF_MODULES_CACHE": str(folder.parent / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *flags, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **home})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


WITHOUT_US = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mocte_ds", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
prompt = torch.tensor([[5, 7, 9, 11, 2, 3]])
print(type(model).__module__.split(".")[0], model.generate(prompt, max_new_tokens=20, do_sample=False).tolist()[0])
model.save_pretrained(sys.argv[1] + "-again")
again = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "-again", trust_remote_code=True).eval()
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
"""


def test_loads_by_remote_code_where_mocte_ds_is_not(folder):
    expected = tiny.greedy(trained("gpt2, banks"), torch.tensor([[5, 7, 9, 11, 2, 3]]), 20)
    assert run(WITHOUT_US, folder, "-I") == f"transformers_modules {expected.tolist()[0]}"


REGISTERED = """
import sys
import mocte_ds
assert not {"torch", "transformers", "deepspeed"} & set(sys.modules)
import mocte_ds.convert.hf.register
from transformers import AutoConfig, AutoModelForCausalLM
assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__ == "mocte_ds.remote_code.configuration_blocks_mocte"
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])))
"""


def test_an_import_registers_the_class(folder):
    module = "mocte_ds.remote_code.modeling_blocks_mocte"
    assert run(REGISTERED, folder) == f"<class '{module}.MocteBlocksForCausalLM'>"
