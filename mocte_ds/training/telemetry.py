"""What a run writes while it goes on: metrics.jsonl, events.jsonl, TensorBoard and one line of progress."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


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
        """
        self.active, self._monitor = active, monitor
        if not active:
            return
        self._files = {}
        for name in ("metrics", "events"):
            path = folder / f"{name}.jsonl"
            keep_until(path, start_step)
            self._files[name] = open(path, "a", encoding="utf-8", buffering=1)
        interval = 0.5 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc="training",
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% {n}/{total} [{elapsed}, {remaining} left] {postfix}",
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
            self._monitor.write_events([(f"train/{k}", v, metrics["tokens"]) for k, v in scalars.items()])

    def event(self, event: dict[str, Any]) -> None:
        """Write one event, and show those that people wait for."""
        if not self.active:
            return
        self._write("events", event)
        if event["event"] in ("emergence", "freeze", "thaw"):
            which = f"block {event['block']}" + (f" expert {event['expert']}" if "expert" in event else "")
            self._bar.write(f"step {event['step']}: {event['event']} of {which} ({event['reason']})", file=sys.stderr)

    def close(self) -> None:
        """Flush and close."""
        if self.active:
            self._bar.close()
            for file in self._files.values():
                file.close()

    def _write(self, name: str, values: dict[str, Any]) -> None:
        self._files[name].write(json.dumps(values) + "\n")


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a log that lie behind ``step``, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    pending = path.with_suffix(".tmp")
    pending.write_text("".join(kept), encoding="utf-8")
    os.replace(pending, path)
