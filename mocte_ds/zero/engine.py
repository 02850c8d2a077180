"""A DeepSpeed engine that makes our ZeRO optimizer and hands its checkpoint files to our saver."""

from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from mocte_ds.errors import ConfigError
from mocte_ds.zero.checkpoint_files import PlainFiles, use_plain_files
from mocte_ds.zero.conformance import with_unit_optimizer


class UnitEngine(DeepSpeedEngine):
    """Every private method of DeepSpeed's engine that we replace, and nothing else."""

    checkpoint_engine: PlainFiles

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        return with_unit_optimizer(DeepSpeedEngine._configure_zero_optimizer)(self, optimizer)

    def _configure_checkpointing(self) -> None:
        super()._configure_checkpointing()
        use_plain_files(self)

    def _get_zero_frozen_param_attributes(self, attr_func: Any) -> Any:
        # DeepSpeed would save rank 0's copy of every parameter outside of the optimizer and write it over the frozen
        # experts of all other ranks when it loads. The expert files hold each of them already.
        if attr_func == self._get_param_fragment_func:
            return None
        return super()._get_zero_frozen_param_attributes(attr_func)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        wrapper = super()._do_optimizer_sanity_check(basic_optimizer)
        if not self.zero_optimization() or wrapper != "zero_optimization":
            raise ConfigError(
                f"DeepSpeed would wrap the optimizer as '{wrapper}', which cannot freeze units; use ZeRO stage 1 or 2 "
                "and leave data_types.grad_accum_dtype at its default."
            )
        return wrapper
