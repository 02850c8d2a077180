"""tools/study.py with a stand-in for the launcher: what is run, what is kept, what is refused, what is printed."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError, DataError, MocteError, NonFiniteLoss
from mocte_ds.study import launch
from mocte_ds.study.child import Job
from mocte_ds.training.lost import write_cause
from mocte_ds.training.model import model_facts
from mocte_ds.training.run_config import read_run
from tests.report.synthetic import write_dense_run, write_run
from tools.study import main

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]


class Launcher:
    """Writes invented logs where a run would write its own; runs of ``broken`` fail at once."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.commands: list[list[str]] = []
        self.broken, self.last_words = "", ""
        self.losses: dict[str, float] = {}
        """What a part of a run's name adds to its last loss."""
        self.diverging: tuple[str, ...] = ()
        """Beginnings of names of runs that diverge."""

    def __call__(self, jobs: Iterable[Job], at_once: int, finished: Callable[[Job, int], None]) -> None:
        for number, job in enumerate(jobs):
            command, environment = job.start(number % at_once)
            self.commands.append(list(command))
            finished(job, self.run(command, job.log, environment))

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """What the launcher would do; returns its exit code."""
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
        written = write(folder, steps=steps, budget=steps)
        facts, rows = written["facts"], written["metrics"]
        rows[-1]["validation"]["mean"] += next((gap for name, gap in self.losses.items() if name in folder.name), 0.0)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        save = {"event": "save", "step": steps, "tokens": rows[-1]["tokens"]}
        with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(save) + "\n")
        settings = run.resolve(2, 2, 2048)
        if "mocte" in settings:
            settings["mocte"] = MocteConfig.from_dict(settings["mocte"]).to_dict()
        sections = {name: asdict(getattr(run, name)) for name in ("training", "evaluation")}
        sections["model"] = model_facts(run.model)
        sections["training"].update(context=run.context, warmup_steps=run.warmup_steps)
        facts.update(world_size=2, deepspeed=settings, data={"weights": None}, **sections)
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
        if folder.name.startswith(self.diverging):
            write_cause(folder, 0, NonFiniteLoss("the loss of step 3 is nan"))
            return 2
        return 0


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    stand_in = Launcher()
    monkeypatch.setattr(launch, "run_jobs", stand_in)
    return stand_in


@pytest.fixture
def tool(study_file: Write, tmp_path: Path) -> Callable[..., None]:
    """Calls the tool on the study file that is there."""

    def call(*options: str) -> None:
        path = tmp_path / "studies" / "some.yaml"
        assert main([str(path if path.exists() else study_file()), "--out", str(tmp_path / "out"), *options]) == 0

    return call


def kept(tmp_path: Path) -> list[str]:
    """Runs in results.json; results.md has the same arms."""
    runs = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["runs"]
    tables = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    table = [line for line in tables.partition("\n## ")[0].splitlines() if line.startswith("|")] if runs else []
    assert {line.split("|")[1].strip() for line in table[2:]} == {run["arm"] for run in runs if not run["trial"]}
    return [f"{run['arm']}-seed{run['seed']}" for run in runs if not run["trial"]]


