"""A DeepSpeed engine that makes our ZeRO optimizer and hands its checkpoint files to our saver."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from mocte_ds.errors import ConfigError
from mocte_ds.zero.checkpoint_files import PlainFiles, use_plain_files
from mocte_ds.zero.conformance import with_unit_optimizer
from mocte_ds.zero.partitioned_files import weights_in_state_dicts, without_weights
from mocte_ds.zero.stage3 import prepare_model


class UnitEngine(DeepSpeedEngine):
    """Every private method of DeepSpeed's engine that we replace, and nothing else."""

    checkpoint_engine: PlainFiles

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        return with_unit_optimizer(DeepSpeedEngine._configure_zero_optimizer)(self, optimizer)

    def _configure_checkpointing(self) -> None:
        super()._configure_checkpointing()
        use_plain_files(self)

    def _validate_zero3_moe_compatibility(self) -> None:
        # DeepSpeed refuses its expert layers here, because stage 3 would overwrite experts by those of rank 0.
        prepare_model(self.module, self.device)

    def _broadcast_model(self) -> None:
        # At stage 3 the model is still in CPU memory, and every parameter is broadcast when it is partitioned.
        if not self.zero_optimization_partition_weights():
            super()._broadcast_model()

    def _save_moe_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        partitioned = self.zero_optimization_partition_weights()
        with weights_in_state_dicts(self.module) if partitioned else contextlib.nullcontext():
            super()._save_moe_checkpoint(*args, **kwargs)

    def load_module_state_dict(self, checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's; under stage 3 weights come from the optimizer's files and from each rank's frozen parts."""
        if self.zero_optimization_partition_weights():
            checkpoint = without_weights(checkpoint, self.module)
        super().load_module_state_dict(checkpoint, *args, **kwargs)

    def _get_zero_frozen_param_attributes(self, attr_func: Any) -> Any:
        # At stages 1 and 2 DeepSpeed would save rank 0's copy of every parameter outside of the optimizer and write it
        # over the frozen experts of all other ranks when it loads. The expert files hold each of them already.
        if attr_func == self._get_param_fragment_func and not self.zero_optimization_partition_weights():
            return None
        return super()._get_zero_frozen_param_attributes(attr_func)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        wrapper = super()._do_optimizer_sanity_check(basic_optimizer)
        if not self.zero_optimization() or wrapper != "zero_optimization":
            raise ConfigError(
                f"DeepSpeed would wrap the optimizer as '{wrapper}', which cannot freeze units; use ZeRO stage 1, 2 or "
                "3 and leave data_types.grad_accum_dtype at its default."
            )
        return wrapper
