"""Runs programs that a model wrote, each in a process of its own with limits; this is no sandbox."""

import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SECONDS = 10.0
"""That a program may take."""
_MEMORY = 4 << 30  # bytes of address space
_WRITTEN = 1 << 20  # bytes of a file
_AT_ONCE = 4


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
    """Whether a program ends by itself, in time, without an error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-"],
                input=program.encode("utf-8", "surrogatepass"),
                cwd=folder,
                env={},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                preexec_fn=_limit,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def _limit() -> None:
    seconds = math.ceil(SECONDS)
    for kind, most in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, _WRITTEN),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _estimate(results: list[bool], k: int) -> float:
    """1 - C(n - c, k) / C(n, k) for c of n programs that passed."""
    n, wrong = len(results), results.count(False)
    return 1.0 - math.comb(wrong, k) / math.comb(n, k)


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else 0.0
