"""What a run writes while it goes on: its logs, DeepSpeed's monitors and one line of progress."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mocte_ds.bars import SECONDS
from mocte_ds.colour import paint
from mocte_ds.logs.files import LogFiles, cannot_write
from mocte_ds.logs.monitors import Monitors
from mocte_ds.ownership import note_coming
from mocte_ds.training.run_folder import TOOL

_SHOWN = {"emergence": "green", "freeze": "cyan", "thaw": "yellow", "prefix": "cyan"}
"""Events that people wait for, and their colours on a terminal."""


class Telemetry:
    """The log files and the progress bar of a run; on ranks other than 0 every call does nothing."""

    def __init__(self, folder: Path, active: bool, total_steps: int, start_step: int, monitor: Any) -> None:
        """Open the files and drop what a resumed run will write again.

        Args:
            folder: the run's folder.
            active: True on rank 0.
            total_steps: steps of the run.
            start_step: steps that are done.
            monitor: DeepSpeed's monitor, or None.

        Raises:
            MocteError: the folder cannot be written.
        """
        self.active, self._monitors, self._folder = active, Monitors(monitor), folder
        if not active:
            return
        self._files = LogFiles(folder, start_step, TOOL)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc="training",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else SECONDS,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% step {n}/{total}, {elapsed} gone, {remaining} left{postfix}",
        )

    def step(self, metrics: dict[str, Any]) -> None:
        """Write the line of one optimizer step."""
        if not self.active:
            return
        self._files.write("metrics", metrics)
        speed = metrics["tokens_per_second"]
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(1)
        self._monitors.step(metrics)

    def event(self, event: dict[str, Any]) -> None:
        """Write one event, and show those that people wait for."""
        if not self.active:
            return
        self._files.write("events", event)
        self._monitors.event(event)
        if event["event"] in _SHOWN:
            which = f"block {event['block']}" + (f" expert {event['expert']}" if "expert" in event else "")
            which = which if event["block"] is not None else f"{event['layers']} layers"
            what = paint(event["event"], _SHOWN[event["event"]], sys.stderr)
            self._bar.write(f"step {event['step']}: {what} of {which} ({event['reason']})", file=sys.stderr)

    def note(self) -> None:
        """Note that the files are ours as they are now; what is added to them is looked at line by line.

        Raises:
            MocteError: the note cannot be written.
        """
        if not self.active:
            return
        # Event files have the number of their process in the name.
        board = (self._folder / "tensorboard").rglob(f"*.tfevents.*.{os.getpid()}.*")
        self._files.note(str(path.relative_to(self._folder)) for path in board)

    def close(self, after_error: bool = False) -> None:
        """Flush and close.

        Args:
            after_error: say nothing about what cannot be written any more; what happened first is to be heard.

        Raises:
            MocteError: a file cannot be written.
        """
        if self.active:
            self._bar.close()
            self._files.close(after_error)


def expect_board(folder: Path) -> None:
    """Note that the event files of TensorBoard which this process will write into a run's folder are ours.

    Raises:
        MocteError: the note cannot be written.
    """
    try:
        note_coming(folder, f"tensorboard/*.tfevents.*.{socket.gethostname()}.{os.getpid()}.*", TOOL)
    except OSError as error:
        raise cannot_write(folder, error) from error
