"""A signal before training: the process says so and ends with a code that starts it again, also where it is stuck."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mocte_ds.stop import EXIT_AGAIN
from mocte_ds.training import lost

ROOT = Path(__file__).resolve().parents[1]
BUSY = "import time; print('ready', flush=True); time.sleep(60)"
# A wait in C that no signal interrupts, as a collective operation: a lock that its owner takes twice.
STUCK = """
import ctypes, threading
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
libc.pthread_mutex_lock(lock)
threading.Timer(1.0, print, ('ready',), {'flush': True}).start()  # by then the main thread waits
libc.pthread_mutex_lock(lock)
"""


def ended(script: str, number: int, rank: str) -> tuple[int, str]:
    """Exit code and output of a process that got a signal once it was ready."""
    before = "import mocte_ds.stop as s; s._GRACE = 0.2; s.end_on_signals()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", before + script],
        cwd=ROOT,
        env={"RANK": rank, "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_rank_zero_says_it(number: int, name: str) -> None:
    code, output = ended(BUSY, number, "0")
    assert code == EXIT_AGAIN and f"stopped by {name} before the first step" in output and "Traceback" not in output


def test_other_ranks_are_silent() -> None:
    assert ended(BUSY, signal.SIGTERM, "1") == (EXIT_AGAIN, "")


def test_a_process_that_waits_in_c_ends_too() -> None:
    assert ended(STUCK, signal.SIGTERM, "0") == (EXIT_AGAIN, "")


def test_after_training_a_process_says_what_it_has_to_say() -> None:
    """And ends with its own code, also where it hangs."""
    script = "s.end_soon(7); import time; print('ready', flush=True); time.sleep({}); print('said', flush=True)"
    code, output = ended(script.format(0.1), signal.SIGTERM, "0")
    assert code in (0, 7) and "said" in output and "before the first step" not in output
    assert ended(script.format(60), signal.SIGTERM, "0") == (7, "")


def test_pretraining_has_its_handlers_before_torch() -> None:
    script = "import sys, launch.pretrain; print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_a_rank_that_gives_way_keeps_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_seconds: float) -> None:
        raise SystemExit(EXIT_AGAIN)

    monkeypatch.setattr(lost.time, "sleep", stopped)
    with pytest.raises(SystemExit) as found:
        lost.give_way(1, lost.ConfigError("wrong"))
    assert found.value.code == 2
    lost.give_way(0, lost.ConfigError("wrong"))


def test_the_others_hear_of_a_signal(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), lost.word_of_errors(tmp_path, 1):
        raise SystemExit(EXIT_AGAIN)
    assert "rank 1: a signal stopped it before the first step" in str(lost.lost_rank(tmp_path))
