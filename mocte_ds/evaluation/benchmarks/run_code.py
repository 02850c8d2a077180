"""Runs programs that a model wrote, each in a process of its own with limits; this is not a sandbox."""

import contextlib
import json
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS = 10.0
"""That a program may take."""
_MEMORY = 4 << 30  # bytes of address space
_WRITTEN = 1 << 20  # bytes of a file
_AT_ONCE = 4
# The word, which the program does not know, tells that it came to its end.
_RUN = """import json, resource, sys
word, limits = sys.argv[1], json.loads(sys.argv[2])
del sys.argv[1:]
for kind, most in limits:
    resource.setrlimit(kind, (most, most))
exec(compile(sys.stdin.buffer.read(), "program", "exec"), {"__name__": "__main__"})
sys.__stdout__.write(word)
sys.__stdout__.flush()
"""


class CodeEval:
    """The metric `code_eval`: the share of problems that one of k programs solves (Chen et al., 2021)."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Run every program with its test.

        Args:
            references: for each problem, code that fails where a program is wrong.
            predictions: for each problem, programs.
            k: numbers of tries; only those for which there are enough programs count.

        Returns:
            {"pass@K": unbiased estimate, mean over the problems}, and for each problem which programs passed.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            passed = {
                i: list(pool.map(passes, [f"{program}\n{test}" for program in programs]))
                for i, (test, programs) in enumerate(zip(references, predictions, strict=True))
            }
        found = list(passed.values())
        usable = [tries for tries in k if all(len(results) >= tries for results in found)]
        return {f"pass@{tries}": _mean([_estimate(r, tries) for r in found]) for tries in usable}, passed


def passes(program: str) -> bool:
    """Whether a program comes to its end, in time, without an error; one that leaves before has not."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "said"), "w+b") as said:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUN, word, json.dumps(_limits())],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            child.communicate(program.encode("utf-8", "surrogatepass"), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it has started
            child.wait()
        said.seek(0)
        return child.returncode == 0 and said.read().endswith(word.encode())


def _limits() -> list[tuple[int, int]]:
    """Kinds of resources, and how much of each a program may take."""
    return [
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, _WRITTEN),
        (resource.RLIMIT_CPU, math.ceil(SECONDS)),
        (resource.RLIMIT_CORE, 0),
    ]


def _estimate(results: list[bool], k: int) -> float:
    """1 - C(n - c, k) / C(n, k) for c of n programs that passed."""
    n, wrong = len(results), results.count(False)
    return 1.0 - math.comb(wrong, k) / math.comb(n, k)


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else 0.0
