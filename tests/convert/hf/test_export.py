"""A checkpoint of two processes becomes a folder that transformers loads by itself; damage is refused by name."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from pytest import fixture, mark, raises
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mocte_ds.convert.hf.export import export
from mocte_ds.errors import CheckpointError, ConfigError, NotOurs
from tests.checkpoints import runs
from tests.checkpoints.by_hand import sign
from tests.checkpoints.loaded import load_model
from tools import export_hf

ROOT = Path(__file__).resolve().parents[3]
PLACES = {
    "ffn": "model.layers.{}.block_sparse_moe.experts.{}.w{}.weight",
    "lora": "model.layers.{}.mlp.experts.{}.{}_proj.weight",
}


def digest(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@mark.parametrize(
    ("name", "stock", "dtype"),
    [
        ("ffn", "MixtralForCausalLM", "fp32"),
        ("ffn", "MixtralForCausalLM", "bf16"),
        ("lora", "Glm4MoeForCausalLM", "fp32"),
        ("dense", "LlamaForCausalLM", "fp32"),
    ],
)
def test_transformers_loads_and_generates(written, tmp_path, name, stock, dtype):
    before = digest(written.folder)
    facts = export(written.folder / name, tmp_path / "export", dtype)
    assert digest(written.folder) == before
    assert facts["architecture"] == stock and facts["logit_difference"] < 1e-5
    assert facts["experts_compared"] == {"ffn": 8, "lora": 4, "dense": 0}[name]
    assert json.loads((tmp_path / "export" / "export.json").read_text()) == {
        **facts,
        "step": 3 if name == "dense" else 9,
    }
    assert not [path.name for path in (tmp_path / "export").iterdir() if path.suffix in (".py", ".bin", ".pt")]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=False)
    assert type(model).__name__ == stock and model.dtype is {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    batch = tokenizer("the river moves", return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(generated[0], skip_special_tokens=True)
    assert generated.shape[1] > batch.input_ids.shape[1] and text.startswith("the river moves")
    ours, _ = load_model(written.folder / name)
    ids = torch.randint(runs.VOCAB, (2, 30), generator=torch.Generator().manual_seed(3))
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    with torch.no_grad():
        expected, *found = (m(input_ids=ids).logits.float() for m in (ours, wide, model))
    # What was trained is in bf16, and so both exports hold it exactly. Computing in bf16 sends the few tokens near a
    # boundary to another expert.
    exact, narrow = ((logits - expected).abs().amax(-1) / expected.abs().max() for logits in found)
    share, close = {"fp32": (1.0, 1e-5), "bf16": (0.9, 0.1)}[dtype]
    assert exact.max() < 1e-5 and narrow.quantile(share) < close


@mark.parametrize(("name", "parts"), [("ffn", ("1", "3", "2")), ("lora", ("gate", "up", "down"))])
def test_every_expert_is_what_its_rank_held(written, tmp_path, name, parts):
    """Read from the stored file alone, without transformers and without a line of ours."""
    export(written.folder / name, tmp_path / "export", "fp32")
    with safe_open(tmp_path / "export" / "model.safetensors", "np") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    experts = written.experts[name]
    assert len(experts) == {"ffn": 8, "lora": 4}[name]
    seen = set()
    for (block, k), matrices in experts.items():
        for part, own in zip(parts, ("gate_proj", "up_proj", "down_proj"), strict=True):
            matrix = stored[PLACES[name].format(block.split(".")[2], k, part)]
            assert (matrix == matrices[f"{own}.weight"]).all()
            seen.add(matrix.tobytes())
    assert len(seen) == 3 * len(experts), "the run must leave experts that all differ"


@fixture
def fresh(written, tmp_path) -> Path:
    """A checkpoint to damage."""
    return written.copy("ffn", tmp_path)


def swap(one: str, other: str):
    """A damage: two files change names."""

    def damage(folder: Path) -> None:
        (folder / one).rename(folder / "between")
        (folder / other).rename(folder / one)
        (folder / "between").rename(folder / other)

    return damage


def edit(name: str, change):
    """A damage: the content of a file changes."""

    def damage(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=True)
        torch.save(change(content), folder / name)

    return damage


def cut(name: str, share: float):
    """A damage: the end of a file is missing."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def expert(layer: int, k: int) -> str:
    return f"layer_{layer}_expert_{k}_mp_rank_00_model_states.pt"


MAIN, STATE = "mp_rank_00_model_states.pt", "mocte_state.pt"


def in_state(**changes):
    """A change of our own state."""
    return lambda content: {**content, "mocte": {**content["mocte"], **changes}}


