"""FFNs whose matrices lie directly in a layer, which calls them itself (OPT, XGLM, BioGPT): which modules they are.

No names are known. A layer's own forward is traced without any weights: the modules between two matrices that fit may
be gathered into one module at the place of the first if the layer then runs the same operations on the same tensors.
"""

import copy
import inspect
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mocte_ds.errors import ConfigError
from mocte_ds.moe.ffn_shape import ffn_shape
from mocte_ds.remote_code.experts_mocte import gather, in_out, is_matrix
from mocte_ds.shown import one_line

# Shapes: d features, f hidden units.

_SHAPE = (2, 3)
"""Sequences and tokens of a trace; of no consequence."""


@dataclass(frozen=True)
class LooseFFN:
    """Two matrices d -> f -> d of a layer, and what is called between them."""

    parts: tuple[str, ...]
    """Names of the layer's modules in the order of their calls."""
    obstacle: str | None
    """Why they cannot be gathered; None: they can."""


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[LooseFFN]]]" = weakref.WeakKeyDictionary()
"""What was found in a layer, and of which structure: a start looks several times, and a trace takes some 50 ms."""


def loose_ffns(layer: nn.Module) -> list[LooseFFN]:
    """Pairs of a module's own matrices that it calls one after the other, in that order.

    Args:
        layer: any module; it is not called, but a copy of it without weights.
    """
    matrices = {name: in_out(child) for name, child in layer.named_children() if is_matrix(child)}
    pairs = [(a, b) for a in matrices for b in matrices if a != b and matrices[a] == matrices[b][::-1]]
    if not pairs:
        return []
    structure = [(name, id(part), *_plain(part)) for name, part in layer.named_modules()]
    if layer not in _KNOWN or _KNOWN[layer][0] != structure:
        _KNOWN[layer] = (structure, _found(layer, matrices, pairs))
    return _KNOWN[layer][1]


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """What a module's forward may go by, besides tensors."""
    kinds = (bool, int, float, str)
    return [(name, value) for name, value in vars(module).items() if isinstance(value, kinds) and name != "training"]


def _found(
    layer: nn.Module, matrices: Mapping[str, tuple[int, int]], pairs: Sequence[tuple[str, str]]
) -> list[LooseFFN]:
    failed: list[str] = []
    # The feature enters most matrices of a layer.
    widths = Counter(in_out(part)[0] for part in layer.modules() if is_matrix(part)).most_common()
    for width in [width for width, _ in widths if width in {matrices[first][0] for first, _ in pairs}]:
        try:
            runs = _runs(layer, width)
        except Exception as error:  # whatever a user's module raises
            failed.append(one_line(error, 120))
            continue
        calls = runs[-1].calls
        order = [i for i, call in enumerate(calls) if call.name in matrices]
        chains = [
            tuple(call.name for call in calls[start : end + 1]) for start, end in zip(order, order[1:], strict=False)
        ]
        found = [LooseFFN(c, _obstacle(layer, width, runs, c)) for c in chains if (c[0], c[-1]) in pairs]
        # Of square matrices side by side, as in attention, nobody wants to know why they are no FFN.
        return [ffn for ffn in found if ffn.obstacle is None or matrices[ffn.parts[0]][1] != width]
    reason = failed[0].rstrip(".")
    return [LooseFFN(pairs[0], f"{type(layer).__name__}, with {', '.join(matrices)}, cannot be run alone: {reason}")]


def gathered(layer: nn.Module) -> list[tuple[str, ...]]:
    """Parts of the FFNs of a layer that can be gathered, each module in one of them at most."""
    found: list[tuple[str, ...]] = []
    for ffn in loose_ffns(layer):
        if ffn.obstacle is None and not any(part in others for others in found for part in ffn.parts):
            found.append(ffn.parts)
    return found


def gather_named(model: nn.Module, names: Sequence[str]) -> None:
    """Gather the FFNs whose first matrix is named; a name of any other module but a matrix is passed over.

    Args:
        model: changed in place, once all are found.
        names: paths in it.

    Raises:
        ConfigError: a matrix that is not the first of such an FFN, and whose outputs are not as wide as its inputs; or
            a layer that has such an FFN, in a list of layers, and reads more than the feature.
    """
    found: list[tuple[nn.Module, tuple[str, ...]]] = []
    for name in names:
        module = model.get_submodule(name)
        path, _, step = name.rpartition(".")
        if not is_matrix(module):
            if step.isdigit() and len(inspect.signature(module.forward).parameters) > 1 and ffn_shape(module) is None:
                _refuse_layer(name, module)
            continue
        layer = model.get_submodule(path)
        near = [ffn for ffn in loose_ffns(layer) if step in ffn.parts]
        inputs, outputs = in_out(module)
        if fitting := [parts for parts in gathered(layer) if parts[0] == step]:
            found.append((layer, fitting[0]))
        elif inputs != outputs:
            reasons = [told(ffn) for ffn in near] or ["a block stands for an FFN"]
            raise ConfigError(f"mocte.modules matches {name}, one matrix {inputs} -> {outputs}: {'; '.join(reasons)}.")
    for layer, parts in found:
        gather(layer, parts)


def _refuse_layer(name: str, layer: nn.Module) -> None:
    if found := gathered(layer):
        raise ConfigError(
            f"mocte.modules matches {name} ({type(layer).__name__}), a layer that calls the matrices of its FFN "
            f"itself; name the first of them, {name}.{found[0][0]}."
        )


