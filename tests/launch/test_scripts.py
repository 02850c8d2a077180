"""The shell scripts: they parse, help, refuse with a word, and pass run files on to several hosts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import prepared, read_log, run_file  # noqa: F401  fixtures
from tests.ownership.trees import tree

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("launch/*.sh")) + [ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
BIN = Path(sys.executable).parent


def bash(*command: object, path: Path | None = None, timeout: float = 300, **variables: str) -> tuple[int, str]:
    """Exit code and output of a command; programs in ``path`` are found first."""
    before = f"{path}{os.pathsep}" if path else ""
    environment = {**os.environ, "PATH": f"{before}{BIN}{os.pathsep}{os.environ['PATH']}", **variables}
    done = subprocess.run(
        ["bash", *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout + done.stderr


def program(folder: Path, name: str, text: str) -> None:
    """A stand-in for a program that test machines do not have."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_parses_and_says_what_it_is_for(script: Path) -> None:
    code, output = bash("-n", script)
    assert code == 0, output
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ")


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if "bash launch/" in line
    ]
    assert commands == ["exec bash launch/test.sh"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("name", ["quickstart", "smollm2"])
def test_help(name: str) -> None:
    code, output = bash(f"launch/{name}.sh", "--help")
    assert code == 0 and "--out DIR" in output and "EVAL_LIMIT" in output and f"launch/{name}.sh [" in output


def test_fresh_removes_only_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    code, output = bash("launch/quickstart.sh", "--fresh", "--out", tmp_path, MOCTE_SKIP_SETUP="1")
    assert code == 2 and "Nothing was removed" in output and str(tmp_path) in output
    assert (tmp_path / "mine.txt").exists()


def test_setup_without_a_python(tmp_path: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        program(tmp_path / "bin", name, "exit 1")
    code, output = bash("launch/setup.sh", path=tmp_path / "bin", MOCTE_SKIP_SETUP="0", PYTHON="")
    assert code == 2 and "no Python 3.11 or newer" in output


def test_setup_without_a_compiler() -> None:
    code, output = bash("launch/setup.sh", MOCTE_SKIP_SETUP="1", CXX="no-such-compiler")
    assert code == 2 and "no C++ compiler" in output


def test_failing_pip_says_what_to_do(tmp_path: Path) -> None:
    """A copy of the repository's set-up whose pip fails."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_bytes((ROOT / "launch" / "setup.sh").read_bytes())
    (tmp_path / "setup.py").write_text("", encoding="utf-8")
    program(tmp_path / ".venv", "x", "")
    program(tmp_path / ".venv" / "bin", "python", 'case "$*" in *install*) echo no network; exit 1 ;; esac')
    code, output = bash(tmp_path / "launch" / "setup.sh", MOCTE_SKIP_SETUP="0", MOCTE_TORCH="torch==9")
    assert code == 2, output
    assert "no network" in output and "pip install torch==9 failed" in output and "start again" in output
    assert not (tmp_path / ".venv" / ".mocte-setup").exists()


@pytest.mark.parametrize("kind", ["broken", "moved", "link", "ours, broken", "ours, moved"])
def test_setup_removes_only_a_venv_that_it_made(kind: str, tmp_path: Path) -> None:
    """A copy of the repository's set-up with a stand-in for Python, whose pip fails at the end."""
    root = tmp_path / "root"
    (root / "launch").mkdir(parents=True)
    (root / "launch" / "setup.sh").write_bytes((ROOT / "launch" / "setup.sh").read_bytes())
    (root / "setup.py").write_text("", encoding="utf-8")
    pip = 'case "$*" in *install*) echo no network; exit 1 ;; esac'
    making = (
        f"mkdir -p \"$3/bin\" && printf '%s\\n' '#!/bin/bash' '{pip}' >\"$3/bin/python\" && chmod +x \"$3/bin/python\""
    )
    program(tmp_path / "bin", "python3", f'if [ "$2" = venv ]; then {making}; fi')
    venv = tmp_path / "elsewhere" if kind == "link" else root / ".venv"
    program(venv, "x", "")
    program(venv / "bin", "python", "exit 1" if "broken" in kind or kind == "link" else pip)
    (venv / "notes.txt").write_text("of the user", encoding="utf-8")
    if kind == "link":
        (root / ".venv").symlink_to(venv)
    if "moved" in kind:
        (venv / ".mocte-setup").write_text("Python 3\n/another/place\n", encoding="utf-8")
    if "ours" in kind:
        text = "made by launch/setup.sh of mocte-ds"
        count = subprocess.run(["cksum"], input=text.encode(), capture_output=True, check=True).stdout.decode()
        (venv / ".made-by-mocte-ds").write_text(f"{text}\n{count}", encoding="utf-8")
    before = tree(venv)
    options = {"MOCTE_SKIP_SETUP": "0", "MOCTE_TORCH": "torch==9", "PYTHON": str(tmp_path / "bin" / "python3")}
    code, output = bash(root / "launch" / "setup.sh", **options)
    assert code == 2, output
    if "ours" in kind:
        assert "pip install torch==9 failed" in output, output
        assert sorted(path.name for path in venv.iterdir()) == [".made-by-mocte-ds", "bin"]
    else:
        assert "it is left alone" in output and tree(venv) == before, output


@pytest.mark.usefixtures("deepspeed_op")
def test_several_hosts(run_file: Callable[[bool], Path], tmp_path: Path) -> None:  # noqa: F811
    """The run file and its options reach every rank of a hostfile; the only host here is this one."""
    (tmp_path / "hostfile").write_text("localhost slots=2\n", encoding="utf-8")
    out = tmp_path / "out"
    command = ["launch/multi_node.sh", run_file(False), "--out", out, "--stop-after", 1]
    code, output = bash(*command, HOSTFILE=str(tmp_path / "hostfile"), MASTER_PORT="29631")
    assert code == 0, output
    assert [row["step"] for row in read_log(out)] == [1]
    assert '"world_size": 2' in (out / "run.json").read_text(encoding="utf-8")
    code, output = bash("launch/multi_node.sh", run_file(False), HOSTFILE=str(tmp_path / "none"))
    assert code == 2 and "hostfile.example" in output
    code, output = bash("launch/multi_node.sh", "x.yaml", HOSTFILE=str(tmp_path / "hostfile"))
    assert code == 2 and "no run file x.yaml" in output


SRUN = """shift  # --kill-on-bad-exit
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & done
wait -n && wait -n"""


@pytest.mark.usefixtures("deepspeed_op")
def test_slurm(run_file: Callable[[bool], Path], tmp_path: Path) -> None:  # noqa: F811
    """srun starts every task with its number; a stopped job goes back into the queue, a finished one does not."""
    program(tmp_path / "bin", "srun", SRUN)
    program(tmp_path / "bin", "scontrol", 'case $1 in show) echo 127.0.0.1 ;; *) echo "called $*" ;; esac')
    out = tmp_path / "out"
    variables = {"SLURM_JOB_NODELIST": "this", "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["launch/slurm.sbatch", run_file(False), "--out", out, "--stop-after", 1]
    code, output = bash(*command, path=tmp_path / "bin", **variables)
    assert code == 0, output
    assert [row["step"] for row in read_log(out)] == [1]
    assert "requeue" not in output
    with open(out / "events.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "stop", "step": 1}\n')
    program(tmp_path / "bin", "srun", "exit 0")
    code, output = bash(*command, path=tmp_path / "bin", **variables)
    assert code == 0 and "called requeue 77" in output
    # A failure goes back after a pause, at most RESTARTS times; one that the user has to mend never.
    program(tmp_path / "bin", "sleep", "true")
    variables["RESTARTS"] = "1"
    try:
        for status, told in ((2, ""), (137, "called requeue 77"), (137, "")):
            program(tmp_path / "bin", "srun", f"exit {status}")
            code, output = bash(*command, path=tmp_path / "bin", **variables)
            assert code == status and ("requeue" in output) == bool(told) and told in output, output
    finally:
        (ROOT / "runs" / "slurm-77.retries.json").unlink()


@pytest.mark.parametrize("name", ["a #1", "[1]", "a: b", "r ü", "null", 'x"y', "12"])
def test_names_of_folders_stay_names_in_yaml(name: str) -> None:
    """The quickstart's: tests/launch/test_quickstart.py."""
    text = (ROOT / "launch" / "smollm2.sh").read_text()
    assert '$(quoted "$out/' in text and "=$out/" not in text
    line = next(x for x in text.splitlines() if x.startswith("quoted()"))
    done = subprocess.run(["bash", "-c", f'{line}; quoted "$1"', "bash", name], capture_output=True, text=True)
    assert yaml.safe_load(done.stdout) == name
