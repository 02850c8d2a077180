"""Loads an export in a fresh process in which this package cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CODE = """
import sys
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mocte_ds", "tests", "examples"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM

folder, ids, out = sys.argv[1:4]
found = {}
for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        found[name] = model(torch.load(ids, weights_only=True), use_cache=False).logits
    found[name + " buffers"] = {name: tensor.dtype for name, tensor in model.named_buffers()}
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True, dtype=dtype).eval()
with torch.no_grad():
    found["again"] = again(torch.load(ids, weights_only=True), use_cache=False).logits
torch.save(found, out)
"""


def load_without_us(folder: Path, ids: Tensor, place: Path) -> dict[str, Any]:
    """Logits of an export in "fp32" and "bf16", "again" in bf16 after save_pretrained, and the types of its buffers.

    Args:
        folder: the export; ``folder``-again is written.
        ids: (B, T) token ids.
        place: folder for files in between.
    """
    torch.save(ids, place / "ids.pt")
    words = [sys.executable, "-I", "-c", _CODE, str(folder), str(place / "ids.pt"), str(place / "found.pt")]
    home = {"HF_MODULES_CACHE": str(place / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=150, env={**os.environ, **home})
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(place / "found.pt", weights_only=True)
