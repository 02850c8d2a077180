"""Which forward pass a block runs in: that of the model's current call, or the one that is being recomputed."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.errors import MocteError
from mocte_ds.moe.forward import ForwardState, require_domain
from mocte_ds.moe.graph import backward_task, recomputed_state, tag_made, tag_read
from mocte_ds.moe.observer import Observer
from mocte_ds.remote_code.calls_mocte import cache_in
from mocte_ds.remote_code.tokens_mocte import Tokens

__all__ = ["BatchContext", "ForwardState", "Tokens"]


class _Running:
    """A forward pass that has begun and not ended."""

    def __init__(self, state: ForwardState, task: int, again: bool, module: nn.Module | None = None) -> None:
        self.state, self.task, self.again, self.module = state, task, again, module

    def tell_abandoned(self) -> None:
        """Tell the observer of a pass that ends incomplete; one of a complete pass has been let go."""
        if self.state.observer is not None and not self.again:
            self.state.observer.abandoned()


class BatchContext:
    """Knows the forward passes of a model; one object is shared by all of its blocks.

    A hook on the model makes a :class:`ForwardState` for every call and ends it, also where an exception ends the call.
    """

    def __init__(self, eod_id: int | None = None) -> None:
        """No pass runs.

        Args:
            eod_id: token id that ends a document; None: every sequence is one document.
        """
        self.eod_id = eod_id
        self.usual_tokens: float | None = None
        """See :class:`ForwardState`."""
        self.step_tokens: Tensor | int = 0
        """Tokens that count in this rank's training passes of the current optimizer step."""
        self.step_passes = 0
        """The number of those passes, whoever called the model."""
        self.loss_scale: Tensor | float | None = None
        """Gradient of the model's loss in the current backward pass; None: 1."""
        self._next: dict[str, Any] = {}
        self._observer: Observer | None = None
        self._passes: list[_Running] = []
        self._alive: weakref.WeakSet[ForwardState] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model begins without passes, and no controller watches it.
        return {"eod_id": self.eod_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["eod_id"])  # type: ignore[misc]

    # ---- the model's calls -----------------------------------------------------------------------------------------

    def follow(self, model: nn.Module, blocks: Iterable[str]) -> None:
        """Make a state for every call of ``model``, and tag what the modules around its blocks read.

        A part of the model that holds all blocks, such as its base model, may be called by itself: that is a pass too.

        Args:
            model: any model.
            blocks: names of its blocks.
        """
        each = [{name[:i] for i, letter in enumerate(name) if letter == "."} for name in blocks]
        of_all = set.intersection(*each) if each else set()
        for name in ["", *sorted(of_all)]:
            self._follow(model.get_submodule(name), begin=self._begin_part if name else self._begin)
        for name in sorted(set().union(*each)):
            model.get_submodule(name).register_forward_pre_hook(self._tag_input, with_kwargs=True)

    def _follow(self, module: nn.Module, begin: Callable[..., None]) -> None:
        # No closures: a copied model's hooks must tell the copied context.
        names = list(inspect.signature(module.forward).parameters)
        module.register_forward_pre_hook(partial(begin, names), with_kwargs=True)
        module.register_forward_hook(self._complete)
        module.register_forward_hook(self._end, always_call=True)

    def forget_interrupted(self) -> None:
        """Drop what a KeyboardInterrupt or SystemExit has left, for which torch calls no hook: no pass runs."""
        if backward_task() == -1 and self._passes:
            left, self._passes = self._passes, []
            for running in left:
                running.tell_abandoned()

    def announce(self, **facts: Any) -> None:
        """Set fields of the :class:`ForwardState` of the model's next call, which counts as training."""
        self._next = {**facts, "counting": True}

    def unannounce(self) -> None:
        """No call came."""
        self._next = {}

    def _begin(self, names: list[str], module: nn.Module, args: tuple, kwargs: dict) -> None:
        facts, self._next = self._next, {}
        given, first = _by_name(names, args, kwargs), args[0] if args else None
        state, task, again = ForwardState.of_call(given, first, self.eod_id), backward_task(), False
        if task != -1:
            # All of the model is checkpointed, or a hook calls it for something else.
            found = recomputed_state("the model")
            again = found is not None and found.ids is not None and _same(found.ids, state.ids)
            state = found if again and found is not None else state
        else:
            state.counting = module.training and torch.is_grad_enabled()
        self._push(state, task, again, module)
        if not again:
            for name, value in facts.items():
                setattr(state, name, value)
            require_domain(state.domain, None if state.ids is None else len(state.ids))

    def _begin_part(self, names: list[str], module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A part of the model is called: by the model, in a recomputation, or by itself."""
        if not self._passes and backward_task() == -1:
            self._begin(names, module, args, kwargs)

    def _push(self, state: ForwardState, task: int = -1, again: bool = False, module: nn.Module | None = None) -> None:
        if not again:
            state.usual_tokens = self.usual_tokens
            state.observer = self._observer if state.observer is None else state.observer
            self._alive.add(state)
        self._passes.append(_Running(state, task, again, module))

    def _complete(self, module: nn.Module, _args: tuple, output: Any) -> None:
        running = self._passes[-1] if self._passes else None
        if running is None or running.module is not module or running.again:
            return
        state = running.state
        state.leave(cache_in(output))
        tag_made(output, state)
        self._commit(state)
        state.observer = None

    def _end(self, module: nn.Module, _args: tuple, _output: Any) -> None:
        if not self._passes or self._passes[-1].module is not module:
            return
        running = self._passes.pop()
        running.state.cache = None  # its keys and values have the graph that holds the state
        running.tell_abandoned()

    def _commit(self, state: ForwardState) -> None:
        state.commit()
        if state.counting and state.token_count is not None:
            self.step_tokens, self.step_passes = self.step_tokens + state.token_count, self.step_passes + 1
            state.counting = False

    def _tag_input(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        state = self._running()
        if state is None:
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                tag_read(value, state)

    # ---- the blocks' questions -------------------------------------------------------------------------------------

    @contextmanager
    def block_runs(self, block: nn.Module, name: str) -> Iterator[tuple[ForwardState, bool]]:
        """The state of the pass that a block runs in, and whether this is a recomputation.

        A block that is called outside of the model's calls runs in a pass of its own, of which nothing is known. Its
        loads count where it trains; its tokens do not, because other blocks may read the same ones.

        Raises:
            MocteError: a recomputation whose pass is not to be found.
        """
        task = backward_task()
        if self._passes and self._passes[-1].task == task:
            yield self._passes[-1].state, self._passes[-1].again
        elif task != -1:
            yield self._recomputed(name), True
        else:
            state = ForwardState(end_id=self.eod_id, counting=block.training and torch.is_grad_enabled())
            self._push(state)
            try:
                yield state, False
                state.commit()
                state.observer = None
            finally:
                self._passes.pop().tell_abandoned()

    def current(self) -> ForwardState:
        """The state of the current pass; outside of any, that of a pass of which nothing is known."""
        return self._running() or ForwardState(end_id=self.eod_id)

    def _running(self) -> ForwardState | None:
        task = backward_task()
        if self._passes and self._passes[-1].task == task:
            return self._passes[-1].state
        return None if task == -1 else recomputed_state()

    def _recomputed(self, name: str) -> ForwardState:
        found = recomputed_state(name)
        if found is not None:
            return found
        alive = list(self._alive)
        if len(alive) == 1:
            return alive[0]
        raise MocteError(
            f"{name} runs inside of a backward pass, and the forward pass that it belongs to cannot be found: "
            f"{len(alive)} passes are waiting for theirs, and the features that the block reads have no gradient. Run "
            "each pass's backward before the next forward, or do not checkpoint layers below which nothing trains."
        )

    @contextmanager
    def running(self, state: ForwardState) -> Iterator[ForwardState]:
        """Context manager: blocks that are called by themselves run in this pass."""
        self._push(state, backward_task())
        try:
            yield state
            self._commit(state)
            state.observer = None
        finally:
            self._passes.pop().tell_abandoned()

    @contextmanager
    def watched_by(self, observer: Observer) -> Iterator[None]:
        """Tell an observer of the passes that begin within it."""
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    def pending(self) -> list[ForwardState]:
        """Passes whose graphs still exist and whose balance losses no backward pass has added yet."""
        return [state for state in self._alive if state.losses]


def _by_name(names: list[str], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name; a batch that is handed over as one mapping is opened."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) == 1 and isinstance(args[0], Mapping):
        given = {**args[0], **kwargs}
    return given


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and one.data_ptr() == other.data_ptr()
