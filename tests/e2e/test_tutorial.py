"""The laptop's part of docs/tutorial.md runs as printed, on less text and with fewer steps; all its commands exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mocte_ds.completion import _options
from tests.e2e.conftest import ROOT, read_log

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
LESS = (
    "training.steps=12 training.batch_tokens=2048 training.micro_batch=4 training.warmup_steps=2 evaluation.every=6 "
    "evaluation.sequences_per_domain=1 model.num_hidden_layers=2 model.hidden_size=64 model.intermediate_size=96 "
    "deepspeed.mocte.check_every=0.1 deepspeed.mocte.clusters.deadline=0.3"
).split()


def commands(text: str) -> list[list[str]]:
    """Words of the commands of a part of the page, lines that go on put together, comments left out."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\\n      ", "")
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.usefixtures("deepspeed_op")
def test_the_laptop_with_its_own_text(tmp_path: Path) -> None:
    part = PAGE.split("\n## 2. ")[1].split("\n## ")[0]
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", part, re.DOTALL).group(1), encoding="utf-8")
    (tmp_path / "corpus").mkdir()
    for name in ("qa_en", "code_py"):
        shutil.copy(ROOT / "mocte_ds" / "corpus" / f"{name}.jsonl.gz", tmp_path / "corpus")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    # In front, so that `mocte-ds` and `python` are this environment's.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = {}
    for words in commands(part):
        more = [word for change in LESS for word in ("--set", change)] if words[1] == "pretrain" else []
        done = subprocess.run(
            [*words, *more],
            cwd=tmp_path,
            env=environment,
            input="A question:\n",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        said[words[1]] = done.stdout
    run = tmp_path / "runs" / "mine"
    assert [row["step"] for row in read_log(run)] == list(range(1, 13))
    assert "emergence" in [event["event"] for event in read_log(run, "events")]
    assert (run / "report" / "index.html").stat().st_size > 10_000
    assert "qa_en" in said["evaluate"] and "code_py" in said["evaluate"]
    assert said["examples/chat.py"].strip()


def test_every_command_exists() -> None:
    found = commands(PAGE)
    assert len(found) > 20
    for words in found:
        paths = [word for word in words if re.match(r"(launch|examples)/[\w/.]+\.(py|sh|yaml|sbatch|example)$", word)]
        assert all((ROOT / path).is_file() for path in paths), words
        if words[0] == "mocte-ds":
            tool = words[1].replace("-", "_")
            assert (ROOT / "tools" / f"{tool}.py").is_file(), words
            options = {word for word in words[2:] if word.startswith("--")}
            assert options <= {*_options(tool)}, words
