"""tools/sweep.py with a stand-in for the launcher: what is run, what is kept, what is refused, what is printed."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError, DataError, MocteError
from mocte_ds.sweep import launch
from mocte_ds.training.model import model_facts
from mocte_ds.training.run_config import read_run
from tests.report.synthetic import write_dense_run, write_run
from tools.sweep import main

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]


class Launcher:
    """Writes invented logs where a run would write its own; runs of ``broken`` fail at once."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.broken, self.last_words = "", ""

    def __call__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        words = dict(zip(command, command[1:], strict=False))
        folder = Path(words["--out"])
        self.started.append(folder.name)
        assert log == folder.parent / f"{folder.name}.log"
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(f"line {number}\n" for number in range(20)))
            if folder.name.startswith(self.broken or "none"):
                file.write(self.last_words)
                return 1
        changes = [word for before, word in zip(command, command[1:], strict=False) if before == "--set"]
        run = read_run(words["--run"], changes)
        steps = run.training.steps
        write = write_run if "mocte" in run.deepspeed else write_dense_run
        facts = write(folder, steps=steps, budget=steps)["facts"]
        settings = run.resolve(int(words["--num_accelerators"]), 2, 2048)
        if "mocte" in settings:
            settings["mocte"] = MocteConfig.from_dict(settings["mocte"]).to_dict()
        sections = {name: asdict(getattr(run, name)) for name in ("training", "evaluation")}
        sections["model"] = model_facts(run.model)
        sections["training"].update(context=run.context, warmup_steps=run.warmup_steps)
        facts.update(world_size=2, deepspeed=settings, data={"weights": None}, **sections)
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
        return 0


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    stand_in = Launcher()
    monkeypatch.setattr(launch, "run_to_end", stand_in)
    return stand_in


@pytest.fixture
def tool(sweep_file: Write, tmp_path: Path) -> Callable[..., None]:
    """Calls the tool on the sweep file that is there."""

    def call(*options: str) -> None:
        path = tmp_path / "sweeps" / "some.yaml"
        assert main([str(path if path.exists() else sweep_file()), "--out", str(tmp_path / "out"), *options]) == 0

    return call


def kept(tmp_path: Path) -> list[str]:
    """Runs in results.json; results.md has the same arms."""
    runs = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["runs"]
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8").split("\n\n")[0]
    assert {line.split("|")[1].strip() for line in table.splitlines()[2:]} == {run["arm"] for run in runs}
    return [f"{run['arm']}-seed{run['seed']}" for run in runs]


def test_list_shows_options_and_runs_nothing(
    sweep_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file(
        seeds=[0, 5],
        set={"training.steps": 200},
        arms={"dense": {"deepspeed.mocte": None}, "hash": {"deepspeed.mocte.router": {"kind": "hash"}}},
    )
    tool("--list", "--set", "deepspeed.mocte.freeze.rows=32")
    shared = "--set training.steps=200 --set deepspeed.mocte.freeze.rows=32"
    assert capsys.readouterr().out.splitlines() == [
        f"dense seed 0: --set training.seed=0 {shared} --set deepspeed.mocte=null",
        f'hash seed 0: --set training.seed=0 {shared} --set \'deepspeed.mocte.router={{"kind": "hash"}}\'',
        f"dense seed 5: --set training.seed=5 {shared} --set deepspeed.mocte=null",
        f'hash seed 5: --set training.seed=5 {shared} --set \'deepspeed.mocte.router={{"kind": "hash"}}\'',
    ]
    tool("--list", "--only", "hash", "--seeds", "9")
    (line,) = capsys.readouterr().out.splitlines()
    words = shlex.split(line.partition(": ")[2])  # as a shell reads it
    assert words[1] == "training.seed=9" and words[-1] == 'deepspeed.mocte.router={"kind": "hash"}'
    tool("--list", "--json", "--seeds", "5", "5")
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [("dense", 5), ("hash", 5)]
    assert runs[0]["set"] == ["training.seed=5", "training.steps=200", "deepspeed.mocte=null"]
    assert not launcher.started and not (tmp_path / "out").exists()


def test_list_refuses_what_a_run_would_refuse(sweep_file: Write, tool: Callable) -> None:
    sweep_file(arms={"typo": {"deepspeed.mocte.rooter": {"kind": "hash"}}})
    with pytest.raises(ConfigError, match="arm typo, seed 0: unknown key mocte.rooter .*'router'"):
        tool("--list")


def test_only_and_seeds_choose_runs_and_results_of_the_others_stay(
    sweep_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hashed = {"deepspeed.mocte.router": {"kind": "hash"}}
    sweep_file(baseline="dense", arms={"dense": {"deepspeed.mocte": None}, "blocks": None, "hash": hashed})
    tool("--only", "blocks")
    # The baseline comes along, or there would be nothing to compare with.
    assert launcher.started == ["dense-seed0", "blocks-seed0"] == kept(tmp_path)
    output = capsys.readouterr().out
    out = tmp_path / "out"
    assert f"[1/2] dense seed 0: started, its output goes to {out / 'dense-seed0.log'}" in output
    assert "[2/2] blocks seed 0: done, loss 3.0629, 225 s" in output and "| vs dense |" in output
    tool("--only", "hash", "--seeds", "4")
    assert launcher.started[2:] == ["dense-seed4", "hash-seed4"]
    assert kept(tmp_path) == ["dense-seed0", "blocks-seed0", "dense-seed4", "hash-seed4"]
    capsys.readouterr()
    tool("--json")
    assert launcher.started[4:] == ["hash-seed0"]
    shown = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["arm"], run["seed"]) for run in shown] == [("dense", 0), ("blocks", 0), ("hash", 0)]
    assert kept(tmp_path) == ["dense-seed0", "blocks-seed0", "hash-seed0"], "seed 4 is not in the file"
    tool()
    assert len(launcher.started) == 5 and "[3/3] hash seed 0: found" in capsys.readouterr().out


