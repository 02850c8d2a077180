"""A model whose weights stay where they are stored: a layer's are in memory while it is called."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mocte_ds.convert.hf.shards import Shards
from mocte_ds.errors import CheckpointError
from mocte_ds.layers import around_layers, layers_of

_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""Variable that lets transformers read a tensor when it is its turn, and not as many as threads can."""


class ByLayer:
    """A model of which only those weights are in memory that are needed."""

    def __init__(self, model: nn.Module, names: Collection[str], read: Callable[[str], Tensor]) -> None:
        """Take a model; none of its weights is read yet.

        Args:
            model: whatever stands in the place of the weights takes no memory.
            names: of the weights, parameters and buffers. Where one tensor stands in several places, one of its names.
            read: a weight by its name.
        """
        self.model, self._read = model, read
        named = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in names}
        self._origin = {id(tensor): name for name, tensor in named.items()}
        self._places: dict[nn.Module, list[tuple[dict[str, Any], str, Tensor, str]]] = {}
        for part in model.modules():
            for tensors in (part._parameters, part._buffers):
                for name, blank in tensors.items():
                    if blank is not None and id(blank) in self._origin:
                        place = (tensors, name, blank, self._origin[id(blank)])
                        self._places.setdefault(part, []).append(place)

    def value(self, tensor: Tensor) -> Tensor:
        """What a tensor of the model stands for."""
        return self._read(self._origin[id(tensor)]) if id(tensor) in self._origin else tensor

    def load(self, *parts: nn.Module) -> None:
        """Read all weights of parts of the model, and of the modules in them.

        Raises:
            CheckpointError: a weight has another shape than its place.
        """
        self._fill({module: None for part in parts for module in part.modules()})

    def free(self, *parts: nn.Module) -> None:
        """Forget what :meth:`load` has read."""
        for part in parts:
            for module in part.modules():
                for tensors, name, blank, _ in self._places.get(module, ()):
                    tensors[name] = blank

    @contextlib.contextmanager
    def running(self) -> Iterator[Any]:
        """The model, which can be called within it; weights outside of its layers are in memory all the time."""
        inside = {module for layer in layers_of(self.model) for module in layer.modules()}
        self._fill({module: None for module in self.model.modules() if module not in inside})
        try:
            with around_layers(self.model, self.load, self.free):
                yield self.model
        finally:
            self.free(self.model)

    def _fill(self, modules: Collection[nn.Module]) -> None:
        made: dict[int, Tensor] = {}
        for module in modules:
            for tensors, name, blank, origin in self._places.get(module, ()):
                if id(blank) not in made:
                    tensor = self._read(origin)
                    if tensor.shape != blank.shape:
                        raise CheckpointError(
                            f"{origin} has the shape {tuple(tensor.shape)}, and {tuple(blank.shape)} is wanted."
                        )
                    is_parameter = isinstance(blank, nn.Parameter)
                    made[id(blank)] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
                tensors[name] = made[id(blank)]


class _Spool:
    """Tensors in a file without a name, which is gone with this object or its process."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._end = folder, 0
        self._file: IO[bytes] | None = None

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Write a tensor; what is returned reads it again.

        Raises:
            CheckpointError: there is no room.
        """
        tensor, start = tensor.detach().contiguous(), self._end
        try:
            file = self._file = self._file or tempfile.TemporaryFile(dir=self._folder)
            file.seek(start)
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            file.flush()
            self._end = file.tell()
        except OSError as error:
            raise CheckpointError(f"cannot keep what transformers read beside {self._folder}: {error}.") from error
        shape, dtype = tensor.shape, tensor.dtype

        def read() -> Tensor:
            found = torch.empty(shape, dtype=dtype)
            file.seek(start)
            memory = memoryview(found.reshape(-1).view(torch.uint8).numpy())
            memory[:] = file.read(len(memory))
            return found

        return read


class _Stored:
    """A tensor of a folder, which transformers read when they come to it."""

    def __init__(self, shards: Shards, name: str) -> None:
        self._shards, self._name = shards, name

    def __getitem__(self, _all: object) -> Tensor:
        return self._shards.read(self._name)

    def get_shape(self) -> list[int]:
        """As a slice of safetensors has it."""
        return self._shards.outline(self._name)[1]

    def get_dtype(self) -> str:
        """As a slice of safetensors has it."""
        return self._shards.outline(self._name)[0]


def load_by_layer(
    folder: Path, load: Callable[[], Any], beside: Path, look: Callable[[str, Tensor], None] = lambda *_: None
) -> ByLayer:
    """Let transformers load a model, of which never more than a tensor is in memory.

    Each tensor is read and converted by transformers, and dropped. When it is needed it is read again: from the files
    where it is the one of that name in them, and from a file without a name otherwise.

    Args:
        folder: in Hugging Face format.
        load: calls from_pretrained for it, and returns the model.
        beside: folder on a disk with room for what transformers have made of other tensors than they found.
        look: called with the name of every parameter, and its value.

    Raises:
        CheckpointError: a file is missing or damaged, or there is no room. And whatever ``load`` and ``look`` raise.
    """
    from transformers import PreTrainedModel

    shards, spool = Shards(folder), _Spool(beside)
    kept: dict[str, Callable[[], Tensor]] = {}
    how = vars(PreTrainedModel)["_load_pretrained_model"]
    usual = PreTrainedModel._load_pretrained_model

    def one_by_one(model: Any, state_dict: Any, _files: Any, *rest: Any, **more: Any) -> Any:
        paths = {part: path for path, part in model.named_modules()}

        def keep(owner: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
            if parameter is None or parameter.is_meta or owner not in paths:
                return None
            path = f"{paths[owner]}.{name}".removeprefix(".")
            look(path, parameter)
            kept[path] = _again(shards, path, parameter.detach(), spool)
            blank = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            vars(blank).update(vars(parameter))  # among them that it must not be initialised again
            return blank

        hook = register_module_parameter_registration_hook(keep)
        stored = {name: _Stored(shards, name) for name in shards.files} if state_dict is None else state_dict
        try:
            return usual(model, stored, None, *rest, **more)
        finally:
            hook.remove()

    before = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    PreTrainedModel._load_pretrained_model = staticmethod(one_by_one)
    try:
        model = load()
    finally:
        PreTrainedModel._load_pretrained_model = how
        if before is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before
    return ByLayer(model, kept.keys(), lambda name: kept[name]())


def same_as_stored(stored: Tensor, loaded: Tensor) -> bool:
    """Whether transformers have loaded a tensor of the files as it is."""
    return stored.shape == loaded.shape and torch.equal(stored.to(loaded.dtype), loaded)


def _again(shards: Shards, path: str, loaded: Tensor, spool: _Spool) -> Callable[[], Tensor]:
    """What gives a tensor once more that is in memory now."""
    dtype = loaded.dtype
    if path in shards.files and same_as_stored(shards.read(path), loaded):
        return lambda: shards.read(path).to(dtype)
    narrow = next((kind for kind in (torch.bfloat16, torch.float16) if _holds(kind, loaded)), dtype)
    read = spool.put(loaded.to(narrow))
    return lambda: read().to(dtype)


def _holds(kind: torch.dtype, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and torch.equal(tensor.to(kind).to(tensor.dtype), tensor)
