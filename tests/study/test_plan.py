"""Study files: which runs follow from them, and errors that name the file, the place and the mend in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.errors import ConfigError
from mocte_ds.study import PlannedRun, Study, read_study
from mocte_ds.training.run_config import RunConfig

Write = Callable[..., Path]
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "launch" / "studies").glob("*.yaml"))


def runs(study: Study) -> list[PlannedRun]:
    """What is compared, with the run file's learning rate."""
    return study.runs({arm.name: None for arm in study.arms})


def configs(study: Study) -> dict[tuple[str, int], RunConfig]:
    """What launch/pretrain.py would read for each run."""
    return {(run.arm.name, run.seed): study.config(run) for run in runs(study)}


def test_arms_with_shared_changes_and_a_dense_twin(study_file: Write, run_file: Path) -> None:
    study = read_study(
        study_file(
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
    assert (study.run, study.processes, study.baseline) == (run_file, 2, "dense")
    # Seed by seed, so that a study that is ended early has complete seeds.
    assert list(configs(study)) == [("dense", 3), ("plain", 3), ("hash", 3), ("dense", 1), ("plain", 1), ("hash", 1)]
    for (name, seed), run in configs(study).items():
        assert run.training.seed == seed
        # An arm's own changes come after those that all share.
        assert run.training.steps == (50 if name == "hash" else 40)
        assert ("mocte" in run.deepspeed) is (name != "dense")
    read = configs(study)
    assert read["plain", 3].deepspeed["mocte"]["freeze"] == {"policy": "off"}  # a word, as it was written
    assert read["plain", 3].deepspeed["mocte"]["router"] == {"kind": "token", "bias": False}
    # A section as a value takes the place of the whole section.
    assert read["hash", 3].deepspeed["mocte"]["router"] == {"kind": "hash"}


def test_a_grid_is_every_combination(study_file: Write) -> None:
    grid = {"training.learning_rate": [1e-3, 0.002], "deepspeed.mocte.router.bias": [True, False]}
    study = read_study(study_file(grid=grid, arms="left out", baseline="learning_rate=0.001,bias=true"))
    assert study.seeds == [0]
    found = {
        name: (run.training.learning_rate, run.deepspeed["mocte"]["router"]["bias"])
        for (name, _), run in configs(study).items()
    }
    assert found == {
        "learning_rate=0.001,bias=true": (0.001, True),
        "learning_rate=0.001,bias=false": (0.001, False),
        "learning_rate=0.002,bias=true": (0.002, True),
        "learning_rate=0.002,bias=false": (0.002, False),
    }


def test_arms_and_grid_together(study_file: Write) -> None:
    study = read_study(study_file(grid={"deepspeed.mocte.freeze.policy": ["off", "paper"]}))
    assert [arm.name for arm in study.arms] == ["dense", "blocks", "policy=off", "policy=paper"]


def test_changes_of_the_command_line_come_before_an_arms_own(study_file: Write) -> None:
    path = study_file(set={"training.steps": 40})
    study = read_study(path).with_shared(["training.steps=30", "deepspeed.mocte.freeze.rows=32"])
    read = configs(study)
    assert {run.training.steps for run in read.values()} == {30}
    assert read["blocks", 0].deepspeed["mocte"]["freeze"] == {"rows": 32}
    assert "mocte" not in read["dense", 0].deepspeed, "its blocks are gone, with what was changed in them"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"seed": [1]}, r"unknown key study.seed \(value \[1\]\). Did you mean 'seeds'\?"),
    ({"grids": {}}, "unknown key study.grids .*'grid'"),
    ({"run": "left out"}, "run = '' is not a file beside it; name the run file"),
    ({"run": "small.yaml"}, "run = 'small.yaml' is not a file beside it"),
    ({"run": "../runs"}, "run = '../runs' is not a file beside it"),
    ({"processes": 0}, "processes = 0 must be 1 or more"),
    ({"processes": "two"}, "study.processes = 'two' must be of type int"),
    ({"seeds": []}, r"seeds = \[\] must be at least one number"),
    ({"seeds": [1, 1]}, r"seeds = \[1, 1\] .*each of them once"),
    ({"seeds": 3}, "study.seeds = 3 must be of type list"),
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
    ({"grid": {"training.steps": 5}}, "study.grid.training.steps = 5 must be of type list"),
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
def test_what_is_wrong_is_named(study_file: Write, keys: dict[str, Any], message: str) -> None:
    path = study_file(**keys)
    with pytest.raises(ConfigError, match=message) as caught:
        read_study(path)
    assert str(path) in str(caught.value)[: len(str(path)) + 15] and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a study file: it must have the keys run and arms or grid"),
        ("- a", "is not a study file"),
        ("arms: [", "cannot read .*expected"),
        ("arms: {a: {x.y: 1}, a: {x.y: 2}}", "the key 'a' is there twice.*line 1, column 21"),
        (
            "run: ../runs/small.yaml\narms: {a: {training.steps: 2026-01-01}}",
            "2026-01-01 is a .*date .*into quotes.* line 2",
        ),
    ],
)
def test_what_is_no_study_file(study_file: Write, text: str, message: str) -> None:
    path = study_file(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_study(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*none.yaml: No such file or directory"):
        read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.seed=4", "use --seeds in place of training.seed"),
        ("deepspeed.mocte.router.kind=hash", "--set has deepspeed.mocte.router.kind, but arm mine has its own"),
        ("deepspeed.mocte.router={}", "--set has deepspeed.mocte.router, but arm mine has its own"),
    ],
)
def test_command_lines_that_arms_would_undo_are_refused(study_file: Write, change: str, message: str) -> None:
    study = read_study(study_file(arms={"mine": {"deepspeed.mocte.router": {"kind": "type"}}}))
    with pytest.raises(ConfigError, match=message):
        study.with_shared([change])