def told(ffn: LooseFFN) -> str:
    """What to say of matrices that are not where the pattern or the search has looked for an FFN."""
    first, last = ffn.parts[0], ffn.parts[-1]
    return f"name {first}, the first of {first} and {last}" if ffn.obstacle is None else ffn.obstacle


@dataclass
class _Call:
    """Of a module that lies directly in the layer."""

    name: str
    start: int
    """Operations before it."""
    end: int = -1
    """Operations until it has returned."""


class _Trace(TorchDispatchMode):
    """The operations of a run, with numbers for tensors in the order in which they are met."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.calls: list[_Call] = []
        self._met = list(known)  # as long as they live, no other tensor has their id
        self._numbers = {id(tensor): number for number, tensor in enumerate(known)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self.shown((args, kwargs or {}))
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, read, self.shown(output)))
        return output

    def shown(self, values: Any) -> Any:
        """Values with numbers in the places of tensors."""
        return tree_map(self._number, values)

    def _number(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._numbers)
            self._met.append(value)
        return ("tensor", self._numbers[id(value)], tuple(value.shape), value.dtype)

    def between(self, first: str, last: str) -> list[str]:
        """Names of the operations that the layer itself runs after one module and before another."""
        by_name = {call.name: call for call in self.calls}
        if not {first, last} <= by_name.keys():
            return []
        start, end = by_name[first].end, by_name[last].start
        inside = {i for call in self.calls for i in range(call.start, call.end)}
        return [self.operations[i][0].overloadpacket.__name__ for i in range(start, end) if i not in inside]


def _obstacle(layer: nn.Module, width: int, runs: Sequence[_Trace], parts: tuple[str, ...]) -> str | None:
    """Why the layer would compute something else if its modules were gathered; None: it would not."""
    first, last = parts[0], parts[-1]
    if read := re.search(rf"\bself\.({'|'.join(map(re.escape, parts))})\.\w+", _source(layer)):
        # A kernel of another device may need it, which no trace shows.
        return f"{type(layer).__name__}.forward reads {read[0]} itself"
    if max(Counter(call.name for call in runs[-1].calls if call.name in parts).values()) == 1:
        try:
            after = _runs(layer, width, parts)
        except Exception:  # it looks into a module that is somewhere else now
            after = []
        if [run.operations for run in after] == [run.operations for run in runs]:
            return None
    names: list[str] = next((found for run in runs if (found := run.between(first, last))), [])
    where = f"between {first} and {last}"
    if any(name in ("bernoulli_", "native_dropout") for name in names):
        return f"{type(layer).__name__} drops activations {where}; set that probability to 0"
    if names:
        return f"{type(layer).__name__} itself runs {', '.join(dict.fromkeys(names))} {where}, not as a module"
    return f"{type(layer).__name__} uses {', '.join(parts)} for more than to call one after the other"


def _source(layer: nn.Module) -> str:
    """Of a layer's forward; empty where it is not known."""
    try:
        return inspect.getsource(type(layer).forward)
    except (OSError, TypeError):
        return ""


def _runs(layer: nn.Module, width: int, parts: Sequence[str] = ()) -> list[_Trace]:
    """Operations of a layer in evaluation and in training mode, without weights and without computing anything.

    Args:
        layer: it stays as it is.
        width: d.
        parts: that are gathered before.
    """
    probe = _without_weights(layer)
    features = torch.empty(*_SHAPE, width, device="meta")
    known = [*probe.parameters(), *probe.buffers(), features]
    # Its forward itself: what transformers do around it in training, such as checkpointing, wants a gradient.
    needed = [p.name for p in list(inspect.signature(probe.forward).parameters.values())[1:] if _is_needed(p)]
    if parts:
        gather(probe, parts)
    traces = []
    for training in (False, True):
        probe.train(training)
        trace = _Trace(known)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _calls_told(probe, trace), trace:
            output = probe.forward(features, **dict.fromkeys(needed))
        trace.operations.append(("returned", trace.shown(output)))
        traces.append(trace)
    return traces


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def _without_weights(layer: nn.Module) -> nn.Module:
    """A copy of a layer on the meta device; floating numbers in fp32, plain attention instead of kernels."""
    memo: dict[int, Any] = {}
    for old in (*layer.parameters(), *layer.buffers()):
        dtype = torch.float32 if old.is_floating_point() else old.dtype
        new = torch.empty(old.shape, dtype=dtype, device="meta")
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    probe = copy.deepcopy(layer, memo)
    for part in probe.modules():
        config: Any = getattr(part, "config", None)  # a copy, too
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"
    return probe


@contextmanager
def _calls_told(layer: nn.Module, trace: _Trace) -> Iterator[None]:
    """Within it a trace is told of the calls of the modules that lie directly in a layer."""

    def begin(name: str, *_: Any) -> None:
        trace.calls.append(_Call(name, len(trace.operations)))

    def end(name: str, *_: Any) -> None:
        next(call for call in reversed(trace.calls) if call.name == name).end = len(trace.operations)

    hooks: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (partial(begin, name), partial(end, name)) for name, _ in layer.named_children()
    ]
    handles = [
        handle
        for child, (before, after) in zip(layer.children(), hooks, strict=True)
        for handle in (child.register_forward_pre_hook(before), child.register_forward_hook(after))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
