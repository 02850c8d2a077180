"""Runs what a sweep file asks for, one run after the other, through the `deepspeed` launcher."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.ownership import append, put, require_ours
from mocte_ds.sweep.child import run_to_end
from mocte_ds.sweep.plan import Arm, Sweep
from mocte_ds.sweep.results import RunResult, read_result
from mocte_ds.sweep.settings import differences, wanted_settings
from mocte_ds.sweep.table import LEGEND, markdown_table
from mocte_ds.sweep.trials import LEGEND as trials_legend
from mocte_ds.sweep.trials import trials_table

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
_TAIL, _TOOL = 8, "sweep"


def require_checkout() -> None:
    """Raise MocteError where launch/pretrain.py is not there: it is not part of the installed package."""
    if not PRETRAIN.is_file():
        raise MocteError(
            f"sweeps start launch/pretrain.py, and {PRETRAIN} is not there: run tools/sweep.py in a checkout of this "
            "project."
        )


def run_sweep(
    sweep: Sweep,
    out: Path,
    only: Sequence[tuple[Arm, int]] | None = None,
    report: Callable[[str], None] = print,
) -> list[RunResult]:
    """Make every run that is not done yet, and write `results.json` and `results.md` after each.

    Args:
        sweep: what is compared.
        out: the sweep's folder; a run's is `out/ARM-seedN`. A run that was cut off goes on.
        only: make these runs only; None: all.
        report: gets a line at the start and at the end of a run.

    Returns:
        Results of all runs of the sweep that are done, also those of earlier calls.

    Raises:
        MocteError: settings that are refused, before any run starts; a folder that holds a run of other settings; or a
            run that failed: its output is in `out/ARM-seedN.log`, and the runs before it are kept.
    """
    require_checkout()
    chosen = list(only if only is not None else sweep.runs())
    everything = [*sweep.runs(), *(run for run in chosen if run not in sweep.runs())]
    wanted = {_folder(out, arm, seed): wanted_settings(sweep, arm, seed) for arm, seed in everything}
    for arm, seed in chosen:
        _require_same_settings(_folder(out, arm, seed), wanted[_folder(out, arm, seed)])
    require_ours(out, ["results.json", "results.md", *(f"{_folder(out, *run).name}.log" for run in chosen)], _TOOL)
    out.mkdir(parents=True, exist_ok=True)
    results = _keep_results(sweep, out, everything, wanted)
    for number, (arm, seed) in enumerate(chosen, 1):
        folder, label = _folder(out, arm, seed), f"[{number}/{len(chosen)}] {arm.name} seed {seed}"
        word, found = "found", read_result(folder, arm.name, seed)
        if found is None:
            word = "done"
            report(f"{label}: started, its output goes to {folder}.log")
            _run(sweep, arm, seed, folder)
            found = read_result(folder, arm.name, seed)
            if found is None:
                raise MocteError(f"{folder} did not reach its last step; see {folder}.log.")
            results = _keep_results(sweep, out, everything, wanted)
        report(f"{label}: {word}, loss {found.loss:.4f}, {found.seconds:.0f} s")
    return results


def _folder(out: Path, arm: Arm, seed: int) -> Path:
    return out / f"{arm.name}-seed{seed}"


def _require_same_settings(folder: Path, wanted: dict[str, Any]) -> None:
    differing = differences(folder, wanted)
    if differing:
        shown = "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
        raise ConfigError(
            f"{folder} holds a run of other settings: {shown}. Remove it, or take another name or another --out."
        )


def _keep_results(
    sweep: Sweep, out: Path, runs: Sequence[tuple[Arm, int]], wanted: dict[Path, dict[str, Any]]
) -> list[RunResult]:
    """Write what all runs that are done came to, whichever call made them."""
    results = []
    for arm, seed in runs:
        folder = _folder(out, arm, seed)
        found = read_result(folder, arm.name, seed) if not differences(folder, wanted[folder]) else None
        if found is not None:
            results.append(found)
    values = {"runs": [result.to_dict() for result in results]}
    text = f"{markdown_table(sweep, results)}\n\n{LEGEND}\n"
    if sweep.baseline is not None and (trials := trials_table(sweep, results)):
        text += f"\n{trials}\n\n{trials_legend}\n"
    files = {"results.json": json.dumps(values, indent=1), "results.md": text}
    try:
        put(out, {name: content.encode() for name, content in files.items()}, _TOOL)
    except OSError as error:
        raise MocteError(f"could not write the results to {out}: {error.strerror or error}; make room.") from error
    return results


def _run(sweep: Sweep, arm: Arm, seed: int, folder: Path) -> None:
    command = [_deepspeed(), "--log_level", "error", "--master_port", str(_port())]
    command += ["--num_accelerators", str(sweep.processes), str(PRETRAIN), "--run", str(sweep.run)]
    command += ["--out", str(folder)]
    for change in sweep.changes(arm, seed):
        command += ["--set", change]
    log = Path(f"{folder}.log")
    append(log, json.dumps(command) + "\n", _TOOL)
    seen = log.stat().st_size  # an earlier start may have failed for another reason
    code = run_to_end(command, log, _environment(sweep.processes))
    if code:
        output = log.read_bytes()[seen:].decode("utf-8", errors="replace")
        raise MocteError(f"{arm.name} seed {seed} ended with exit code {code}: {_reason(output, log)}")


def _reason(output: str, log: Path) -> str:
    """The error that launch/pretrain.py printed, or else the end of the output."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return f"{errors[0].rstrip('.')}. Its output is in {log}."
    return f"the end of {log}:\n" + "\n".join(lines[-_TAIL:])


def _deepspeed() -> str:
    """The launcher that belongs to this Python, or else the one on the path."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which("deepspeed", path=places)
    if found is None:
        raise MocteError(
            f"there is no program `deepspeed` beside {sys.executable} nor on the PATH; run launch/setup.sh."
        )
    return found


def _environment(processes: int) -> dict[str, str]:
    """Without a GPU processes share the cores: more threads than cores make all of them slow."""
    import torch

    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    return environment


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
