"""Models of any architecture of transformers, with experts: the folder computes and generates what trained."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from pytest import fixture, mark, raises
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mocte_ds.base_model import base_facts, require_base
from mocte_ds.claims import require_blocks
from mocte_ds.convert.hf.export import export_trained
from mocte_ds.convert.hf.trained import GatheredSource, trained_model
from mocte_ds.errors import CheckpointError
from mocte_ds.moe import Block
from mocte_ds.moe.block import running_state
from mocte_ds.remote_code.blocks_mocte import Running
from mocte_ds.remote_code.calls_mocte import Call
from mocte_ds.remote_code.modeling_blocks_mocte import MocteBlocksForCausalLM
from mocte_ds.remote_code.tokens_mocte import RoutingError, RoutingState, Tokens
from tests.checkpoints import tiny

EOD = 7
SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
LEARNED = {"weight": "softmax", "learn": True}
SIGMOID = {"kind": "random", "weight": "sigmoid", "learn": True, "top_k": 2, "normalise": True, "scale": 2.5}
PREFIX, PREVIOUS, LORA = {"kind": "prefix"}, {"kind": "previous"}, {"kind": "lora", "width": 12}
LAYERS = "model.layers.*.mlp"

# Name: kind of model, its own sizes, blocks. Together: every kind of router, both kinds of experts, several banks.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, prefix": ("llama", {"tie_word_embeddings": True}, {"modules": LAYERS, "router": PREFIX, "eod_id": EOD}),
    "llama, banks": ("llama", {}, {"modules": LAYERS, "banks": [PREVIOUS, {"kind": "token"}], "eod_id": EOD}),
    "qwen3, sigmoids of several": (
        "qwen3",
        {"head_dim": 8, "num_key_value_heads": 2},
        {"modules": LAYERS, "expert": LORA, "router": SIGMOID},
    ),
    "gemma3, previous": ("gemma3_text", SLIDING, {"modules": LAYERS, "router": PREVIOUS, "eod_id": EOD}),
    "phi3, learned prefix": ("phi3", {}, {"modules": LAYERS, "router": {**PREFIX, **LEARNED}, "eod_id": EOD}),
    "phi3, lora": ("phi3", {}, {"modules": LAYERS, "expert": LORA, "banks": [PREFIX, {"kind": "hash"}]}),
    "gpt_neox, type": ("gpt_neox", {}, {"modules": "gpt_neox.layers.*.mlp", "router": {"kind": "type", **LEARNED}}),
    "falcon, a block in warm-up": (
        "falcon",
        {"multi_query": False},
        {"modules": "transformer.h.*.mlp", "router": PREFIX, "warmup": (0,)},
    ),
    "opt, prefix, a block in warm-up": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        {"modules": "auto", "router": PREFIX, "warmup": (0,), "eod_id": EOD},
    ),
    "xglm, lora": (
        "xglm",
        {"ffn_dim": 48, "dropout": 0.0},
        {"modules": "model.layers.*.fc1", "expert": LORA, "banks": [PREVIOUS, {"kind": "token"}]},
    ),
    "gpt2, token": ("gpt2", {"n_inner": 48}, {"modules": "transformer.h.*.mlp", "router": {"kind": "token"}}),
}
STATEFUL = [name for name in CASES if "prefix" in name or "previous" in name or name.endswith(("banks", "warm-up"))]
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def made(kind: str, **sizes: Any) -> nn.Module:
    """A small model, every weight random."""
    config = AutoConfig.for_model(kind, **{**SIZES, **(DROPOUT if kind in ("gpt2", "phi3") else {}), **sizes})
    model = AutoModelForCausalLM.from_config(config)
    tiny.randomise(model, 1)
    model.tie_weights()
    return model.eval()


def source_of(
    model: nn.Module, base: dict[str, Any], modules: str, warmup: tuple = (), **blocks: Any
) -> GatheredSource:
    """What a run would hand over whose experts and routers all differ; ``model`` gets blocks."""
    added = tiny.add_blocks(model, modules, warmup, **blocks)
    entries = [{"name": b.name, "mode": str(b.mode), "experts": ["training"] * b.num_experts} for b in added]
    mocte = {"config": model.settings.to_dict(), "blocks": entries, "tokens": 100, "step": 7}
    return GatheredSource(running_state(model.eval()), base, mocte)


class Exported:
    """A case: the trained model, its folder, and what the export says."""

    def __init__(self, name: str, folder: Path) -> None:
        kind, sizes, blocks = CASES[name]
        self.ours, self.folder = made(kind, **sizes), folder
        base = require_base(base_facts(self.ours), "here")
        self.source = source_of(self.ours, base, **blocks)
        self.facts = export_trained(self.source, folder, choice="own")

    def loaded(self, **how: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **how).eval()


@fixture(scope="module")
def exports(tmp_path_factory: Any) -> dict[str, Exported]:
    """Every case, exported once, when it is asked for."""
    return Exports(tmp_path_factory.mktemp("any"))


class Exports(dict):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Exported:
        self[name] = Exported(name, self.root / str(len(self)))
        return self[name]


def texts(batch: int = 3, length: int = 40) -> Tensor:
    """Ids with ends of documents: inside, at the last place, and two in a row."""
    ids = tiny.ids(5, batch, length)
    ids[0, 11] = ids[1, 6] = ids[1, length - 1] = ids[2, 20] = ids[2, 21] = EOD
    return ids


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@mark.parametrize("name", CASES)
@torch.no_grad()
def test_one_pass_token_by_token_and_generation(name: str, exports: dict[str, Exported]) -> None:
    case = exports[name]
    ours, theirs = case.ours, case.loaded()
    assert type(theirs) is MocteBlocksForCausalLM and case.facts["logit_difference"] < 1e-5
    ids = texts()
    expected = ours(ids, use_cache=False).logits
    close(theirs(ids, use_cache=False).logits, expected)
    cache, logits = DynamicCache(config=theirs.config.get_text_config()), []
    for part in ids.split([6, 1, 14, 1, 18], dim=1):
        logits.append(theirs(part, past_key_values=cache, use_cache=True).logits)
    close(torch.cat(logits, dim=1), expected)
    prompt = texts(length=24)[:2, :16]
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    wanted = theirs.generate(prompt, **how, use_cache=False)
    assert torch.equal(theirs.generate(prompt, **how, use_cache=True), wanted)
    assert torch.equal(ours.generate(prompt, **how, use_cache=False), wanted)
    for block in (m for m in theirs.modules() if hasattr(m, "banks")):  # the control: experts differ, and are used
        for bank in block.banks:
            bank.experts = nn.ModuleList([bank.experts[k] for k in (1, 2, 3, 0)])
    assert (theirs(ids).logits - expected).abs().max() > 1e-2 * expected.abs().max()


@mark.parametrize("name", STATEFUL)
@torch.no_grad()
def test_padding_and_beams(name: str, exports: dict[str, Exported]) -> None:
    """Padding on the left is the very token that ends documents; beams take their routing state along."""
    case = exports[name]
    ours, theirs = case.ours, case.loaded()
    lengths, ids = (9, 4, 1), texts()[:, :20]
    padded, mask = torch.full((3, 20), EOD), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 9 - length :] = ids[row, : length + 11]
        mask[row, 9 - length :] = 1
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache, logits = DynamicCache(config=theirs.config.get_text_config()), []
    for start, end in ((0, 9), *((t, t + 1) for t in range(9, 20))):
        part = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], "past_key_values": cache}
        logits.append(theirs(padded[:, start:end], **part).logits)
    one_pass = theirs(padded, attention_mask=mask, position_ids=places, use_cache=False).logits
    for row, length in enumerate(lengths):
        expected = ours(ids[row : row + 1, : length + 11], use_cache=False).logits[0]
        close(torch.cat(logits, dim=1)[row, -length - 11 :], expected)
        close(one_pass[row, -length - 11 :], expected)
    prompt = texts(length=24)[:2, :12]
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    moved, reorder = [], RoutingState.reorder_cache
    RoutingState.reorder_cache = lambda self, beams: (moved.append(beams), reorder(self, beams))[1]  # type: ignore
    try:
        with_cache, without = (theirs.generate(prompt, **how, use_cache=flag) for flag in (True, False))
    finally:
        RoutingState.reorder_cache = reorder  # type: ignore[method-assign]
    assert torch.equal(with_cache, without) and moved


@mark.parametrize("window", [None, 4])
def test_the_layer_of_the_routers_is_never_the_first_of_its_kind(window: int | None) -> None:
    """Transformers make masks for the first layer of the cache with a window, and for the first without."""
    config = AutoConfig.for_model("mistral", **{**SIZES, "sliding_window": window})
    cache, tokens = DynamicCache(config=config), Tokens.of((1, 3), torch.tensor([[1, 2, 3]]), None, {})
    layers = len(cache.layers)
    tokens.before()
    tokens.leave(cache)
    assert isinstance(cache.layers[-1], RoutingState) and len(cache.layers) == layers + 1
    assert cache.is_sliding == [window is not None] * (layers + 1)


WITHOUT_US = """
import json, sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mocte_ds", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    prompt = torch.tensor([[5, 7, 9, 11, 2, 3]])
    print(json.dumps(model.generate(prompt, max_new_tokens=12, do_sample=False).tolist()))
    model.save_pretrained(sys.argv[1])
