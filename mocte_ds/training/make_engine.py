"""The engine of a run, what its optimizer holds, and the seeds of everything that draws numbers."""

import random
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn

from mocte_ds.deepspeed_settings import tensor_ranks
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.engine import initialize
from mocte_ds.errors import ConfigError
from mocte_ds.rotary_tables import kept_in_fp32
from mocte_ds.training.compiled import compile_regions


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # takes no more
    torch.manual_seed(seed)


def make_engine(model: nn.Module, settings: dict[str, Any], compiled: bool = False) -> Any:
    """An engine with blocks, or DeepSpeed's own for a dense run; `engine.mesh` tells of its ranks.

    Args:
        model: from :func:`mocte_ds.training.model.make_model`; changed in place.
        settings: the complete DeepSpeed config.
        compiled: whether to compile what lies around the blocks, see :func:`compile_regions`.
    """
    engine = _engine(model, settings)
    if compiled:
        compile_regions(model)
    return engine


def _engine(model: nn.Module, settings: dict[str, Any]) -> Any:
    if "mocte" in settings:
        return initialize(model=model, config=settings)[0]
    if tensor_ranks(settings) > 1:
        raise ConfigError('tensor_parallel.autotp_size needs a "mocte" block; a dense run has data parallelism only.')
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    with kept_in_fp32(model):
        engine = deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]
    engine.mesh = mesh_of_processes()
    return engine


def optimizer_bytes(engine: Any) -> int:
    """Bytes of master weights and of the optimizer's state on this rank."""
    if hasattr(engine, "mocte"):
        return engine.mocte.optimizer_bytes()
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [p for group in base.param_groups for p in group["params"]]
    tensors += [v for values in base.state.values() for v in values.values() if torch.is_tensor(v)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
