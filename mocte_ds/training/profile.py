"""Where the time of some steps goes, by part of the model and of the step: `--profile STEPS`.

A trace of torch.profiler for each rank, and a table made from it. A part is the innermost mark around an operation:
marks are the phases of the heartbeat and the names of the model's modules. An operation of the backward pass without a
mark of its own belongs to the part whose forward pass made its node: both have the same sequence number.
"""

import contextlib
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mocte_ds.dist.collectives import wait_for_all
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import ConfigError, NotOurs
from mocte_ds.flops.model_sizes import layer_stack
from mocte_ds.ownership import put
from mocte_ds.ownership.workshop import workshop
from mocte_ds.text_table import brief, percent, text_table
from mocte_ds.training.run_folder import TOOL
from mocte_ds.watch import HEART

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

FOLDER = "profile"
"""Of a run's folder."""
_MARK = "mocte: "
_NODE = "autograd::engine::evaluate_function: "
_DISPATCH = "PythonDispatchMode"
"""Python around an operation, where FLOPs are counted. A mark that begins in one outlasts it, so both have its time."""
_Node = tuple[int, int]
"""Thread whose forward pass made a node of the graph, and the node's number in it."""
UNNAMED = "between operations"
"""Wall time in which no operation of torch ran: Python, and waiting for a device."""


def read_steps(text: str, last: int) -> range:
    """Steps of ``20`` or ``20-24``.

    Args:
        text: as given.
        last: step that is trained.

    Raises:
        ConfigError: no such steps.
    """
    first, _, end = text.partition("-")
    if first.isdecimal() and (end.isdecimal() or (end == "" and "-" not in text)):
        steps = range(int(first), int(end or first) + 1)
        if len(steps) and 1 <= steps[0] and steps[-1] <= last:
            return steps
    raise ConfigError(f"--profile {text}: give one step or a range of steps between 1 and {last}, such as 20 or 20-24.")


class Profile:
    """Records some steps of a run on this rank."""

    def __init__(self, steps: range, model: nn.Module, out: Path, rank: int, by: str) -> None:
        """Nothing is recorded yet.

        Args:
            steps: that are recorded.
            model: whose modules are marked.
            out: the run's folder.
            rank: of all.
            by: the tool whose files they are (see mocte_ds.ownership).
        """
        self._steps, self._model, self._rank, self._by = steps, model, rank, by
        self.folder = out / FOLDER
        self._open = contextlib.ExitStack()
        self._profile: profile | None = None
        self._recorded, self._started = set[int](), 0.0

    def begin(self, step: int) -> None:
        """Record, if the step is one of those; one that was skipped and comes again is still one step."""
        if step not in self._steps:
            return
        self._recorded.add(step)
        if self._profile is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._open.enter_context(_marked(self._model))
            self._profile = self._open.enter_context(profile(activities=activities))
            self._started = time.perf_counter()

    def end(self, step: int, stops: bool = False) -> dict[str, Any] | None:
        """Write what was recorded, after the last of the steps.

        Args:
            step: that has ended.
            stops: whether no other step follows.

        Returns:
            For the log, once: "steps" (how many), "seconds" of all of them, and "parts": of each on this rank the
            seconds of the forward pass and of the backward pass.
        """
        if self._profile is None or (step < self._steps[-1] and not stops):
            return None
        seconds = time.perf_counter() - self._started
        self._open.close()
        recorded, self._profile = self._profile, None
        with HEART.phase("profile", long=True):
            parts = parts_of(recorded.events(), seconds)
            self._write(recorded)
        return {"steps": len(self._recorded), "seconds": seconds, "parts": parts}

    def tell(self, step: int, stops: bool, event: Callable[..., None]) -> bool:
        """End the profile after the last of its steps, and show and log what it found (collective).

        Args:
            step: as of :meth:`end`.
            stops: as there.
            event: logs.

        Returns:
            Whether it has ended with this step.
        """
        found = self.end(step, stops)
        if not found:
            return False
        event("profile", **found)
        if self._rank == 0:
            print(f"{parts_text(found)}\ntraces: {self.folder}", file=sys.stderr)
        with HEART.phase("profile", long=True):  # nobody stands in a step while another rank writes its trace
            wait_for_all(mesh_of_processes().world)
        return True

    def _write(self, recorded: profile) -> None:
        try:
            with workshop(self.folder) as work:
                trace = work / "trace.json.gz"
                recorded.export_chrome_trace(str(trace))
                put(self.folder, {f"rank-{self._rank}.json.gz": trace}, self._by)
        except (OSError, RuntimeError, NotOurs) as error:  # a trace is not worth the run
            logging.getLogger("mocte_ds").warning(f"no trace of rank {self._rank} was written: {error}")