def runs_router(folder: Path) -> dict:
    """The router of a checkpoint's config."""
    return torch.load(folder / STATE, weights_only=True)["mocte"]["config"]["router"]


def in_config(**changes):
    return lambda content: {
        **content,
        "mocte": {**content["mocte"], "config": {**content["mocte"]["config"], **changes}},
    }


def without_norms(content: dict) -> dict:
    return {**content, "module": {name: value for name, value in content["module"].items() if "norm" not in name}}


@mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / expert(1, 2)).unlink(), f"{expert(1, 2)} is missing"),
        (swap(expert(0, 1), expert(0, 3)), f"{expert(0, 1)} holds .*experts.3.* not expert 1 of model.layers.0.mlp"),
        (swap(expert(0, 2), expert(1, 2)), f"{expert(0, 2)} holds model.layers.1.* not expert 2 of model.layers.0.mlp"),
        (cut(expert(1, 3), 0.6), f"{expert(1, 3)} cannot be read"),
        (cut(expert(1, 3), 0), f"{expert(1, 3)} cannot be read"),
        (edit(expert(0, 0), lambda content: {}), f"{expert(0, 0)} does not hold gate_proj.weight"),
        (edit(expert(0, 0), lambda content: list(content)), f"{expert(0, 0)} has no keys"),
        (
            edit(expert(0, 0), lambda content: {key: value[:-1] for key, value in content.items()}),
            rf"{expert(0, 0)} does not hold gate_proj.weight \(48, 32\)",
        ),
        (
            lambda folder: shutil.copy(folder / expert(1, 3), folder / expert(1, 4)),
            f"holds {expert(1, 4)}, an expert that",
        ),
        (
            lambda folder: shutil.copy(folder / expert(1, 3), folder / expert(2, 0)),
            f"holds {expert(2, 0)}, an expert that",
        ),
        (cut(MAIN, 0.9), f"{MAIN} cannot be read"),
        (edit(MAIN, lambda content: {"weights": {}}), f"{MAIN} has no module, global_steps"),
        (edit(MAIN, lambda content: {**content, "module": {}}), "the config belongs to another model"),
        (edit(MAIN, without_norms), "does not fit its own model: missing"),
        (cut(STATE, 0.5), f"{STATE} cannot be read"),
        (edit(STATE, lambda content: [content]), f"{STATE} has no keys"),
        (edit(STATE, lambda content: {**content, "base": None}), "does not say which model it holds"),
        (edit(STATE, in_state(blocks=[])), r"lists the blocks \[\]"),
        (edit(STATE, in_config(num_experts=8)), f"{expert(0, 4)} is missing"),
        (edit(STATE, in_config(num_experts=2)), f"holds {expert(0, 2)}, an expert that"),
        (lambda folder: (folder / STATE).unlink(), "an expert that its mocte_state.pt does not know"),
    ],
)
def test_damage_is_refused_by_name(fresh, tmp_path, damage, message):
    damage(fresh)
    with raises(CheckpointError, match=f"is damaged|{message}"):
        export(fresh, tmp_path / "export")
    sign(fresh)  # a manifest that agrees does not help
    with raises(CheckpointError, match=message):
        export(fresh, tmp_path / "export")
    assert not [path for path in tmp_path.iterdir() if "export" in path.name]


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@mark.parametrize("name", [MAIN, STATE, expert(0, 1)])
@mark.parametrize("as_zip", [True, False])
def test_code_in_a_checkpoint_is_not_executed(fresh, tmp_path, name, as_zip):
    attack = {"module": Exploit(tmp_path / "executed"), "format": 1}
    if as_zip:
        torch.save(attack, fresh / name)
    else:
        (fresh / name).write_bytes(pickle.dumps(attack, protocol=2))
    with raises(CheckpointError, match=f"is damaged: {name}"):
        export(fresh, tmp_path / "export")
    sign(fresh)
    with raises(CheckpointError, match=f"{name} cannot be read"):
        export(fresh, tmp_path / "export")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(attack))
    assert (tmp_path / "executed").exists(), "the attack must work where nobody looks"


def test_folders_that_are_no_checkpoint(written, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "latest").write_text("step7")
    for folder, message in (
        (tmp_path / "nowhere", "nowhere is not a folder"),
        (written.tokenizer, "own.model is not a folder"),
        (tmp_path / "empty", "empty is not a checkpoint: neither a file 'latest' nor"),
        (tmp_path / "torn", "names the checkpoint 'step7', which is not there"),
    ):
        with raises(CheckpointError, match=message):
            export(folder, tmp_path / "export")
    (tmp_path / "torn" / "latest").write_text("")
    with raises(CheckpointError, match="names the checkpoint ''"):
        export(tmp_path / "torn", tmp_path / "export")


