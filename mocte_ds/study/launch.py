"""Runs what a study file asks for through the `deepspeed` launcher: trials of the learning rate, then what compares."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.hosts.local import command, environment, gpus
from mocte_ds.ownership import append, put, require_ours
from mocte_ds.plan.parameters import count_parameters
from mocte_ds.shipped import LAUNCH
from mocte_ds.study.child import Job, run_jobs
from mocte_ds.study.clocks import at_edge, best_rates
from mocte_ds.study.page import study_page
from mocte_ds.study.plan import PlannedRun, Study
from mocte_ds.study.results import RunResult, read_result
from mocte_ds.study.settings import differences, wanted_settings
from mocte_ds.study.tables import all_tables

_PRETRAIN = LAUNCH / "pretrain.py"
_TAIL, _TOOL = 8, "study"
_FILES = ("results.json", "results.md", "index.html")


class StudyRunner:
    """A study and its folder: what is done, and what is still to be run."""

    def __init__(
        self,
        study: Study,
        out: Path,
        report: Callable[[str], None] = print,
        at_once: int = 1,
        chosen: Study | None = None,
    ) -> None:
        """Check the study before anything runs; what is compared at a tuned rate is looked at when the rate is known.

        Args:
            study: what is compared.
            out: its folder; a run's is `out/NAME`. A run that was cut off goes on.
            report: gets a line at the start and at the end of a run.
            at_once: runs side by side; on GPUs each gets devices of its own.
            chosen: the same study with fewer arms or other seeds, of which runs are made; None: all.

        Raises:
            ConfigError: settings that are refused; or a folder that holds a run of other settings.
            DataError: the data is not there.
        """
        self.study, self.out, self._report, self._at_once = study, out, report, at_once
        self._chosen = chosen or study
        wanted = at_once * study.processes
        if at_once > 1 and gpus() and wanted > gpus():
            raise ConfigError(f"--at-once {at_once} wants {wanted} GPUs, and there are {gpus()}.")
        self._wanted: dict[str, dict[str, Any]] = {}
        self._parameters: dict[str, tuple[int, int]] = {}
        self._done: dict[str, RunResult] = {}  # logs of a run that is done are read once
        trials = self._chosen.trials()
        runs = self._chosen.runs({arm.name: self._first_rate() for arm in self._chosen.arms})
        for planned in [*trials, *runs]:
            wanted_settings(study, planned)
        for planned in trials or runs:
            self._require_same_settings(planned)
        require_ours(out, [*_FILES, *(f"{planned.name}.log" for planned in trials or runs)], _TOOL)

    def run(self) -> list[RunResult]:
        """Make every run that is not done yet, and write `results.json`, `results.md` and `index.html` after each.

        Returns:
            Results of all runs of the study that are done, also those of earlier calls.

        Raises:
            MocteError: a run failed: its output is in `out/NAME.log`, and the runs before it are kept.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._keep_results()
        self._make(self._chosen.trials())
        rates = self._rates()
        results = self.results()
        for arm, rate in rates.items():
            if rate is not None and at_edge(arm, rate, results):
                self._report(f"{arm}: the best learning rate, {rate:g}, is at the edge of those that were tried")
        if diverged := [arm.name for arm in self._chosen.arms if arm.name not in rates]:
            self._report(f"{', '.join(diverged)}: all trials diverged; try smaller learning rates")
        runs = self._chosen.runs(rates)
        for planned in runs:
            self._require_same_settings(planned)
        require_ours(self.out, [f"{planned.name}.log" for planned in runs], _TOOL)
        self._make(runs)
        return self._keep_results()

    def results(self) -> list[RunResult]:
        """What all runs that are done came to, whichever call made them."""
        return [found for run in self._planned() if (found := self._result(run)) is not None]

    def _planned(self) -> list[PlannedRun]:
        """All runs that are known by now: of the file, and of this call's seeds."""
        rates = self._rates()
        planned = [*self.study.trials(), *self.study.runs(rates), *self._chosen.runs(rates)]
        return list({run.name: run for run in planned}.values())

    def _first_rate(self) -> float | None:
        return self.study.rates[0] if self.study.rates else None

    def _rates(self) -> dict[str, float | None]:
        """Learning rate of every arm of which all trials are done."""
        if not self.study.rates:
            return {arm.name: None for arm in self.study.arms}
        trials = [found for run in self.study.trials() if (found := self._result(run)) is not None]
        best = best_rates(trials)
        return {
            name: rate for name, rate in best.items() if sum(t.arm == name for t in trials) == len(self.study.rates)
        }

    def _result(self, planned: PlannedRun) -> RunResult | None:
        if planned.name in self._done:
            return self._done[planned.name]
        folder = self.out / planned.name
        if not (folder / "run.json").is_file() or differences(folder, self._settings(planned)):
            return None
        if planned.arm.name not in self._parameters:
            found = count_parameters(self.study.config(planned))[0]
            self._parameters[planned.arm.name] = found.total, found.active - found.embedding
        result = read_result(folder, planned, self._parameters[planned.arm.name])
        if result is not None:
            self._done[planned.name] = result
        return result

    def _wanted_count(self) -> int:
        """Runs that there will be."""
        open_rates = {arm.name: None for arm in self.study.arms}
        runs = [*self.study.trials(), *self.study.runs(open_rates), *self._chosen.runs(open_rates)]
        return len({run.name for run in runs})

    def _settings(self, planned: PlannedRun) -> dict[str, Any]:
        key = f"{planned.name} {planned.rate}"
        if key not in self._wanted:
            self._wanted[key] = wanted_settings(self.study, planned)
        return self._wanted[key]

    def _require_same_settings(self, planned: PlannedRun) -> None:
        differing = differences(self.out / planned.name, self._settings(planned))
        if differing:
            shown = "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
            raise ConfigError(
                f"{self.out / planned.name} holds a run of other settings: {shown}. Remove it, or take another name or "
                "another --out."
            )

    def _make(self, runs: Sequence[PlannedRun]) -> None:
        """Make those of some runs that are not done yet."""
        labels = {run.name: f"[{number}/{len(runs)}] {run.name}" for number, run in enumerate(runs, 1)}
        of = {run.name: run for run in runs}
        seen: dict[str, int] = {}

        def missing() -> Iterator[Job]:
            for run in runs:
                found, log = self._result(run), Path(f"{self.out / run.name}.log")
                if found is not None:
                    self._report(f"{labels[run.name]}: found, {_said(found)}")
                    continue
                self._report(f"{labels[run.name]}: started, its output goes to {log}")
                append(log, "", _TOOL)
                seen[run.name] = log.stat().st_size  # an earlier start may have failed for another reason
                yield Job(run.name, partial(self._start, run, log), log)

        def finished(job: Job, code: int) -> None:
            found = self._result(of[job.name])
            if code and (found is None or not found.diverged):
                output = job.log.read_bytes()[seen[job.name] :].decode("utf-8", errors="replace")
                raise MocteError(f"{job.name} ended with exit code {code}: {_reason(output, job.log)}")
            if found is None:
                raise MocteError(f"{self.out / job.name} did not reach its last step; see {job.log}.")
            self._report(f"{labels[job.name]}: done, {_said(found)}")
            self._keep_results()

        run_jobs(missing(), self._at_once, finished)

    def _keep_results(self) -> list[RunResult]:
        results = self.results()
        tables = all_tables(self.study, results)
        files = {
            "results.json": json.dumps({"runs": [result.to_dict() for result in results]}, indent=1),
            "results.md": "\n\n".join(table.markdown() for table in tables) + "\n",
            "index.html": study_page(self.study, results, tables, self.out.resolve().name, self._wanted_count()),
        }
        try:
            put(self.out, {name: content.encode() for name, content in files.items()}, _TOOL)
        except OSError as error:
            text = error.strerror or error
            raise MocteError(f"could not write the results to {self.out}: {text}; make room.") from error
        return results

    def _start(self, planned: PlannedRun, log: Path, place: int) -> tuple[list[str], dict[str, str]]:
        words = self._command(planned, place)
        append(log, json.dumps(words) + "\n", _TOOL)
        return words, environment(self.study.processes * self._at_once)

    def _command(self, planned: PlannedRun, place: int) -> list[str]:
        count = self.study.processes
        devices = range(place * count, (place + 1) * count) if self._at_once > 1 and gpus() else None
        options = ["--run", str(self.study.run), "--out", str(self.out / planned.name)]
        for change in self.study.changes(planned):
            options += ["--set", change]
        return command(_PRETRAIN, options, count, devices)


def _reason(output: str, log: Path) -> str:
    """The error that launch/pretrain.py printed, or else the end of the output."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return f"{errors[0].rstrip('.')}. Its output is in {log}."
    return f"the end of {log}:\n" + "\n".join(lines[-_TAIL:])


def _said(found: RunResult) -> str:
    return "diverged" if found.diverged else f"loss {found.loss:.4f}, {found.seconds:.0f} s"