def profile_of_run(steps: range | None, engine: Any, out: Path) -> Profile | None:
    """What records the steps of a run; None without any, or where the run is past them already, which is said.

    Args:
        steps: that are recorded, or None.
        engine: of the run.
        out: its folder.
    """
    rank, done = mesh_of_processes().world.rank, engine.global_steps
    if steps and steps[-1] <= done and rank == 0:  # started again by the same command, perhaps
        text = f"--profile: the run goes on from step {done}, after step {steps[-1]}; nothing is recorded"
        logging.getLogger("mocte_ds").warning(text)
    return Profile(steps, engine.module, out, rank, TOOL) if steps and steps[-1] > done else None


def parts_of(events: Iterable["FunctionEvent"], seconds: float) -> dict[str, list[float]]:
    """Seconds of forward and backward pass that each part took, those of the largest first.

    On a CUDA device the kernels' seconds count, on a CPU the operations' own. The rest of the wall time is UNNAMED.

    Args:
        events: of torch.profiler.
        seconds: that all took on the wall.
    """
    marked = [(event, *_mark(event)) for event in sorted(events, key=lambda event: event.time_range.start)]
    on_device = any(event.self_device_time_total for event, *_ in marked)
    made_by: dict[_Node, str | None] = {}
    for event, name, node, _ in marked:
        if event.sequence_nr >= 0 and node is None:
            # Of operations with one number the last one makes the node. Every thread has its own numbers.
            made_by[event.thread, event.sequence_nr] = name
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event, name, node, backward in marked:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        if own <= 0 or event.device_type != torch.autograd.DeviceType.CPU or event.name == _DISPATCH:
            continue
        if node is not None:
            name = made_by.get(node, name)
        found[name or "other"][backward] += own / 1e6
    rest = seconds - sum(map(sum, found.values()))
    found[UNNAMED] = [max(0.0, rest), 0.0]
    return dict(sorted(found.items(), key=lambda item: -sum(item[1])))


def parts_text(found: dict[str, Any]) -> str:
    """A row per part, in milliseconds of a step, of what :meth:`Profile.end` returned."""
    total, steps = sum(map(sum, found["parts"].values())), found["steps"]
    rows = [
        [name, brief(1e3 * forward / steps), brief(1e3 * backward / steps), percent((forward + backward) / total)]
        for name, (forward, backward) in found["parts"].items()
    ]
    return text_table(["part", "forward ms", "backward ms", "share"], rows, left=("part",))


def _mark(event: "FunctionEvent") -> tuple[str | None, _Node | None, bool]:
    """The innermost mark around an operation, the node of the graph that stands closer, and whether it is backward."""
    at: FunctionEvent | None = event
    name, node, backward = None, None, False
    while at is not None:
        if at.name.startswith(_MARK):
            found = at.name.removeprefix(_MARK)
            name, backward = found if name is None else name, backward or found == "backward"
        elif at.name.startswith(_NODE):
            backward = True
            if name is None and node is None:
                node = (at.fwd_thread, at.sequence_nr)
        at = at.cpu_parent
    return name, node, backward


@contextlib.contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Mark what the heartbeat does and what the model's parts do."""
    handles, open_marks = [], list[Any]()

    def begin(name: str) -> Any:
        def enter(*_: Any) -> None:
            mark = record_function(_MARK + name)
            mark.__enter__()
            open_marks.append(mark)

        return enter

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    for name, part in _named_parts(model):
        handles.append(part.register_forward_pre_hook(begin(name), prepend=True))
        handles.append(part.register_forward_hook(leave, always_call=True))
    HEART.mark = lambda name: record_function(_MARK + name)
    try:
        yield
    finally:
        HEART.mark = None
        for handle in handles:
            handle.remove()


def _named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of each layer, and the modules without parts that lie outside of the layers, by their last names."""
    stack = layer_stack(model)
    inside = {id(module) for module in stack.modules()}
    for layer in stack:
        yield from layer.named_children()
    for path, module in model.named_modules():
        if id(module) not in inside and not any(True for _ in module.children()):
            yield path.rpartition(".")[2], module
