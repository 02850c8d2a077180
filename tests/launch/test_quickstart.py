"""The quickstart's steps: what each is told, what is used again, and how it ends where a step fails."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from mocte_ds.hosts import local
from tools import quickstart


class Steps:
    """A stand-in for the programs that are started."""

    def __init__(self, out: Path) -> None:
        self.out, self.started, self.codes = out, [], {}

    def run(self, words: Sequence[str], _values: object) -> int:
        self.started.append(list(words))
        name = next(Path(word).stem for word in words if word.endswith(".py"))
        made = {
            "pretrain": "checkpoints/latest",
            "export_hf": "export/export.json",
            "evaluate": "evaluation/results.json",
        }
        if name in made and not self.codes.get(name):
            path = self.out / made[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}", encoding="utf-8")
            order = list(made).index(name)
            os.utime(path, (1000 + order, 1000 + order))
        return self.codes.get(name, 0)

    def names(self) -> list[str]:
        """Of the scripts, in the order of their starts."""
        names = [next(Path(word).stem for word in words if word.endswith(".py")) for words in self.started]
        self.started.clear()
        return names


@pytest.mark.parametrize("name", ["a #1", "[1]", "a: b", "r ü", "null", 'x"y', "12"])
def test_names_of_folders_stay_names_in_yaml(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = Steps(Path(name))
    monkeypatch.setattr(local, "run", steps.run)
    assert quickstart.main(["--out", name, "--set", "training.steps=4"]) == 0
    options = steps.started[2]
    changes = [word for before, word in zip(options, options[1:], strict=False) if before == "--set"]
    read = dict(change.split("=", 1) for change in changes)
    assert yaml.safe_load(read["data.prepared"]) == f"{name}/data" and changes[-1] == "training.steps=4"
    assert options[options.index("--out") + 1] == name


def test_what_is_newer_than_its_source_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps(tmp_path)
    monkeypatch.setattr(local, "run", steps.run)
    monkeypatch.setenv("EVAL_LIMIT", "3")
    quickstart.main(["--out", str(tmp_path)])
    assert steps.started[4][-4:-2] == ["--limit", "3"]
    assert steps.names() == ["train_tokenizer", "prepare_data", "pretrain", "export_hf", "evaluate", "report"]
    capsys.readouterr()
    quickstart.main(["--out", str(tmp_path)])
    assert steps.names() == ["train_tokenizer", "prepare_data", "pretrain", "report"]
    output = capsys.readouterr().out
    assert f"found {tmp_path}/export\n" in output and f"found {tmp_path}/evaluation/results.json\n" in output
    os.utime(tmp_path / "export" / "export.json", (2000, 2000))
    quickstart.main(["--out", str(tmp_path)])
    assert steps.names() == ["train_tokenizer", "prepare_data", "pretrain", "evaluate", "report"]


def test_a_step_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(tmp_path)
    steps.codes = {"pretrain": 7}
    monkeypatch.setattr(local, "run", steps.run)
    with pytest.raises(SystemExit) as ended:
        quickstart.main(["--out", str(tmp_path)])
    assert ended.value.code == 7 and steps.names() == ["train_tokenizer", "prepare_data", "pretrain"]