def test_a_learning_rate_for_all_arms_beside_trials_is_refused(study_file: Write) -> None:
    study = read_study(study_file(learning_rates=[1e-3, 2e-3]))
    with pytest.raises(ConfigError, match="--set has training.learning_rate, and every arm is tried with all"):
        study.with_shared(["training.learning_rate=0.1"])


def test_an_error_of_the_run_file_names_the_arm(study_file: Write) -> None:
    study = read_study(study_file(arms={"good": None, "bad": {"training.step": 5}}))
    study.config(PlannedRun(study.arms[0], 0))
    with pytest.raises(ConfigError, match="arm bad, seed 0: unknown key training.step .*Did you mean 'steps'"):
        study.config(PlannedRun(study.arms[1], 0))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies(path: Path) -> None:
    study = read_study(path)
    for run in configs(study).values():
        run.resolve(study.processes, eod_id=2, vocab_size=run.model.vocab_size)


def test_every_arm_has_equal_trials_and_then_its_own_rate(study_file: Write) -> None:
    arms = {"dense": {"deepspeed.mocte": None}, "short": {"training.steps": 100}}
    changes = {"training.warmup_steps": 30, "evaluation.every": 25, "training.checkpoint_every": 0}
    study = read_study(
        study_file(
            learning_rates=[0.002, 1e-3], seeds=[4, 5], arms=arms, set=changes, baseline="dense", longer=[2, 0.5]
        )
    )
    trials = {trial.name: study.config(trial).training for trial in study.trials()}
    # A fifth of each arm's own steps; what is counted in steps goes along, and 0 stays 0.
    assert {name: (found.learning_rate, found.steps, found.seed) for name, found in trials.items()} == {
        "trial-dense,lr=0.001-seed4": (0.001, 60, 4),
        "trial-dense,lr=0.002-seed4": (0.002, 60, 4),
        "trial-short,lr=0.001-seed4": (0.001, 20, 4),
        "trial-short,lr=0.002-seed4": (0.002, 20, 4),
    }
    assert {(found.warmup_steps, found.checkpoint_every) for found in trials.values()} == {(6, 0)}
    assert {study.config(trial).evaluation.every for trial in study.trials()} == {5}
    compared = {run.name: study.config(run).training for run in study.runs({"dense": 0.002, "short": 0.001})}
    assert {name: (found.learning_rate, found.steps) for name, found in compared.items()} == {
        "dense,lr=0.002-seed4": (0.002, 300),
        "dense,lr=0.002,x0.5-seed4": (0.002, 150),
        "dense,lr=0.002,x2-seed4": (0.002, 600),
        "short,lr=0.001-seed4": (0.001, 100),
        "dense,lr=0.002-seed5": (0.002, 300),
        "dense,lr=0.002,x0.5-seed5": (0.002, 150),
        "dense,lr=0.002,x2-seed5": (0.002, 600),
        "short,lr=0.001-seed5": (0.001, 100),
    }
    assert [run.name for run in study.runs({"short": 0.001})] == ["short,lr=0.001-seed4", "short,lr=0.001-seed5"], (
        "dense is not tuned yet"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rates": [0.0]}, "learning_rates"),
        ({"learning_rates": [1e-3, 1e-3]}, "each number once"),
        ({"learning_rates": [1e-3], "set": {"training.learning_rate": 1e-3}}, "set has training.learning_rate"),
        ({"longer": [2]}, r"longer = \[2.*\] must be other budgets of the baseline"),
        ({"baseline": "dense", "longer": [1, 2]}, "1 is run anyway"),
        ({"baseline": "dense", "longer": [2, 2]}, "each of them once"),
        ({"trial_budget": 1.0}, "trial_budget = 1.0 must be"),
        ({"learning_rates": [1e-3], "grid": {"training.learning_rate": [1e-3]}}, "has training.learning_rate"),
    ],
)
def test_learning_rates_that_say_nothing_are_refused(study_file: Write, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_study(study_file(**keys))


@pytest.mark.parametrize(
    "change",
    [{"deepspeed.scheduler": {"type": "WarmupLR", "params": {}}}, {"deepspeed.mocte.apply_after": 3}],
)
def test_what_counts_steps_by_itself_is_refused_beside_other_budgets(study_file: Write, change: dict[str, Any]) -> None:
    study = read_study(study_file(learning_rates=[1e-3, 2e-3], arms={"mine": change}))
    with pytest.raises(ConfigError, match="arm mine: deepspeed.scheduler and mocte.apply_after count steps"):
        study.changes(study.trials()[0])
    study.config(PlannedRun(study.arms[0], 0))
