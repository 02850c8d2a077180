"""Sources with words of their own, prepared; and dense models as checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mocte_ds.base_model import base_facts
from mocte_ds.checkpoints.weights import write_weights
from mocte_ds.data import Manifest, prepare, train_tokenizer
from mocte_ds.data.stored_tokenizer import tokenizer_in
from mocte_ds.training.model import TransformersModel, make_model

CONTEXT, SOURCES = 24, 4
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = {
    "river": "river stone water bank flows deep cold fish boat bridge",
    "stars": "star light night planet orbit moon bright dark sky comet",
    "bread": "bread flour yeast oven salt dough knead bake crust warm",
    "rails": "train track signal station engine wagon ticket platform late whistle",
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of two sources each, documents of very different lengths."""
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    (folder / "corpus").mkdir()
    for domain, sources in (("first", ("river", "stars")), ("second", ("bread", "rails"))):
        lines = []
        for number in range(120):
            words = TEXTS[sources[number % 2]].split()
            text = " ".join(rng.choice(words, int(rng.integers(20, 90))))
            lines.append(json.dumps({"text": f"{sources[number % 2]} {text}"}))
        (folder / "corpus" / f"{domain}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer(folder / "corpus", folder / "tokenizer.model", 300)
    prepare(folder / "corpus", folder / "data", tokenizer, validation_share=0.2, workers=1, progress=False)
    return folder / "data"


@pytest.fixture
def dense(prepared: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Writes a dense model of large random weights as a checkpoint of weights alone."""

    def write(name: str, seed: int, change: Callable[[Any], None] | None = None, **more: Any) -> tuple[Path, Any]:
        manifest = Manifest.read(prepared)
        torch.manual_seed(seed)
        values = {"model_type": "llama", "vocab_size": manifest.vocab_size, "max_position_embeddings": CONTEXT, **SIZES}
        hf = {key: value for key, value in {**values, **more.pop("hf", {})}.items() if value is not None}
        model = make_model(TransformersModel(hf=hf, **more), manifest.eod_id)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        if change is not None:
            change(model)
        folder = tmp_path / name / "checkpoints" / "step3"
        folder.mkdir(parents=True)
        state = {"step": 3, "tokens": 0, "mocte": None, "blocks": [], "tokenizer": str(tokenizer_in(prepared))}
        write_weights(folder, name, model, dict(model.state_dict()), {**state, "base": base_facts(model)})
        (folder.parent / "latest").write_text("step3")
        return folder.parent, model.eval()

    return write
