"""Sweep files: which runs follow from them, and errors that name the file, the place and the mend in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.errors import ConfigError
from mocte_ds.sweep import Sweep, read_sweep
from mocte_ds.training.run_config import RunConfig

Write = Callable[..., Path]
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "launch" / "sweeps").glob("*.yaml"))


def configs(sweep: Sweep) -> dict[tuple[str, int], RunConfig]:
    """What launch/pretrain.py would read for each run."""
    return {(arm.name, seed): sweep.config(arm, seed) for arm, seed in sweep.runs()}


def test_arms_with_shared_changes_and_a_dense_twin(sweep_file: Write, run_file: Path) -> None:
    sweep = read_sweep(
        sweep_file(
            seeds=[3, 1],
            baseline="dense",
            set={"training.steps": 40, "deepspeed.mocte.freeze.policy": "off"},
            arms={
                "dense": {"deepspeed.mocte": None},
                "plain": None,
                "hash": {"deepspeed.mocte.router": {"kind": "hash"}, "training.steps": 50},
            },
        )
    )
    assert (sweep.run, sweep.processes, sweep.baseline) == (run_file, 2, "dense")
    # Seed by seed, so that a sweep that is ended early has whole seeds.
    assert list(configs(sweep)) == [("dense", 3), ("plain", 3), ("hash", 3), ("dense", 1), ("plain", 1), ("hash", 1)]
    for (name, seed), run in configs(sweep).items():
        assert run.training.seed == seed
        # An arm's own changes come after those that all share.
        assert run.training.steps == (50 if name == "hash" else 40)
        assert ("mocte" in run.deepspeed) is (name != "dense")
    runs = configs(sweep)
    assert runs["plain", 3].deepspeed["mocte"]["freeze"] == {"policy": "off"}  # a word, as it was written
    assert runs["plain", 3].deepspeed["mocte"]["router"] == {"bias": False}
    # A section as a value takes the place of the whole section.
    assert runs["hash", 3].deepspeed["mocte"]["router"] == {"kind": "hash"}


def test_a_grid_is_every_combination(sweep_file: Write) -> None:
    grid = {"training.learning_rate": [1e-3, 0.002], "deepspeed.mocte.router.bias": [True, False]}
    sweep = read_sweep(sweep_file(grid=grid, arms="left out", baseline="learning_rate=0.001,bias=true"))
    assert sweep.seeds == [0]
    found = {
        name: (run.training.learning_rate, run.deepspeed["mocte"]["router"]["bias"])
        for (name, _), run in configs(sweep).items()
    }
    assert found == {
        "learning_rate=0.001,bias=true": (0.001, True),
        "learning_rate=0.001,bias=false": (0.001, False),
        "learning_rate=0.002,bias=true": (0.002, True),
        "learning_rate=0.002,bias=false": (0.002, False),
    }


def test_arms_and_grid_together(sweep_file: Write) -> None:
    sweep = read_sweep(sweep_file(grid={"deepspeed.mocte.freeze.policy": ["off", "paper"]}))
    assert [arm.name for arm in sweep.arms] == ["dense", "blocks", "policy=off", "policy=paper"]


def test_changes_of_the_command_line_come_before_an_arms_own(sweep_file: Write) -> None:
    path = sweep_file(set={"training.steps": 40})
    sweep = read_sweep(path).with_shared(["training.steps=30", "deepspeed.mocte.freeze.rows=32"])
    runs = configs(sweep)
    assert {run.training.steps for run in runs.values()} == {30}
    assert runs["blocks", 0].deepspeed["mocte"]["freeze"] == {"rows": 32}
    assert "mocte" not in runs["dense", 0].deepspeed, "its blocks are gone, with what was changed in them"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"seed": [1]}, r"unknown key sweep.seed \(value \[1\]\). Did you mean 'seeds'\?"),
    ({"grids": {}}, "unknown key sweep.grids .*'grid'"),
    ({"run": "left out"}, "run = '' is not a file beside it; name the run file"),
    ({"run": "small.yaml"}, "run = 'small.yaml' is not a file beside it"),
    ({"run": "../runs"}, "run = '../runs' is not a file beside it"),
    ({"processes": 0}, "processes = 0 must be 1 or more"),
    ({"processes": "two"}, "sweep.processes = 'two' must be of type int"),
    ({"seeds": []}, r"seeds = \[\] must be at least one number"),
    ({"seeds": [1, 1]}, r"seeds = \[1, 1\] .*each of them once"),
    ({"seeds": 3}, "sweep.seeds = 3 must be of type list"),
    ({"baseline": "sparse"}, r"baseline = 'sparse' is not one of the arms \['dense', 'blocks'\]"),
    ({"arms": {}}, "there is no arm"),
    ({"arms": "left out"}, "there is no arm"),
    ({"arms": {"a": 5}}, "arms.a = 5 must be a section of changes"),
    ({"arms": {"a/b": None}}, "the arm's name 'a/b' becomes a folder"),
    ({"arms": {"..": None}}, "the arm's name '..' becomes a folder"),
    ({"arms": {"a|b": None}}, "the arm's name .* becomes a folder"),
    ({"arms": {"1": None, 1: None}}, "the key '1' is there twice"),
    ({"arms": {"steps=5": None}, "grid": {"training.steps": [5]}}, "there are 2 arms with the name 'steps=5'"),
    ({"arms": {"a": {"steps": 5}}}, "arms.a: 'steps' must be section.key of the run file"),
    ({"arms": {"a": {7: 5}}}, "arms.a: '7' must be section.key"),
    ({"set": {"steps": 5}}, "set: 'steps' must be section.key"),
    ({"grid": {"steps": [5]}}, "grid: 'steps' must be section.key"),
    ({"grid": {"training.steps": 5}}, "sweep.grid.training.steps = 5 must be of type list"),
    ({"grid": {"training.steps": []}}, "grid.training.steps has no values"),
    ({"grid": {"deepspeed.mocte.router": [{"kind": "hash"}]}}, "can be arms with names of your own"),
    ({"grid": {"training.seed": [1, 2]}}, "grid: every arm is run with every seed; use seeds"),
    ({"arms": {"a": {"training.seed": 1}}}, "arms.a: every arm is run with every seed"),
    (
        {"set": {"deepspeed.mocte.freeze.rows": 32}, "arms": {"a": {"deepspeed.mocte.freeze": {"alpha": 0.1}}}},
        "set has deepspeed.mocte.freeze.rows, but arm a has its own deepspeed.mocte.freeze",
    ),
]


@pytest.mark.parametrize(("keys", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_wrong_is_named(sweep_file: Write, keys: dict[str, Any], message: str) -> None:
    path = sweep_file(**keys)
    with pytest.raises(ConfigError, match=message) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)[: len(str(path)) + 15] and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a sweep file: it must have the keys run and arms or grid"),
        ("- a", "is not a sweep file"),
        ("arms: [", "cannot read .*expected"),
        ("arms: {a: {x.y: 1}, a: {x.y: 2}}", "the key 'a' is there twice.*line 1, column 21"),
        (
            "run: ../runs/small.yaml\narms: {a: {training.steps: 2026-01-01}}",
            "2026-01-01 is a .*date .*into quotes.* line 2",
        ),
    ],
)
def test_what_is_no_sweep_file(sweep_file: Write, text: str, message: str) -> None:
    path = sweep_file(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*none.yaml: No such file or directory"):
        read_sweep(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.seed=4", "use --seeds in place of training.seed"),
        ("deepspeed.mocte.router.kind=hash", "--set has deepspeed.mocte.router.kind, but arm mine has its own"),
        ("deepspeed.mocte.router={}", "--set has deepspeed.mocte.router, but arm mine has its own"),
    ],
)
def test_command_lines_that_arms_would_undo_are_refused(sweep_file: Write, change: str, message: str) -> None:
    sweep = read_sweep(sweep_file(arms={"mine": {"deepspeed.mocte.router": {"kind": "type"}}}))
    with pytest.raises(ConfigError, match=message):
        sweep.with_shared([change])


def test_an_error_of_the_run_file_names_the_arm(sweep_file: Write) -> None:
    sweep = read_sweep(sweep_file(arms={"good": None, "bad": {"training.step": 5}}))
    sweep.config(sweep.arms[0], 0)
    with pytest.raises(ConfigError, match="arm bad, seed 0: unknown key training.step .*Did you mean 'steps'"):
        sweep.config(sweep.arms[1], 0)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps(path: Path) -> None:
    sweep = read_sweep(path)
    for run in configs(sweep).values():
        run.resolve(sweep.processes, eod_id=2, vocab_size=run.model.vocab_size)


def test_every_arm_is_tried_with_every_learning_rate(sweep_file: Write) -> None:
    sweep = read_sweep(sweep_file(learning_rates=[1e-3, 0.002], baseline="dense"))
    assert {arm.name: arm.of for arm in sweep.arms} == {
        "dense,lr=0.001": "dense",
        "dense,lr=0.002": "dense",
        "blocks,lr=0.001": "blocks",
        "blocks,lr=0.002": "blocks",
    }
    rates = {name: run.training.learning_rate for (name, _), run in configs(sweep).items()}
    assert rates["dense,lr=0.001"] == rates["blocks,lr=0.001"] == 0.001 and rates["blocks,lr=0.002"] == 0.002


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rates": [0.0]}, "learning_rates"),
        ({"learning_rates": [1e-3, 1e-3]}, "each number once"),
        ({"learning_rates": [1e-3], "set": {"training.learning_rate": 1e-3}}, "set has training.learning_rate"),
        ({"learning_rates": [1e-3], "grid": {"training.learning_rate": [1e-3]}}, "has training.learning_rate"),
    ],
)
def test_learning_rates_that_say_nothing_are_refused(sweep_file: Write, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sweep(sweep_file(**keys))
