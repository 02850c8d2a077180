"""The script in the README runs as printed, through the launcher, and the README names what exists."""

import re
from pathlib import Path

from tests.e2e.conftest import ROOT, Launcher

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")


def test_script_runs_as_printed(launch: Launcher, tmp_path: Path) -> None:
    script = re.search(r"<!-- the test suite runs this script.*?```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in script.splitlines() if line.strip()]) <= 40 and "transformers" not in script
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    code, output = launch(tmp_path / "script.py")
    assert code == 0, output
    # The ranks' lines may run into each other.
    assert len(re.findall(r"\d+ emergence ", output)) == 2, output
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d\d), experts", output)]
    assert len(losses) == 2 and max(losses) < 4.5, "bytes without any learning cost ln 256 = 5.5"


def test_tree_names_what_exists() -> None:
    tree = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    names = re.findall(r"^    (\S+)", tree, re.MULTILINE)
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []
    for folder in ("mocte_ds", "launch"):
        for path in sorted((ROOT / folder).iterdir()):
            name = f"{folder}/{path.name}{'/' if path.is_dir() else ''}"
            if path.name not in ("__init__.py", "__pycache__", "hostfile"):
                assert name in names, f"{name} is not in docs/layout.md"


def test_commands_come_first() -> None:
    assert len(README.splitlines()) <= 150
    head = README[:900]
    assert "bash launch/quickstart.sh" in head and "bash launch/test.sh" in head


def test_commands_exist() -> None:
    for path in re.findall(r"(?:python|bash|sbatch[^/]*|deepspeed) ((?:launch|tools)/\S+)", PAGES):
        assert (ROOT / path.rstrip("`,.")).is_file(), path
