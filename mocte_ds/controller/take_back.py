"""A step that is skipped leaves nothing: what its forward passes have told the controller is taken back."""

from typing import Any

from mocte_ds.controller.controller import Controller
from mocte_ds.skips import Skips, warn


def begin_pass(controller: Controller, skips: Skips) -> None:
    """Before a forward pass that trains: where it is the first of its step, remember the sample, which passes write
    over. Counts need no mark: what a step has added to them is known.
    """
    if skips.begin_pass(controller.domain, controller.run.domain_names):
        controller.run.samples.mark()


def take_back_step(controller: Controller) -> None:
    """After a step that was skipped: tokens, loads, samples and the probe set are those from before it."""
    controller.mid_step = False
    controller.passes.take_back_step()
    controller.checks.forget_pass()
    controller.run.samples.take_back()
    controller.progress.probe.withdraw()


def tell_skip(controller: Controller, event: dict[str, Any]) -> None:
    """Tell the log of the process and the listeners of a step that was skipped."""
    warn(event, controller.run.mesh.world.rank)
    controller.events.emit(event)
