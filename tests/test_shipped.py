"""Run files and study files that ship are found by their names, and a user's own file goes first."""

from pathlib import Path

import pytest

from mocte_ds.errors import ConfigError
from mocte_ds.shipped import shipped_file, shipped_names
from mocte_ds.study import read_study
from mocte_ds.training.run_config import read_run

ROOT = Path(__file__).resolve().parents[1]


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_file("runs", "gpt-140m") == ROOT / "launch" / "runs" / "gpt-140m.yaml"
    assert shipped_file("studies", Path("smoke")) == ROOT / "launch" / "studies" / "smoke.yaml"
    for path in ("gpt-140m.yaml", "runs/gpt-140m", str(tmp_path / "gpt-140m")):
        assert shipped_file("runs", path) == Path(path), "a path stays what it is"
    (tmp_path / "quickstart").mkdir()
    assert shipped_file("runs", "quickstart").parent == ROOT / "launch" / "runs"
    (tmp_path / "gpt-140m").write_text("mine", encoding="utf-8")
    assert shipped_file("runs", "gpt-140m") == Path("gpt-140m")
    with pytest.raises(ConfigError, match="no file gpt-140, .*Did you mean 'gpt-140m'.*quickstart"):
        shipped_file("runs", "gpt-140")


def test_a_name_is_read_with_all_that_its_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shipped_names("runs"):
        if name != "smollm2-135m":  # starts from a model that is not there
            assert read_run(name).deepspeed["zero_optimization"], name
    assert read_study(shipped_file("studies", "smoke")).run.resolve() == ROOT / "launch" / "runs" / "cpu-small.yaml"
