"""Start and stop on hosts: real processes on this host, which needs no ssh; tests/e2e/two_hosts.sh has two with ssh."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mocte_ds.errors import ConfigError
from mocte_ds.hosts.environment import travelling
from mocte_ds.hosts.launcher import main, read_hosts, run_folder

ROOT, TOY = Path(__file__).resolve().parents[2], Path(__file__).with_name("toy_rank.py")
LIMIT = 60.0


def start(folder: Path, mode: str, *options: str, hosts: str = "localhost slots=2\n") -> subprocess.Popen:
    """The launcher with two ranks on this host."""
    (folder / "hosts").write_text(hosts, encoding="utf-8")
    command = [sys.executable, "-m", "mocte_ds.hosts.launcher", "--hostfile", folder / "hosts", *options]
    environment = {**os.environ, "NCCL_TEST": "travels", "SECRET": "stays", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*map(str, command), "--", str(TOY), mode, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def started(folder: Path) -> bool:
    return all((folder / f"started_{rank}").is_file() for rank in range(2))


def of_run(folder: Path) -> list[psutil.Process]:
    """Everything that the run in a folder has started: its ranks, and by their run id what those have started."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, variables = process.info["cmdline"] or [], process.info["environ"] or {}
        if str(folder) in words or ("MOCTE_RUN_ID" in variables and variables.get("PWD_OF_TEST") == str(folder)):
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every test ends with no process of its run."""
    monkeypatch.setenv("PWD_OF_TEST", str(tmp_path))
    yield
    wait_for(lambda: not of_run(tmp_path))


def test_a_run_that_ends_well(tmp_path: Path) -> None:
    process = start(tmp_path, "well", "--master_port", "29999")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    for rank in range(2):
        seen = (tmp_path / f"started_{rank}").read_text(encoding="utf-8").split("\n")
        assert seen[:6] == [str(rank), "2", "2", "0", "127.0.0.1", "29999"]
        assert seen[6:] == ["travels", "stays"]  # this host's agent inherits; over ssh SECRET would not be there


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_ranks_save(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, "long")
    wait_for(lambda: started(tmp_path))
    process.send_signal(number)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "stopping" in output, output
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_a_stop_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    process = start(tmp_path, "deaf", "--grace", "1")
    wait_for(lambda: started(tmp_path))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "did not end within 1 s" in output, output


def test_a_killed_launcher_stops_the_ranks(tmp_path: Path) -> None:
    process = start(tmp_path, "long")
    wait_for(lambda: started(tmp_path))
    process.kill()
    process.communicate(timeout=LIMIT)
    wait_for(lambda: (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists())


def test_a_killed_agent_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "long")
    wait_for(lambda: started(tmp_path))
    (agent,) = [c for c in psutil.Process(process.pid).children() if "mocte_ds.hosts.agent" in c.cmdline()]
    agent.kill()
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and "host localhost failed by signal 9" in output, output


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step7", encoding="utf-8")
    process = start(tmp_path, "fails", "--restarts", "0")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 3, output
    assert "rank 1 ended with exit code 3" in output and "error: host localhost failed with exit code 3" in output


def test_two_hosts_on_one_machine(tmp_path: Path) -> None:
    """The end of a rank on one lets that of the other save, and the host that failed is named."""
    process = start(tmp_path, "half", hosts="localhost slots=1\n127.0.0.1 slots=1\n")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 3 and "error: host 127.0.0.1 failed with exit code 3" in output, output
    assert (tmp_path / "saved_0").is_file()


def test_an_error_of_the_user_is_not_tried_again(tmp_path: Path) -> None:
    process = start(tmp_path, "user", "--restarts", "5")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 2 and "start 2 of" not in output, output


def test_run_folder() -> None:
    assert run_folder(["launch/pretrain.py", "--run", "a/b.yaml"]) == Path("runs/b")
    assert run_folder(["launch/pretrain.py", "--run", "a/b.yaml", "--out", "x"]) == Path("x")


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# all\n\nnode-1 slots=2\nnode-2 slots=1  # half\n", encoding="utf-8")
    assert read_hosts(path) == {"node-1": [0, 1], "node-2": [0]}
    assert list(read_hosts(path, include=["node-2"])) == ["node-2"]
    assert list(read_hosts(path, exclude=["node-2"])) == ["node-1"]
    for words, why in (
        ({"include": ["node-3"]}, "no host node-3"),
        ({"exclude": ["node-1", "node-2"]}, "no host to run"),
    ):
        with pytest.raises(ConfigError, match=why):
            read_hosts(path, **words)


@pytest.mark.parametrize(
    "line", ["node-1", "node-1 slots=0", "node-1 slots=x", "a b c", "x slots=2\nx slots=2", "n slots=999", "-x slots=1"]
)
def test_a_bad_hostfile_names_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "hosts").write_text(line, encoding="utf-8")
    with pytest.raises(ConfigError, match="line [12]: .* is not HOST slots=NUMBER"):
        read_hosts(tmp_path / "hosts")


def test_what_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("# mine\nNCCL_DEBUG=INFO\nMY_NAME=a=b\n", encoding="utf-8")
    found = travelling({"NCCL_DEBUG": "WARN", "GLOO_X": "1", "OTHER": "2", "OMP_NUM_THREADS": "4"}, tmp_path, "eth1")
    assert found == {
        "NCCL_DEBUG": "INFO",
        "GLOO_X": "1",
        "OMP_NUM_THREADS": "4",
        "NCCL_SOCKET_IFNAME": "eth1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "MY_NAME": "a=b",
    }
    (tmp_path / ".deepspeed_env").write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1: 'nonsense' is not NAME=VALUE"):
        travelling({}, tmp_path)


def test_the_folder_of_a_run_by_its_command_line() -> None:
    for words, folder in (
        (["--run", "a/b.yaml", "--out", "x"], "x"),
        (["--run=a/b.yaml", "--out=x=y"], "x=y"),
        (["--run=a/b.yaml", "--resume", "no"], "runs/b"),
        (["--out", "x", "--run", "b.yaml", "--out=z"], "z"),
    ):
        assert run_folder(["launch/pretrain.py", *words]) == Path(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--restarts", "-1"), ("--silence", "nan"), ("--silence", "inf"), ("--grace", "0"), ("--start_timeout", "-3")],
)
def test_numbers_that_make_no_sense_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--hostfile", "none", f"{option}={value}", "--", "script"])
    assert ended.value.code == 2 and f"argument {option}: {value} must be" in capsys.readouterr().err
