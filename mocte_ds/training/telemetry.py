"""What a run writes while it goes on: metrics.jsonl, events.jsonl, TensorBoard and one line of progress."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from mocte_ds.errors import MocteError
from mocte_ds.ownership import note_coming, note_growing, put
from mocte_ds.training.run_folder import TOOL

_SHOWN = ("emergence", "freeze", "thaw", "prefix")


class Telemetry:
    """The log files and the progress bar of a run; on ranks other than 0 every call does nothing."""

    def __init__(self, folder: Path, active: bool, total_steps: int, start_step: int, monitor: Any) -> None:
        """Open the files and drop what a resumed run will write again.

        Args:
            folder: the run's folder.
            active: True on rank 0.
            total_steps: steps of the run.
            start_step: steps that are done.
            monitor: DeepSpeed's monitor, for TensorBoard.

        Raises:
            MocteError: the folder cannot be written.
        """
        self.active, self._monitor, self._failed = active, monitor, False
        if not active:
            return
        self._files: dict[str, TextIO] = {}
        for name in ("metrics", "events"):
            path = folder / f"{name}.jsonl"
            try:
                keep_until(path, start_step)
                if not path.exists():
                    put(folder, {path.name: b""}, TOOL, grows=True)
                self._files[name] = open(path, "a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise cannot_write(path, error) from error
        self._folder = folder
        self.note()
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc="training",
            unit="step",
            # A log file should not fill with bars.
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% step {n}/{total}, {elapsed} gone, {remaining} left{postfix}",
        )

    def step(self, metrics: dict[str, Any]) -> None:
        """Write the line of one optimizer step."""
        if not self.active:
            return
        self._write("metrics", metrics)
        speed = metrics["tokens_per_second"]
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(1)
        scalars = {name: metrics[name] for name in ("loss", "lr", "grad_norm", "tokens_per_second")}
        for domain, loss in (metrics.get("validation") or {}).items():
            scalars[f"validation/{domain}"] = loss
        if self._monitor is not None and self._monitor.enabled:
            found = {name: value for name, value in scalars.items() if value is not None}
            try:
                self._monitor.write_events([(f"mocte/{name}", v, metrics["tokens"]) for name, v in found.items()])
            except OSError as error:
                self._failed = True
                raise cannot_write(Path("the files of TensorBoard"), error) from error

    def event(self, event: dict[str, Any]) -> None:
        """Write one event, and show those that people wait for."""
        if not self.active:
            return
        self._write("events", event)
        if event["event"] in _SHOWN:
            which = f"block {event['block']}" + (f" expert {event['expert']}" if "expert" in event else "")
            which = which if event["block"] is not None else f"{event['layers']} layers"
            self._bar.write(f"step {event['step']}: {event['event']} of {which} ({event['reason']})", file=sys.stderr)

    def note(self) -> None:
        """Note that the files are ours as they are now; what is added to them is looked at line by line.

        Raises:
            MocteError: the note cannot be written.
        """
        if not self.active:
            return
        # Event files have the number of their process in the name.
        board = (self._folder / "tensorboard").rglob(f"*.tfevents.*.{os.getpid()}.*")
        names = [*(f"{name}.jsonl" for name in self._files), *(path.relative_to(self._folder) for path in board)]
        try:
            note_growing(self._folder, map(str, names), TOOL)
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def close(self, after_error: bool = False) -> None:
        """Flush and close.

        Args:
            after_error: say nothing about what cannot be written any more; what happened first is to be heard.

        Raises:
            MocteError: a file cannot be written.
        """
        if not self.active:
            return
        self._bar.close()
        for file in self._files.values():
            try:
                file.close()  # writes once more what could not be written before
            except OSError as error:
                if not (after_error or self._failed):
                    raise cannot_write(Path(file.name), error) from error

    def _write(self, name: str, values: dict[str, Any]) -> None:
        try:
            self._files[name].write(json.dumps(values) + "\n")
        except OSError as error:
            self._failed = True
            raise cannot_write(Path(self._files[name].name), error) from error


def cannot_write(path: Path, error: OSError) -> MocteError:
    """The error for a file of the run that cannot be written."""
    return MocteError(
        f"cannot write {path}: {error.strerror or error}. The last good checkpoint is untouched; make room or choose "
        "another --out, and start again: the run resumes."
    )


def expect_board(folder: Path) -> None:
    """Note that the event files of TensorBoard which this process will write into a run's folder are ours.

    Raises:
        MocteError: the note cannot be written.
    """
    try:
        note_coming(folder, f"tensorboard/*.tfevents.*.{socket.gethostname()}.{os.getpid()}.*", TOOL)
    except OSError as error:
        raise cannot_write(folder, error) from error


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a log that lie behind ``step``, and a last line that was cut off.

    A log that somebody else has written or changed is kept under another name.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    put(path.parent, {path.name: "".join(kept).encode()}, TOOL, keep_others=True, grows=True)
