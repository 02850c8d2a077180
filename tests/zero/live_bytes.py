"""Bytes of all tensors that a process holds, at every operation: what a GPU's peak counter would say."""

import gc
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages that are there at first and those that operations make in it, each once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        gc.collect()
        for item in gc.get_objects():
            if isinstance(item, Tensor):
                self._see(item)
        self.peak = self.now()
        """Most bytes so far."""

    def now(self) -> int:
        """Bytes that are held."""
        self._seen = {key: kept for key, kept in self._seen.items() if not kept[0].expired()}
        return sum(size for _, size in self._seen.values())

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._see(item)
        self.peak = max(self.peak, self.now())
        return result