def test_list_shows_options_and_runs_nothing(
    study_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study_file(
        seeds=[0, 5],
        set={"training.steps": 200},
        arms={"dense": {"deepspeed.mocte": None}, "hash": {"deepspeed.mocte.router": {"kind": "hash"}}},
    )
    tool("--list", "--set", "deepspeed.mocte.freeze.rows=32")
    shared = "--set training.steps=200 --set deepspeed.mocte.freeze.rows=32"
    assert capsys.readouterr().out.splitlines() == [
        f"dense-seed0: --set training.seed=0 {shared} --set deepspeed.mocte=null",
        f'hash-seed0: --set training.seed=0 {shared} --set \'deepspeed.mocte.router={{"kind": "hash"}}\'',
        f"dense-seed5: --set training.seed=5 {shared} --set deepspeed.mocte=null",
        f'hash-seed5: --set training.seed=5 {shared} --set \'deepspeed.mocte.router={{"kind": "hash"}}\'',
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


def test_list_refuses_what_a_run_would_refuse(study_file: Write, tool: Callable) -> None:
    study_file(arms={"typo": {"deepspeed.mocte.rooter": {"kind": "hash"}}})
    with pytest.raises(ConfigError, match="arm typo, seed 0: unknown key mocte.rooter .*'router'"):
        tool("--list")


def test_only_and_seeds_choose_runs_and_results_of_the_others_stay(
    study_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hashed = {"deepspeed.mocte.router": {"kind": "hash"}}
    study_file(baseline="dense", arms={"dense": {"deepspeed.mocte": None}, "blocks": None, "hash": hashed})
    tool("--only", "blocks")
    # The baseline comes along, or there would be nothing to compare with.
    assert launcher.started == ["dense-seed0", "blocks-seed0"] == kept(tmp_path)
    output = capsys.readouterr().out
    out = tmp_path / "out"
    assert f"[1/2] dense-seed0: started, its output goes to {out / 'dense-seed0.log'}" in output
    assert "[2/2] blocks-seed0: done, loss 3.0629, 225 s" in output and "| vs dense |" in output
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
    assert len(launcher.started) == 5 and "[3/3] hash-seed0: found" in capsys.readouterr().out


def test_a_failed_run_says_why_and_goes_again_at_the_next_call(
    study_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path
) -> None:
    launcher.broken, launcher.last_words = "blocks", "error: no room\nerror: no room\n[launch.py] killed\n"
    study_file(seeds=[1, 2])
    log = tmp_path / "out" / "blocks-seed1.log"
    with pytest.raises(MocteError) as caught:
        tool()
    assert str(caught.value) == f"blocks-seed1 ended with exit code 1: no room. Its output is in {log}."
    assert launcher.started == ["dense-seed1", "blocks-seed1"] and kept(tmp_path) == ["dense-seed1"]
    # Another reason, which is not a message of ours: the end of what this start wrote, and of this start only.
    launcher.last_words = "Killed\n\n"
    with pytest.raises(MocteError) as caught:
        tool()
    end = "\n".join([*(f"line {number}" for number in range(13, 20)), "Killed"])
    assert str(caught.value) == f"blocks-seed1 ended with exit code 1: the end of {log}:\n{end}"
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
    study_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    plain = {"arms": {"a": None, "b": None}}
    study_file(**plain)
    tool()
    study_file(**{**plain, **keys})
    with pytest.raises(ConfigError, match=message):
        tool()
    assert len(launcher.started) == 2, "nothing may run before everything is looked at"
    # How often it is saved, and what fits into memory, makes no other run of it.
    study_file(**plain, set={"training.checkpoint_every": 3, "training.micro_batch": 4})
    tool()
    assert len(launcher.started) == 2 and len(kept(tmp_path)) == 2


def test_everything_is_checked_before_the_first_run(
    study_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path
) -> None:
    for arms, message in (
        (
            {"a": None, "b": {"training.batch_tokens": 5000}},
            "arm b, seed 0: training.batch_tokens = 5000 is not a multiple",
        ),
        ({"a": None, "b": {"deepspeed.mocte.ep_size": 4}}, "arm b, seed 0: mocte.ep_size = 4 does not divide"),
        ({"a": None, "b": {"model.vocab_size": 1000}}, "arm b, seed 0: the tokenizer has 2048 pieces"),
    ):
        study_file(arms=arms)
        with pytest.raises(ConfigError, match=message):
            tool()
    study_file(set={"data.prepared": str(tmp_path / "none")})
    with pytest.raises(DataError, match="none holds no prepared data"):
        tool()
    study_file()
    with pytest.raises(ConfigError, match="--only block: .*some.yaml has no such arm; arms: dense, blocks"):
        tool("--only", "block")
    assert not launcher.started and not (tmp_path / "out").exists()


def test_a_run_that_ends_early_is_no_result(
    tool: Callable, launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "run", lambda *_: 0)
    with pytest.raises(MocteError, match="dense-seed0 did not reach its last step; see .*dense-seed0.log"):
        tool()
    assert kept(tmp_path) == []


def test_trials_choose_the_rate_of_what_is_compared(
    study_file: Write, tool: Callable, launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study_file(
        seeds=[1, 2],
        learning_rates=[1e-3, 2e-3, 4e-3],
        baseline="dense",
        longer=[2],
        arms={"dense": {"deepspeed.mocte": None}, "blocks": None},
    )
    # The middle rate is the best one for dense, the largest one for blocks.
    launcher.losses = {"dense,lr=0.002": -0.5, "blocks,lr=0.004": -0.5}
    tool("--list")
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 6 + 2 * 3 and sum("best learning rate of its trials" in line for line in listed) == 6
    tool()
    trials, compared = launcher.started[:6], launcher.started[6:]
    assert trials == [f"trial-{arm},lr={rate}-seed1" for arm in ("dense", "blocks") for rate in (0.001, 0.002, 0.004)]
    names = ("dense,lr=0.002", "dense,lr=0.002,x2", "blocks,lr=0.004")
    assert compared == [f"{name}-seed{seed}" for seed in (1, 2) for name in names]
    rates = {
        name: [word for word in command if word.startswith("training.learning_rate=")]
        for name, command in zip(launcher.started, launcher.commands, strict=True)
    }
    assert {tuple(rates[name]) for name in compared if "dense" in name} == {("training.learning_rate=0.002",)}
    assert {tuple(rates[name]) for name in compared if "blocks" in name} == {("training.learning_rate=0.004",)}
    output = capsys.readouterr().out
    assert "blocks: the best learning rate, 0.004, is at the edge of those that were tried" in output
    assert "dense: the best" not in output and "| 0.004 (edge) |" in output
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "12 of 12 runs are done" in page and 'id="table-trials"' in page and 'id="figure-trials"' in page
    launcher.started.clear()
    tool("--seeds", "2")
    assert not launcher.started, "the trials keep the file's first seed"


def test_arms_wait_for_their_own_trials_only(study_file: Write, tool: Callable, launcher: Launcher) -> None:
    study_file(learning_rates=[1e-3, 2e-3], baseline="dense", arms={"dense": {"deepspeed.mocte": None}, "blocks": None})
    tool("--only", "dense")
    assert [name.partition(",")[0] for name in launcher.started] == ["trial-dense", "trial-dense", "dense"]
    tool("--only", "blocks")
    assert [name.partition(",")[0] for name in launcher.started[3:]] == ["trial-blocks", "trial-blocks", "blocks"]


def test_runs_side_by_side_have_devices_of_their_own(
    study_file: Write, tool: Callable, launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study_file(seeds=[0, 1])
    tool("--at-once", "2")
    assert all("--num_accelerators" in command for command in launcher.commands), "without GPUs there are none to share"
    study_file(seeds=[2, 3])
    monkeypatch.setattr(launch, "gpus", lambda: 4)
    tool("--at-once", "2")
    places = [command[command.index("--include") + 1] for command in launcher.commands[4:]]
    assert places == ["localhost:0,1", "localhost:2,3", "localhost:0,1", "localhost:2,3"]
    logged = (tmp_path / "out" / "blocks-seed2.log").read_text(encoding="utf-8").splitlines()[0]
    assert "localhost:2,3" in json.loads(logged), "the log has the command that was started"
    with pytest.raises(ConfigError, match="--at-once 3 wants 6 GPUs, and there are 4"):
        tool("--at-once", "3")


def test_a_trial_that_diverges_is_one_that_lost(
    study_file: Write, tool: Callable, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    study_file(learning_rates=[1e-3, 2e-3], arms={"blocks": None, "hash": {"deepspeed.mocte.router": {"kind": "hash"}}})
    launcher.diverging = ("trial-blocks,lr=0.002", "trial-hash")
    tool()
    assert launcher.started[4:] == ["blocks,lr=0.001-seed0"], "hash has no learning rate to run with"
    output = capsys.readouterr().out
    assert "[2/4] trial-blocks,lr=0.002-seed0: done, diverged" in output and "hash: all trials diverged" in output
    launcher.started.clear()
    tool()
    assert not launcher.started, "it is not tried again"