def test_the_tokenizer_of_a_run_that_moved(fresh, written, tmp_path):
    edit(STATE, lambda c: {**c, "client_state": {**c["client_state"], "tokenizer": "/gone/tokenizer.model"}})(fresh)
    sign(fresh)
    with raises(CheckpointError, match="no tokenizer: the checkpoint names /gone/tokenizer.model and.*--tokenizer"):
        export(fresh, tmp_path / "export")
    with raises(CheckpointError, match="missing.model cannot be read"):
        export(fresh, tmp_path / "export", tokenizer_path=tmp_path / "missing.model")
    shutil.copy(written.tokenizer, tmp_path / "tokenizer.model")  # as in runs/NAME/checkpoints/step9
    assert export(fresh, tmp_path / "export")["experts_compared"] == 8
    with raises(ConfigError, match="dtype = 'fp64' is not one of"):
        export(fresh, tmp_path / "export", "fp64")


def test_an_earlier_export_is_replaced_whole_or_stays(fresh, tmp_path):
    out = tmp_path / "export"
    export(fresh, out, shard_bytes=20_000)
    before = digest(out)
    (fresh / expert(0, 0)).rename(fresh / "hidden")
    with raises(CheckpointError, match="is missing"):
        export(fresh, out)
    assert digest(out) == before
    (fresh / "hidden").rename(fresh / expert(0, 0))
    (out / "notes.txt").write_text("of the user")
    with raises(NotOurs, match="notes.txt was not written by mocte-ds"):
        export(fresh, out, "bf16")
    (out / "notes.txt").unlink()
    assert digest(out) == before and "model.safetensors.index.json" in before
    export(fresh, out, "bf16")
    assert "model.safetensors.index.json" not in digest(out)
    assert json.loads((out / "export.json").read_text())["dtype"] == "bf16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "ffn"]


def test_folders_with_other_things_are_not_replaced(fresh, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "mine", "holds something else"),
        (tmp_path / "file", "holds something else"),
        (fresh, "overlap"),
        (fresh.parent, "overlap"),
        (tmp_path, "overlap"),
        (fresh / "export", "overlap"),
    ):
        before = digest(tmp_path)
        with raises(ConfigError, match=message):
            export(fresh, out)
        assert digest(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert export(fresh, tmp_path / "empty")["experts_compared"] == 8
    with raises(CheckpointError, match="could not write|cannot write"):
        export(fresh, tmp_path / "file" / "below")


def test_a_full_disk_leaves_nothing_behind(fresh, tmp_path):
    """A limit on the size of files stands for the disk: the weights do not fit into 20 kB."""
    command = [sys.executable, "tools/export_hf.py", str(fresh), str(tmp_path / "out" / "export"), "--json"]
    shell = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and not done.stdout
    assert "error: could not write" in done.stderr and "Traceback" not in done.stderr
    assert not any((tmp_path / "out").iterdir())


def test_too_little_room_is_said_before_anything_is_written(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    with raises(CheckpointError, match=r"export needs 1 MB and 0 MB are free there\. Nothing was written"):
        export(fresh, tmp_path / "out" / "export")
    assert not (tmp_path / "out").exists()


def test_command_line(fresh, tmp_path, capsys):
    assert export_hf.main([str(fresh.parent / "step9"), str(tmp_path / "export"), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["path"] == str(tmp_path / "export") and facts["experts_compared"] == 8
    assert "reading" in captured.err and "comparing" in captured.err
    assert export_hf.main([str(fresh), str(tmp_path / "export")]) == 0
    assert "8 experts equal" in capsys.readouterr().out
    assert export_hf.main([str(fresh), str(tmp_path / "export"), "--class", "own"]) == 0
    assert "is a MocteBlocksForCausalLM" in capsys.readouterr().out
    edit(STATE, in_config(router={**runs_router(fresh), "kind": "prefix"}))(fresh)
    sign(fresh)
    with raises(CheckpointError, match="no stock class routes by router.kind 'prefix'"):
        export_hf.main([str(fresh), str(tmp_path / "export"), "--class", "stock"])
    assert export_hf.main([str(fresh), str(tmp_path / "export")]) == 0
    assert "no stock class: no stock class routes by" in capsys.readouterr().out
    card = (tmp_path / "export" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "routers: prefix (weight hard)" in card