def test_a_failed_run_says_why_and_goes_again_at_the_next_call(
    sweep_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path
) -> None:
    launcher.broken, launcher.last_words = "blocks", "error: no room\nerror: no room\n[launch.py] killed\n"
    sweep_file(seeds=[1, 2])
    log = tmp_path / "out" / "blocks-seed1.log"
    with pytest.raises(MocteError) as caught:
        tool()
    assert str(caught.value) == f"blocks seed 1 ended with exit code 1: no room. Its output is in {log}."
    assert launcher.started == ["dense-seed1", "blocks-seed1"] and kept(tmp_path) == ["dense-seed1"]
    # Another reason, which is no message of ours: the end of what this start wrote, and of this start only.
    launcher.last_words = "Killed\n\n"
    with pytest.raises(MocteError) as caught:
        tool()
    end = "\n".join([*(f"line {number}" for number in range(13, 20)), "Killed"])
    assert str(caught.value) == f"blocks seed 1 ended with exit code 1: the end of {log}:\n{end}"
    assert log.read_text(encoding="utf-8").count("no room") == 2, "the log of the start before is still there"
    assert launcher.started == ["dense-seed1", "blocks-seed1", "blocks-seed1"] and kept(tmp_path) == ["dense-seed1"]
    launcher.broken = ""
    tool()
    assert kept(tmp_path) == ["dense-seed1", "blocks-seed1", "dense-seed2", "blocks-seed2"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arms": {"a": None, "b": {"training.steps": 200}}}, "b-seed0 holds .*: training.steps is 300, not 200"),
        (
            {"arms": {"a": None, "b": {"deepspeed.mocte.router.kind": "hash"}}},
            "deepspeed.mocte.router.kind is 'token', not 'hash'",
        ),
        (
            {"arms": {"a": None, "b": {"deepspeed.mocte.router": None, "deepspeed.mocte.banks": [{"kind": "hash"}]}}},
            "deepspeed.mocte.banks is None, not a section",
        ),
        ({"arms": {"a": {"deepspeed.mocte": None}, "b": None}}, "a-seed0 holds .* it is a run with blocks"),
        ({"arms": {"a": None, "b": {"data.weights": {"law": 2}}}}, "data.weights is None, not {'law': 2.0}"),
        ({"processes": 1, "set": {"deepspeed.mocte.ep_size": 1}}, "world_size is 2, not 1"),
    ],
)
def test_a_run_of_other_settings_is_not_taken_for_this_one(
    sweep_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    plain = {"arms": {"a": None, "b": None}}
    sweep_file(**plain)
    tool()
    sweep_file(**{**plain, **keys})
    with pytest.raises(ConfigError, match=message):
        tool()
    assert len(launcher.started) == 2, "nothing may run before everything is looked at"
    # How often it is saved, and what fits into memory, makes no other run of it.
    sweep_file(**plain, set={"training.checkpoint_every": 3, "training.micro_batch": 4})
    tool()
    assert len(launcher.started) == 2 and len(kept(tmp_path)) == 2


def test_everything_is_checked_before_the_first_run(
    sweep_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path
) -> None:
    for arms, message in (
        (
            {"a": None, "b": {"training.batch_tokens": 5000}},
            "arm b, seed 0: training.batch_tokens = 5000 is not a multiple",
        ),
        ({"a": None, "b": {"deepspeed.mocte.ep_size": 4}}, "arm b, seed 0: mocte.ep_size = 4 does not divide"),
        ({"a": None, "b": {"model.vocab_size": 1000}}, "arm b, seed 0: the tokenizer has 2048 pieces"),
    ):
        sweep_file(arms=arms)
        with pytest.raises(ConfigError, match=message):
            tool()
    sweep_file(set={"data.prepared": str(tmp_path / "none")})
    with pytest.raises(DataError, match="none holds no prepared data"):
        tool()
    sweep_file()
    with pytest.raises(ConfigError, match="--only block: .*some.yaml has no such arm; arms: dense, blocks"):
        tool("--only", "block")
    assert not launcher.started and not (tmp_path / "out").exists()


def test_a_run_that_ends_early_is_no_result(
    tool: Callable, launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "run_to_end", lambda *_: 0)
    with pytest.raises(MocteError, match="dense-seed0 did not reach its last step; see .*dense-seed0.log"):
        tool()
    assert kept(tmp_path) == []


def test_without_the_launcher(tool: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MocteError, match="there is no program `deepspeed`"):
        tool()


def test_installed_without_the_repository(tmp_path: Path) -> None:
    """As in site-packages: the package with its tools, and no launch/ beside it."""
    shutil.copytree(ROOT / "mocte_ds", tmp_path / "mocte_ds", ignore=shutil.ignore_patterns("__pycache__", "*.gz"))
    shutil.copytree(ROOT / "tools", tmp_path / "mocte_ds" / "tools")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mocte_ds.command import main; main()"
    command = [sys.executable, "-c", code, "sweep", "sweep.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: sweeps start launch/pretrain.py") and done.stderr.count("\n") == 1
    assert "run tools/sweep.py in a checkout" in done.stderr and str(tmp_path / "launch") in done.stderr