"""


def test_without_this_package(exports: dict[str, Exported], tmp_path: Path) -> None:
    names = ["llama, banks", "phi3, lora", "opt, prefix, a block in warm-up", "xglm, lora"]
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path / "again"), *(str(exports[n].folder) for n in names)]
    home = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, **home})
    assert done.returncode == 0, done.stderr[-3000:]
    prompt = torch.tensor([[5, 7, 9, 11, 2, 3]])
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        theirs = exports[name].loaded()
        assert theirs.generate(prompt, max_new_tokens=12, do_sample=False).tolist() == json.loads(line)
    # What save_pretrained wrote there has the code beside it.
    assert (tmp_path / "again" / "keys_mocte.py").is_file()


@mark.parametrize("name", ["llama, prefix", "phi3, lora", "gemma3, previous", "opt, prefix, a block in warm-up"])
@torch.no_grad()
def test_a_dense_model_is_what_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    kind, sizes, blocks = CASES[name]
    model = made(kind, **sizes).bfloat16()
    model.save_pretrained(tmp_path / "wanted")
    source = source_of(model, require_base(base_facts(model), "here"), **{**blocks, "warmup": (0, 1)})
    facts = export_trained(source, tmp_path / "found")
    assert facts["architecture"] == type(model).__name__ and facts["dtype"] == "bf16" and facts["reason"] is None
    wanted, found = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("wanted", "found"))
    assert wanted == found
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("wanted", "found"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    if name.startswith("llama"):  # our class around a model without experts
        assert export_trained(source, tmp_path / "own", choice="own")["architecture"] == "MocteBlocksForCausalLM"
    how = {"trust_remote_code": False, "local_files_only": True}
    logits = [AutoModelForCausalLM.from_pretrained(tmp_path / n, **how)(texts()).logits for n in ("wanted", "found")]
    assert logits[0].dtype is torch.bfloat16 and torch.equal(*logits)


HARD, KV = {"kind": "token", "bias": False}, {"num_key_value_heads": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("llama", {}, {"router": HARD}, "MixtralForCausalLM"),
    "mistral, window": ("mistral", {"sliding_window": 6, **KV}, {"router": HARD}, "MixtralForCausalLM"),
    "tied llama, a block in warm-up": (
        "llama",
        {"tie_word_embeddings": True},
        {"router": HARD, "warmup": (0,)},
        "Qwen2MoeForCausalLM",
    ),
    "qwen2, softmax": ("qwen2", KV, {"router": {**HARD, **LEARNED}}, "Qwen2MoeForCausalLM"),
    "qwen3, lora": ("qwen3", {"head_dim": 8, **KV}, {"router": HARD, "expert": LORA}, "Glm4MoeForCausalLM"),
}


@mark.parametrize("name", list(MIXTURES))
@torch.no_grad()
def test_stock_classes_with_experts(name: str, tmp_path: Path) -> None:
    kind, sizes, blocks, wanted = MIXTURES[name]
    model = made(kind, **sizes)
    source = source_of(model, require_base(base_facts(model), "here"), LAYERS, **blocks)
    facts = export_trained(source, tmp_path / "out")
    assert (facts["architecture"], facts["reason"]) == (wanted, None) and facts["experts_compared"] > 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(theirs).__name__ == wanted
    close(theirs(texts()).logits, trained_model(source)(texts()).logits)
    other = export_trained(source, tmp_path / "own", choice="own")
    assert other["architecture"] == "MocteBlocksForCausalLM"


def test_a_generation_config_that_transformers_would_not_save(tmp_path: Path) -> None:
    model = made("llama")
    model.generation_config.top_k = 7
    with raises(ValueError, match="top_k"):
        model.save_pretrained(tmp_path / "theirs")
    source = source_of(model, require_base(base_facts(model), "here"), LAYERS, router=PREFIX)
    export_trained(source, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text())["top_k"] == 7
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config.top_k == 7


@torch.no_grad()
def test_bf16_keeps_routers_and_tables(tmp_path: Path) -> None:
    model = made("llama")
    base = require_base(base_facts(model), "here")
    banks = {"banks": [{**PREFIX, **LEARNED}, {"kind": "hash"}]}
    source = source_of(model, base, LAYERS, **banks)
    export_trained(source, tmp_path / "out", "bf16")
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).to(torch.bfloat16)
    for loaded in (narrow, again):
        assert loaded.dtype is torch.bfloat16 and loaded(texts()).logits.dtype is torch.bfloat16
        state = loaded.state_dict()
        for name, tensor in state.items():
            if ".gate." in name and "residual" not in name:
                ours = name.removeprefix("base.").replace(".gate.", ".deepspeed_moe.gate.")
                assert torch.equal(tensor, model.state_dict()[ours]), name
    # The model as it trains, rebuilt from the rounded weights, computes what the folder does.
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    close(wide(texts()).logits, trained_model(source)(texts()).logits)


def test_blocks_that_a_config_only_claims(exports: dict[str, Exported], tmp_path: Path) -> None:
    """Before a folder is evaluated, its blocks are held against its files: to build them could take all memory."""
    case = exports["phi3, lora"]
    config = json.loads((case.folder / "config.json").read_text())
    shapes = {name: tuple(t.shape) for name, t in case.loaded().state_dict().items()}
    require_blocks(config["blocks"], shapes, tmp_path)
    for change, told in (
        ({"num_experts": 10**9}, "2000000008 experts"),
        ({"vocab_size": 10**9}, "larger than any tensor"),
        ({"expert_sizes": {"gate_up_proj": [32, 10**9]}}, "larger than any tensor"),
        ({"banks": 5}, "its blocks are damaged"),
    ):
        with raises(CheckpointError, match=told):
            require_blocks([{**config["blocks"][0], **change}, config["blocks"][1]], shapes, tmp_path)
    with raises(CheckpointError, match="its blocks are damaged"):
        require_blocks(None, shapes, tmp_path)


def test_refusals(exports: dict[str, Exported], tmp_path: Path) -> None:
    case = exports["llama, prefix"]
    with raises(CheckpointError, match=r"no stock class routes by router.kind 'prefix'"):
        export_trained(case.source, tmp_path / "out", choice="stock")
    assert "router.kind 'prefix'" in export_trained(case.source, tmp_path / "auto")["reason"]
    with raises(CheckpointError, match="no stock class has experts in the layers of a Phi3ForCausalLM"):
        export_trained(exports["phi3, lora"].source, tmp_path / "out", choice="stock")
    with raises(CheckpointError, match="transformer.h.0.mlp is not the FFN of a layer"):
        export_trained(exports["gpt2, token"].source, tmp_path / "out", choice="stock")
    theirs = case.loaded()
    with torch.no_grad(), raises(RoutingError, match="call the whole model"):
        theirs.base(texts())
    with raises(ValueError, match="static cache"):
        theirs.generate(texts(), max_new_tokens=2, cache_implementation="static")
    model = made("llama")
    base = require_base(base_facts(model), "here")
    model.extra = nn.Linear(2, 2)
    with raises(CheckpointError, match=r"extra\.\w+ is in only one of two"):
        source_of(model, base, LAYERS)
    with raises(CheckpointError, match="holds a Mine; only causal language models"):
        source_of(made("llama"), {**base, "architecture": "Mine"}, LAYERS)
    assert not (tmp_path / "out").exists() and isinstance(case.ours.model.layers[0].mlp, Block)


def test_each_thread_is_in_a_call_of_its_own() -> None:
    """Two requests of a server that are computed at the same time."""
    running, seen = Running(), []
    running.call = mine = Call()
    thread = threading.Thread(target=lambda: seen.append(running.call))
    thread.start()
    thread.join()
    assert seen == [None] and running.call is mine
    first, second = copy.deepcopy([running, running])
    assert first is second and first.call is None and pickle.loads(pickle.dumps(running)).call is None
