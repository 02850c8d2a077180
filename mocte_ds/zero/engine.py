"""A DeepSpeed engine that makes our ZeRO optimizer and hands its checkpoint files to our saver."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger

from mocte_ds.dist.mesh import Mesh
from mocte_ds.errors import ConfigError
from mocte_ds.moe.idle import freed_parameters
from mocte_ds.zero.checkpoint_files import CheckpointFiles, use_checkpoint_files
from mocte_ds.zero.conformance import with_unit_optimizer
from mocte_ds.zero.cut import cut_weights, uncut_state_dicts
from mocte_ds.zero.gathered_weights import (
    refused_by_converters,
    require_local_is_whole,
    whole_weights,
    write_weights_file,
)
from mocte_ds.zero.partitioned_files import weights_in_state_dicts, without_weights, writers
from mocte_ds.zero.process_groups import require_axes_of
from mocte_ds.zero.stage3 import prepare_model


class UnitEngine(DeepSpeedEngine):
    """Every private method of DeepSpeed's engine that we replace, and nothing else."""

    checkpoint_engine: CheckpointFiles

    def __init__(self, mesh: Mesh, **settings: Any) -> None:
        """DeepSpeed's, with the mesh that :func:`mocte_ds.zero.process_groups.make_mesh` has made."""
        self.mesh = mesh
        super().__init__(**settings)
        require_axes_of(self, mesh)

    def forget_step(self) -> None:
        """Drop what the passes of a step that will not be finished have left: the next one is the first of a step."""
        self.optimizer.forget_gradients()
        self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        return with_unit_optimizer(DeepSpeedEngine._configure_zero_optimizer)(self, optimizer)

    def _configure_checkpointing(self) -> None:
        super()._configure_checkpointing()
        use_checkpoint_files(self, self.mesh)

    def _validate_zero3_moe_compatibility(self) -> None:
        # DeepSpeed refuses its expert layers here, because stage 3 would overwrite experts by those of rank 0.
        prepare_model(self.module, self.device)

    def _broadcast_model(self) -> None:
        # At stage 3 the model is still in CPU memory, and every parameter is broadcast when it is partitioned.
        if not self.zero_optimization_partition_weights():
            super()._broadcast_model()

    def _save_moe_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        partitioned = self.zero_optimization_partition_weights()
        weights = weights_in_state_dicts(self.module) if partitioned else uncut_state_dicts(self.module, self.mesh)
        turns = self.checkpoint_engine.taking_turns(writers(self.module, self.mesh.expert_data.size))
        with weights, refused_by_converters(self.module), turns:
            super()._save_moe_checkpoint(*args, **kwargs)

    def load_module_state_dict(self, checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """As DeepSpeed's; under stage 3 weights come from the optimizer's files and from each rank's frozen parts."""
        if self.zero_optimization_partition_weights():
            checkpoint = without_weights(checkpoint, self.module, self.param_names)
        elif self.mesh.tensor.size > 1:
            checkpoint = {**checkpoint, "module": cut_weights(checkpoint["module"], self.module, self.mesh.tensor)}
        super().load_module_state_dict(checkpoint, *args, **kwargs)

    def module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, if one rank has all of it.

        Raises:
            CheckpointError: it would be a part of the model; says what gives all of it.
        """
        require_local_is_whole(self.module, self.zero_optimization_partition_weights(), self.mesh.tensor.size)
        return super().module_state_dict(*args, **kwargs)

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """All weights in the model's data type as one file, the experts of all ranks among them (collective).

        Arguments are DeepSpeed's. The names are those of a model with ep_size 1.

        Returns:
            Whether it was written: under ZeRO stage 3 only with `stage3_gather_16bit_weights_on_model_save`.

        Raises:
            CheckpointError: on all ranks; the file could not be written, and what was there before is untouched.
        """
        partitioned = self.zero_optimization_partition_weights()
        if partitioned and not self.zero_gather_16bit_weights_on_model_save():
            logger.warning(
                f"{save_filename} was not saved: zero_optimization.stage3_gather_16bit_weights_on_model_save is false."
            )
            return False
        weights = self._consolidated_16bit_state_dict(exclude_frozen_parameters)
        write_weights_file(Path(save_dir) / save_filename, weights, self.mesh.world)
        return True

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, torch.Tensor] | None:
        partitioned = self.zero_optimization_partition_weights()
        if partitioned:
            self.optimizer.checkpoint_event_prologue()
        weights = whole_weights(self.module, self.mesh, partitioned, exclude_frozen_parameters)
        if partitioned:
            self.optimizer.checkpoint_event_epilogue()
        return weights

    _zero3_consolidated_16bit_state_dict = _consolidated_16bit_state_dict  # DeepSpeed would gather over all ranks

    def _get_zero_frozen_param_attributes(self, attr_func: Any) -> Any:
        # At stages 1 and 2 DeepSpeed would save rank 0's copy of every parameter outside of the optimizer and write it
        # over the frozen experts of all other ranks when it loads. The expert files hold each of them already.
        if attr_func == self._get_param_fragment_func and not self.zero_optimization_partition_weights():
            return None
        return self._without_freed(super()._get_zero_frozen_param_attributes(attr_func))

    def _get_shared_params(self) -> Any:
        # At stages 1 and 2 DeepSpeed takes parameters at one address for one, and all that are freed are at 0.
        return self._without_freed(super()._get_shared_params())

    def _without_freed(self, found: dict[str, Any]) -> dict[str, Any]:
        freed = {self.param_names[parameter] for parameter in freed_parameters(self.module)}
        return type(found)((name, value) for name, value in found.items() if name not in freed)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        wrapper = super()._do_optimizer_sanity_check(basic_optimizer)
        if not self.zero_optimization() or wrapper != "zero_optimization":
            raise ConfigError(
                f"DeepSpeed would wrap the optimizer as '{wrapper}', which cannot freeze units; use ZeRO stage 1, 2 or "
                "3 and leave data_types.grad_accum_dtype at its default."
            )
        return wrapper
