"""Looking into a checkpoint: what it says must be what is there, and a damaged file must be named."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from pytest import CaptureFixture, mark, raises

from mocte_ds.checkpoints.inspection import checkpoint_facts, checkpoint_text
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.names import EXPERT_FILE, MODEL_FILE, OPTIMIZER_FILE
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest
from tests.checkpoints.damage import cut, digest, flip, swap
from tools.inspect_checkpoint import main

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_checkpoint.py"
SHARD = OPTIMIZER_FILE.format(precision="bf16_", rank=1)
EXPERT = EXPERT_FILE.format(layer=0, expert=1)


def tensor_bytes(content: object) -> int:
    """Bytes of all tensors in nested containers."""
    if torch.is_tensor(content):
        return content.numel() * content.element_size()
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return sum(map(tensor_bytes, values))


@mark.parametrize("name", ["ffn", "lora", "dense"])
def test_facts_are_those_of_the_files(written, name):
    (folder,) = [path for path in (written.folder / name).iterdir() if path.is_dir()]
    before = digest(folder)
    facts = checkpoint_facts(folder.parent)
    assert digest(folder) == before and facts == checkpoint_facts(folder)
    manifest = Manifest.read(folder)
    assert facts["whole"] and facts["latest"] and facts["path"] == str(folder)
    assert (facts["run"], facts["step"], facts["world_size"]) == (manifest.run, manifest.step, 2)
    assert {entry["name"]: entry["bytes"] for entry in facts["files"]} == {
        file: (folder / file).stat().st_size for file in manifest.files
    }
    content = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    shards = [content[OPTIMIZER_FILE.format(precision="bf16_", rank=rank)]["optimizer_state_dict"] for rank in (0, 1)]
    states = [state for shard in shards for state in shard["base_optimizer_state"]["state"].values()]
    sizes = facts["sizes"]
    assert sizes["weights"] == tensor_bytes(content[MODEL_FILE]["module"])
    assert sizes["experts"] == tensor_bytes([content[file] for file in content if file.startswith("layer_")])
    assert sizes["masters"] == tensor_bytes([shard["single_partition_of_fp32_groups"] for shard in shards])
    assert sizes["moments"] == tensor_bytes(states)
    assert sum(sizes.values()) == sum(entry["bytes"] for entry in facts["files"])
    assert (facts["zero_stage"], facts["bf16"]) == (2, True)
    if name == "dense":
        assert (facts["ep_size"], facts["tokens"], facts["blocks"]) == (1, content[MODEL_FILE]["tokens"], [])
        return
    state = content[STATE_FILE]["mocte"]
    assert (facts["ep_size"], facts["tokens"]) == (2, state["tokens"])
    assert [(block["name"], block["mode"]) for block in facts["blocks"]] == [
        (block["name"], block["mode"]) for block in state["blocks"]
    ]
    assert facts["blocks"][0]["experts"] == {"training": 3, "frozen": 1}
    text = checkpoint_text(facts)
    assert "specialising" in text and "3 training, 1 frozen" in text and "yes: every hash agrees" in text
    assert all(f"{file} " in text for file in manifest.files)


DAMAGES = {
    "flipped": (lambda folder: flip(folder / SHARD, 0.5), SHARD, "was changed: its sha256"),
    "torn": (lambda folder: cut(folder / STATE_FILE, 100), STATE_FILE, "is truncated to 100 of"),
    "missing": (lambda folder: (folder / EXPERT).unlink(), EXPERT, "is missing"),
    "mixed up": (lambda folder: swap(folder / EXPERT, folder / SHARD), EXPERT, f"holds the content of {SHARD}"),
    "too much": (lambda folder: (folder / "more.pt").write_bytes(b"x"), "more.pt", "does not belong to it"),
}


@mark.parametrize("case", DAMAGES)
def test_damage_is_named_and_told_by_the_exit_code(written, tmp_path, case, capsys: CaptureFixture):
    damage, name, problem = DAMAGES[case]
    folder = written.copy("ffn", tmp_path)
    assert main([str(folder)]) == 0
    damage(folder)
    capsys.readouterr()
    assert main([str(folder)]) == 1
    found = capsys.readouterr()
    (row,) = [line for line in found.out.splitlines() if line.startswith(f"{name} ")]
    assert problem in row and "whole       no: " in found.out
    assert f"{name} {problem}" in found.err
    assert main([str(folder), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["whole"]
    (entry,) = [entry for entry in facts["files"] if entry["name"] == name]
    assert problem in entry["problem"]
    assert (facts["blocks"] is None) == (name == STATE_FILE)


def test_what_is_no_checkpoint(written, tmp_path):
    folder = written.copy("ffn", tmp_path)
    (folder / MANIFEST_FILE).write_text("{}")
    with raises(CheckpointError, match=f"{MANIFEST_FILE} cannot be read"):
        checkpoint_facts(folder)
    ended = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "is not a checkpoint" in ended.stderr and "Traceback" not in ended.stderr


@mark.parametrize("name", ["ffn", "lora"])
def test_how_far_experts_have_grown_apart(written, name, capsys: CaptureFixture):
    """Against numpy, with every expert as one vector; a block in warm-up has no experts to compare."""
    (folder,) = [path for path in (written.folder / name).iterdir() if path.is_dir()]
    blocks = torch.load(folder / STATE_FILE, weights_only=True)["mocte"]["blocks"]
    assert main([str(folder), "--experts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["likeness"]
    assert [entry["block"] for entry in found] == [entry["name"] for entry in blocks if entry["mode"] != "warmup"]
    for layer, entry in enumerate(found):
        experts = [torch.load(folder / EXPERT_FILE.format(layer=layer, expert=k)) for k in range(entry["experts"])]
        rows = np.stack([np.concatenate([t.double().numpy().ravel() for t in expert.values()]) for expert in experts])
        size, mean = np.linalg.norm(rows, axis=1), rows.mean(0)
        np.testing.assert_allclose(entry["cosine"], rows @ rows.T / np.outer(size, size), atol=1e-9)
        apart = np.linalg.norm(rows - mean, axis=1) / np.linalg.norm(mean)
        np.testing.assert_allclose(entry["apart"], apart, rtol=1e-6)
        assert apart.max() > 1e-4, "they have trained"
    assert main([str(folder), "--experts"]) == 0
    text = capsys.readouterr().out
    assert all(f"{entry['block']} " in text for entry in found) and "cosine, mean" in text
