"""Models whose weights stay in their files are those that transformers load, bit by bit."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mocte_ds.convert.hf import by_layer
from mocte_ds.convert.hf.by_layer import ByLayer, load_by_layer
from mocte_ds.convert.hf.imported import import_hf
from mocte_ds.errors import CheckpointError
from tests.convert.hf.test_import import CONFIGS, write_folder

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = ("bloom", "falcon", "gemma3_text", "gpt2", "llama", "mamba", "mixtral", "opt", "phi3", "qwen2_moe")


def folder_of(kind: str, path: Path, dtype: torch.dtype, **more: Any) -> Path:
    values = {**SIZES, **SPECIAL, **({"num_key_value_heads": 2} if kind in ("mixtral", "qwen2_moe") else {}), **more}
    if kind == "mamba":
        del values["num_attention_heads"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path, max_shard_size="20KB")
    return path


def loaded(folder: Path, beside: Path, dtype: torch.dtype = torch.float32) -> ByLayer:
    return load_by_layer(folder, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_logits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "folder", dtype)
    (tmp_path / "beside").mkdir()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, expected = loaded(folder, tmp_path / "beside"), whole.state_dict()
    blanks = found.model.state_dict(keep_vars=True)
    assert blanks.keys() == expected.keys()
    assert all(torch.equal(found.value(blanks[name]), tensor) for name, tensor in expected.items())
    ids = torch.arange(3, 3 + 48).reshape(2, 24)
    for _ in range(2):
        assert all(parameter.is_meta for parameter in found.model.parameters())
        with torch.no_grad(), found.running() as model:
            assert torch.equal(model(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
            layers = model.get_submodule("backbone.layers" if kind == "mamba" else stack(model))
            assert all(parameter.is_meta for parameter in layers.parameters())
    assert not any((tmp_path / "beside").iterdir()), "what transformers have made lies in files without a name"


def stack(model: Any) -> str:
    return next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))


def test_a_tied_matrix_is_in_memory_once(tmp_path: Path) -> None:
    found = loaded(folder_of("llama", tmp_path / "folder", torch.float32, tie_word_embeddings=True), tmp_path)
    with found.running() as model:
        assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta


def test_no_room_for_what_transformers_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = folder_of("mixtral", tmp_path / "folder", torch.float32), dict(os.environ)

    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(by_layer.tempfile, "TemporaryFile", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        loaded(folder, tmp_path)
    assert dict(os.environ) == before
    monkeypatch.undo()
    # The way in which transformers load is theirs again.
    assert not any(p.is_meta for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


@pytest.mark.parametrize("stage", ["comparing", "writing", "reading what"])
def test_an_import_that_is_interrupted_leaves_nothing(stage: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", CONFIGS["llama"])
    (tmp_path / "out").mkdir()

    def interrupt(text: str) -> None:
        if text.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_hf(folder, tmp_path / "out" / "start", tell=interrupt)
    assert not [path for path in (tmp_path / "out").rglob("*") if not path.name.endswith(".lock")]
