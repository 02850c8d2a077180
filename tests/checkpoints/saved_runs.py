"""Real checkpoints, written once by two processes."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mocte_ds.data import train_tokenizer
from tests.checkpoints import runs
from tests.spawn import spawn


@dataclass(frozen=True)
class SavedRuns:
    """Folders of checkpoints by the name of the run; not to be changed by a test."""

    folder: Path
    tokenizer: Path
    experts: dict[str, dict[tuple[str, int], dict[str, Any]]] = field(repr=False)
    """Matrices of every expert as the ranks held them, by run, block and number."""

    def copy(self, name: str, out: Path) -> Path:
        """A copy of one checkpoint (one tag), for a test to damage."""
        (tag,) = (path for path in (self.folder / name).iterdir() if path.is_dir())
        return Path(shutil.copytree(tag, out / name / tag.name))


def write(folder: Path) -> SavedRuns:
    """Checkpoints `ffn`, `lora` and `dense` in a folder."""
    texts = {"prose": [f"the river moves over stone {n} and light falls on dark water\n" for n in range(200)]}
    tokenizer = train_tokenizer(texts, folder / "own.model", 320)
    ranks = spawn(runs.write, 2, str(folder), str(tokenizer), timeout=150, deepspeed=True)
    experts = {name: {**ranks[0][name], **ranks[1][name]} for name in ranks[0]}
    return SavedRuns(folder, tokenizer, experts)
