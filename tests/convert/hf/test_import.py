"""Hugging Face folders as starts of a run: the same function, and bit by bit the same weights when exported again."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from mocte_ds.convert.hf.export import export
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block
from mocte_ds.training.init import InitialWeights
from tests.checkpoints.loaded import load_model
from tools.import_hf import main

VOCAB = 320
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""Stretched positions."""
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **HEADS, eos_token_id=0),
    "tied": LlamaConfig(**SIZES, **HEADS, eos_token_id=0, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "wide heads": LlamaConfig(**SIZES, **HEADS, eos_token_id=0, head_dim=16),
    "positions of llama 3": LlamaConfig(
        **SIZES,
        **HEADS,
        eos_token_id=0,
        rope_parameters=LLAMA3,
    ),
    "linear positions": LlamaConfig(
        **SIZES, **HEADS, eos_token_id=0, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": MistralConfig(**SIZES, **HEADS, eos_token_id=0, sliding_window=None),
    "mistral, short window": MistralConfig(**SIZES, **HEADS, eos_token_id=0, sliding_window=12),
    "qwen2": Qwen2Config(**SIZES, **HEADS, eos_token_id=0),
    "qwen3": Qwen3Config(**SIZES, **HEADS, eos_token_id=0, head_dim=12),
    "yarn, relu": LlamaConfig(
        **SIZES,
        **HEADS,
        eos_token_id=0,
        hidden_act="relu",
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "gpt_neox": GPTNeoXConfig(
        **SIZES, num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0
    ),
    "opt": OPTConfig(
        **SIZES,
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    ),
}


def write_folder(
    folder: Path, config: PreTrainedConfig, change: Any = None, dtype: torch.dtype = torch.float32
) -> Path:
    """A model with random weights, biases too, and a tokenizer of bytes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if change:
        change(model)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog on the cat"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CONFIGS] + [("gpt2", torch.bfloat16), ("llama", torch.float16)],
)
def test_function_and_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder", CONFIGS[name], dtype=dtype)
    before = fingerprint(source)
    assert main([str(source), str(tmp_path / "start")]) == 0
    assert fingerprint(source) == before
    ids = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ours, state = load_model(tmp_path / "start")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert state["step"] == 0 and state["mocte"] is None
    export(tmp_path / "start", tmp_path / "back")
    found, expected = weights(tmp_path / "back"), weights(source)
    assert set(found) == set(expected)
    assert all(found[key].dtype is dtype and torch.equal(found[key], expected[key]) for key in expected)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((source / file).read_text())
    old, new = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "back"))
    different = {key for key in old if old[key] != new.get(key)}
    # Dropout is none of a decoder's.
    passed = {"_name_or_path", "transformers_version", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
    assert not different - passed, {key: (old[key], new.get(key)) for key in different}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_own_class_computes_it_too(name: str, tmp_path: Path) -> None:
    """In one pass and token by token."""
    source = write_folder(tmp_path / "folder", CONFIGS[name])
    main([str(source), str(tmp_path / "start")])
    export(tmp_path / "start", tmp_path / "own", choice="own")
    ids = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    made = [model.generate(ids[:, :20], max_new_tokens=20, do_sample=False) for model in (own, theirs)]
    assert torch.equal(*made)


def test_the_dtype_of_the_files_stays_whatever_the_config_says(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder", CONFIGS["llama"])
    setting(dtype="bfloat16", torch_dtype="bfloat16")(source)
    main([str(source), str(tmp_path / "start")])
    export(tmp_path / "start", tmp_path / "back")
    found, expected = weights(tmp_path / "back"), weights(source)
    assert all(found[key].dtype is torch.float32 and torch.equal(found[key], expected[key]) for key in expected)


def test_masks_that_old_files_hold_are_passed_over(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder", CONFIGS["gpt_neox"])
    first = min(source.glob("*.safetensors"))
    tensors = load_file(first)
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    save_file(tensors, first, metadata={"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["gpt_neox.layers.0.attention.bias"] = first.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main([str(source), str(tmp_path / "start")]) == 0


def test_a_folder_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As save_pretrained of a model alone leaves it."""
    source = write_folder(tmp_path / "folder", CONFIGS["llama"])
    for path in source.glob("*token*"):
        path.unlink()
    with pytest.raises(MocteError, match="has no tokenizer, and .* holds texts"):
        main([str(source), str(tmp_path / "start"), "--emerge", str(tmp_path)])
    assert main([str(source), str(tmp_path / "start")]) == 0
    assert "has no tokenizer: weights alone" in capsys.readouterr().err
    export(tmp_path / "start", tmp_path / "back")
    found, expected = weights(tmp_path / "back"), weights(source)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not list((tmp_path / "back").glob("*token*"))
    old, new = (json.loads((folder / "generation_config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert old == new and new["eos_token_id"] == 0


def test_an_export_that_was_changed_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "folder", CONFIGS["llama"])
    main([str(source), str(tmp_path / "start")])
    export(tmp_path / "start", tmp_path / "back")
    assert main([str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    path = tmp_path / "back" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MocteError, match="model.layers.1.mlp.up_proj.weight is not what checksums.json says"):
        main([str(tmp_path / "back"), str(tmp_path / "more")])
    (tmp_path / "back" / "checksums.json").unlink()
    (tmp_path / "back" / ".mocte-ds.json").unlink()
    assert main([str(tmp_path / "back"), str(tmp_path / "more")]) == 0


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {"modules": "model.layers.*.mlp", "router": {"kind": "token"}}),
        ("qwen2", {"modules": "model.layers.*.mlp", "router": None}),
        ("opt", {"router": {"kind": "token"}}),
        ("opt", {"router": {"kind": "token"}, "expert": {"kind": "lora"}}),
    ],
)
def test_emerged_at_once(name: str, more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Experts are copies of the FFNs, routed by clusters of the features that the corpus gives."""
    source, corpus = write_folder(tmp_path / "folder", CONFIGS[name]), tmp_path / "corpus"
    corpus.mkdir()
    for domain, text in {"cats": "the cat sat on the mat ", "numbers": "1 2 3 5 8 13 21 34 "}.items():
        lines = [json.dumps({"text": f"{text * 6}{i} {text * (i % 5)}"}) for i in range(80)]
        (corpus / f"{domain}.jsonl").write_text("\n".join(lines))
    config = {"mocte": {"num_experts": 4, "spectrum": {"rows": 512, "documents": 64}, **more}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--emerge", str(corpus), "--config", str(tmp_path / "config.json"), "--context", "48", "--json"]
    assert main([str(source), str(tmp_path / "start"), *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["clusters"]) == 2 and facts["tokens"] > 0
    ours, state = load_model(tmp_path / "start")
    blocks = [module for module in ours.modules() if isinstance(module, Block)]
    assert [str(block.mode) for block in blocks] == ["specialising"] * 2 and len(state["blocks"]) == 2
    ids = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)
    for block in blocks:
        key = block.banks[0].deepspeed_moe.gate.key
        routed = key.cluster_weight if more["router"] else key.cluster_table
        assert routed.abs().sum() > 0 and len(routed.unique(dim=0)) == 4
    if name != "opt":  # whose FFN is no module in its own class
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        for block in blocks:
            for expert in block.banks[0].local_experts:
                copies, ffn = expert.state_dict(), theirs.get_submodule(block.name).state_dict()
                assert copies.keys() == ffn.keys() and all(torch.equal(copies[key], ffn[key]) for key in ffn)
    # What a run that starts from it takes over before its blocks are made: all but the FFNs that experts replace.
    dense, model = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    InitialWeights(tmp_path / "start").fill(model)
    replaced = (".mlp.", ".fc1.", ".fc2.") if more.get("expert") is None else ("none",)
    for path, parameter in model.named_parameters():
        gone = any(step in path for step in replaced)
        assert torch.equal(parameter, torch.zeros_like(parameter) if gone else dense.get_parameter(path)), path


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def missing(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def twice(folder: Path) -> None:
    shutil.copyfile(sorted(folder.glob("model-*.safetensors"))[0], folder / "model.safetensors")


def no_room(folder: Path) -> None:
    """A folder whose weights are larger than any disk: what the disk says is changed by the test."""


def truncated(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-7])


def swapped(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def pickled(folder: Path) -> None:
    for path in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Exploit(folder.parent / "made")}))


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def setting(**values: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (missing, "model-00002-of"),
        (twice, "holds both model.safetensors and model.safetensors.index.json"),
        (no_room, "MB are free there. Nothing was written"),
        (truncated, "model-00002-of"),
        (swapped, "model-0000"),
        (pickled, "safetensors"),
        (without_tokenizer, "tokenizer.json"),
        (setting(architectures=["BloomForCausalLM"]), "BloomForCausalLM"),
        (setting(max_position_embeddings=-3), "max_position_embeddings"),
        (setting(hidden_act="no such"), "no such"),
        (setting(bos_token_id=10**29), "config.json"),
        (setting(initializer_range=float("nan")), "initializer_range"),
        (setting(attention_bias=True), "bias"),
        (setting(num_hidden_layers=3), "layers.2"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else value,
)
def test_what_does_not_fit_is_refused_by_name(
    harm: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folder(tmp_path / "folder", CONFIGS["llama"])
    harm(source)
    if harm is no_room:
        monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1_000_000))
    before = fingerprint(source)
    with pytest.raises(MocteError) as caught:
        main([str(source), str(tmp_path / "start")])
    assert told in str(caught.value)
    assert fingerprint(source) == before and not (tmp_path / "made").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
