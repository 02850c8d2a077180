"""The key of examples/kind_of_byte.py in a run on two ranks: exported by the run and from its checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mocte_ds.user_files import import_files
from tests.convert.hf.without_us import load_without_us
from tests.engine import runs
from tests.spawn import spawn

ROOT = Path(__file__).resolve().parents[2]
KEY = ROOT / "examples" / "kind_of_byte.py"


def train_and_export(folder: str) -> tuple[dict[str, Any], Any]:
    """What the export of the run says, and its logits; a checkpoint is left."""
    import mocte_ds

    import_files([KEY])
    settings = runs.config(auto=False, router={"kind": "kind-of-byte"}, total_steps=10)
    settings.update(bf16={"enabled": False}, gradient_accumulation_steps=1)
    del settings["scheduler"]
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    for step in range(6):
        if step == 2:
            engine.mocte.emerge(0)
            engine.mocte.emerge(1)
        ids, _ = runs.batch(step, torch.distributed.get_rank())
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    facts = engine.mocte.export(Path(folder) / "live")
    engine.save_checkpoint(Path(folder) / "checkpoints")
    engine.eval()
    with torch.no_grad():
        return facts, engine(input_ids=runs.batch(9, 0)[0]).logits.numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> tuple[Path, dict[str, Any], torch.Tensor]:
    """Folder with export and checkpoint, what the export says, and the logits of the engine."""
    folder = tmp_path_factory.mktemp("run")
    (facts, logits), (others, _) = spawn(train_and_export, 2, str(folder), timeout=180, deepspeed=True)
    assert facts == others
    return folder, facts, torch.from_numpy(logits)


def test_the_run_exports_it(run: Any, tmp_path: Path) -> None:
    folder, facts, expected = run
    assert facts["architecture"] == "MocteBlocksForCausalLM" and facts["experts_compared"] == 8
    found = load_without_us(folder / "live", runs.batch(9, 0)[0], tmp_path)
    torch.testing.assert_close(found["fp32"], expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def export_hf(*words: Any) -> tuple[int, str]:
    command = [sys.executable, ROOT / "tools" / "export_hf.py", *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=150, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def test_the_tool_needs_to_be_told_where_the_key_is(run: Any, tmp_path: Path) -> None:
    folder = run[0]
    code, output = export_hf(folder / "checkpoints", tmp_path / "export")
    assert code == 2 and "'kind-of-byte' is not one of" in output and "--import FILE" in output, output
    assert not (tmp_path / "export").exists()
    code, output = export_hf(folder / "checkpoints", tmp_path / "export", "--import", KEY)
    assert code == 0 and "user_key_kind_of_byte_mocte.py there is a copy" in output, output
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder / "live", tmp_path / "export"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in ("user_key_kind_of_byte_mocte.py", "user_keys_mocte.py", "config.json"):
        assert (folder / "live" / file).read_bytes() == (tmp_path / "export" / file).read_bytes(), file
