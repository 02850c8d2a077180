"""megatron-core in one process without a GPU, which parts of it do not expect."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

from mocte_ds.errors import ConfigError


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let megatron-core run on a CPU.

    Its distributed checkpoints and its router ask torch.cuda for the device, attention with a window makes its mask on
    one, and dropout of rate 0 asks for a state of CUDA's random numbers. Without Transformer Engine megatron-core 0.16
    reads a name that it has not defined.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of missing GPU libraries
        from megatron.core.fusions import fused_softmax
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils

        random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        try:
            with contextlib.ExitStack() as patches:
                patches.enter_context(mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")))
                patches.enter_context(mock.patch("torch.cuda.synchronize"))
                window = _made_on_cpu(fused_softmax.get_sliding_window_causal_mask)
                patches.enter_context(mock.patch.object(fused_softmax, "get_sliding_window_causal_mask", window))
                if not hasattr(moe_utils, "te_general_gemm"):
                    patches.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))
                yield
        finally:
            random.initialize_rng_tracker(force_reset=True)
            _end_queue()


class _OnCpu(TorchFunctionMode):
    """Makes tensors on the CPU that are asked for on a GPU."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _made_on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        with _OnCpu():
            return function(*args)

    return call


def _end_queue() -> None:
    """End the process that serves the queue which megatron-core 0.16 makes at the first save.

    It would outlive a process that ends without Python's own clean-up (a rank that is killed, or leaves by os._exit).
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue = filesystem_async._results_queue
    if queue is not None:
        filesystem_async._results_queue = None
        queue._manager.shutdown()


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """megatron-core's groups for this process alone, on a CPU.

    Raises:
        ConfigError: the process belongs to a group already.
    """
    if distributed.is_initialized():
        raise ConfigError("conversions run in one process; this one belongs to a torch.distributed group already.")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with on_cpu():
            from megatron.core import parallel_state

            parallel_state.initialize_model_parallel()
            try:
                yield
            finally:
                parallel_state.destroy_model_parallel()
    finally:
        distributed.destroy_process_group()
