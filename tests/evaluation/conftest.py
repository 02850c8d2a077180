"""A small decoder that stands for a checkpoint's, and prepared text of two domains for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mocte_ds.data import prepare, train_tokenizer
from mocte_ds.evaluation import features as module

CONTEXT, WIDTH = 8, 16


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains."""
    out = tmp_path_factory.mktemp("features")
    texts = {name: [f"{name} {n} and {n * n} of {n % 7}\n" for n in range(120)] for name in ("apples", "stones")}
    (out / "corpus").mkdir()
    for name, found in texts.items():
        (out / "corpus" / f"{name}.txt").write_text("\n".join(found))
    tokenizer = train_tokenizer(texts, out / "own.model", 290)
    prepare(out / "corpus", out / "data", tokenizer, 0.5, workers=1, progress=False)
    return out / "data"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for the model of a checkpoint."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 290, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5, max_position_embeddings=CONTEXT)
    made = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(module, "load_live", lambda *_: (made, None))
    return made
