"""DeepSpeed's ZeRO-3 optimizer whose partition units can leave (frozen) and enter (born, thawed) in mid-run.

Everything here relies on private parts of DeepSpeed; mocte_ds/zero/conformance.py names the versions it was checked on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from mocte_ds.dist.collectives import gather_rows, max_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.zero.unit_optimizer import UnitOptimizer, UnitState, placed_scalar

_PRIVATE = "_DeepSpeedZeroOptimizer_Stage3__"


def prepare_model(model: nn.Module, device: torch.device | str) -> None:
    """Tell ZeRO-3 which ranks share an expert; without marks it overwrites all experts by those of rank 0.

    The marks are those of DeepSpeed's AutoEP, which ZeRO-3 follows on any parameter.

    Args:
        model: in CPU memory: ZeRO-3 moves one parameter after another and keeps this rank's part of it.
        device: where the buffers go, which nobody else would move.
    """
    for parameter in model.parameters():
        if is_moe_param(parameter):
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = parameter.group_name
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


class UnitZero3Optimizer(UnitOptimizer, DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 over units: what is frozen stays partitioned, and every pass gathers it.

    A rebuild is collective: all ranks take part as soon as one of them has something to change. It moves the weights
    that train into a new buffer through CPU memory, gathers each of them once, one at a time, and leaves masters and
    moments where they are. Module hooks, which hold on to the object that gathers weights, are made once.
    """

    fp16_groups: list[list[nn.Parameter]]
    fp16_partitioned_groups: list[list[Tensor]]
    fp16_partitioned_groups_flat: list[Tensor]
    fp32_partitioned_groups_flat: list[Tensor]
    lp_param_buffer: Tensor | None
    grad_partitions_flat_buffer: Tensor | None

    def __init__(
        self, module: nn.Module, init_optimizer: torch.optim.Optimizer, param_names: dict, **settings: Any
    ) -> None:
        """As DeepSpeed's."""
        self._begin(settings)
        self._fixed = (module, param_names)
        self._gathering: Any = None
        self._build(init_optimizer)

    def regroup(self, groups: Sequence[dict[str, Any]], born: UnitState | None = None) -> list[int]:
        """See UnitOptimizer; collective: the constructor has barriers, and gathers what all ranks share."""
        sources = super().regroup(groups, born)
        self._gather_small()
        return sources

    def _build(self, optimizer: torch.optim.Optimizer) -> None:
        module, names = self._fixed
        self._construct(optimizer.param_groups, module, optimizer, names)
        if self.contiguous_gradients and self._has_experts:
            for dtype, bucket in self._expert_buckets.items():
                device = get_accelerator().current_device_name()
                bucket.buffer = torch.empty(self.reduce_bucket_size, dtype=dtype, device=device)

    def changed_by(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether all ranks have to call :meth:`regroup`, as one of them has to (collective)."""
        return bool(max_over_ranks(torch.tensor(int(super().changed_by(groups))), Axis.of(self.dp_process_group)))

    def _take_apart(self, stays: dict[int, int]) -> None:
        self.parameter_offload.release_backward_leftovers()
        self._partition_all_parameters()
        for hook in [*self._grad_acc_hooks, *self._leaf_module_hooks]:
            hook.remove()
        # The order in which modules run may change with what trains.
        coordinator = self.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        staying = set(stays.values())
        for i, parameters in enumerate(self.fp16_groups):
            if self.sub_group_to_group_id[i] not in staying:
                for parameter in parameters:
                    # A view would keep the buffer of all weights alive.
                    parameter.ds_tensor.data = parameter.ds_tensor.data.clone()
        if any(self._is_model_weight(master) for masters in self._kept.values() for master in masters):
            # fp32: masters and model weights are the same, and move.
            self._kept = {}
        self.fp16_groups, self.fp16_partitioned_groups, self.fp16_partitioned_groups_flat = [], [], []
        self.fp32_partitioned_groups_flat, self.averaged_gradients = [], {}
        self.lp_param_buffer = self.grad_partitions_flat_buffer = None
        setattr(self, f"{_PRIVATE}param_id_to_grad_partition", {})
        self.ipg_buckets = {}

    def _sub_groups(self, number: int) -> list[int]:
        """DeepSpeed's numbers of the parts of a group: more than one where it is larger than `sub_group_size`."""
        return [i for i, group in self.sub_group_to_group_id.items() if group == number]

    def _masters_of(self, number: int) -> list[Tensor]:
        return [self.fp32_partitioned_groups_flat[i] for i in self._sub_groups(number)]

    def _gradients_of(self, number: int) -> list[Tensor]:
        if self.offload_optimizer:
            return [master.grad for master in self._masters_of(number)]
        return [gradient for i in self._sub_groups(number) for gradient in self.averaged_gradients[i] or []]

    def _is_model_weight(self, master: Tensor) -> bool:
        return any(master is flat for flat in self.fp16_partitioned_groups_flat)

    def unit_state(self, unit: str) -> UnitState:
        """Unpartitioned fp32 master weights and optimizer state of a unit (collective over the ranks that share it)."""
        state: UnitState = {}
        for number, group in enumerate(self.optimizer.param_groups):
            if group["unit"] != unit:
                continue
            for i in self._sub_groups(number):
                master, offset = self.fp32_partitioned_groups_flat[i], 0
                parts = {"master": master, **self.optimizer.state.get(master, {})}
                for parameter in self.fp16_groups[i]:
                    length = parameter.partition_numel()
                    state[parameter] = {
                        name: self._gathered(part, offset, parameter)
                        if torch.is_tensor(part) and part.shape == master.shape
                        else part
                        for name, part in parts.items()
                    }
                    offset += length
        return state

    @staticmethod
    def _gathered(part: Tensor, offset: int, parameter: nn.Parameter) -> Tensor:
        own = part.detach().narrow(0, offset, parameter.partition_numel()).clone()
        return gather_rows(own, Axis.of(parameter.ds_process_group))[: parameter.ds_numel].view(parameter.ds_shape)

    def own_part(self, state: UnitState) -> UnitState:
        """This rank's parts of the starting values of parameters, flat and with their padding."""

        def cut(value: Any, parameter: nn.Parameter) -> Any:
            if not torch.is_tensor(value) or value.shape != parameter.ds_shape:
                return value.clone() if torch.is_tensor(value) else value
            length = parameter.partition_numel()
            part = torch.zeros(length, dtype=value.dtype, device=value.device)
            start = dist.get_rank(group=parameter.ds_process_group) * length
            there = value.reshape(-1)[start : start + length]
            part[: there.numel()] = there
            return part

        return {p: {name: cut(value, p) for name, value in values.items()} for p, values in state.items()}

    @torch.no_grad()
    def _fill(self, number: int, born: UnitState) -> None:
        for i in self._sub_groups(number):
            parameters, master = self.fp16_groups[i], self.fp32_partitioned_groups_flat[i]
            if not all(parameter in born for parameter in parameters):
                return
            parts = [born.pop(parameter) for parameter in parameters]
            state = {
                name: torch.cat([part[name] for part in parts]).to(master.device)
                if torch.is_tensor(example) and example.dim() == 1
                else placed_scalar(example, self.optimizer.param_groups[number], master.device)
                for name, example in parts[0].items()
            }
            master.data.copy_(state.pop("master"))
            if state:
                self.optimizer.state[master] = state

    def step(self, closure: Any = None) -> Any:
        """As DeepSpeed's step; units in `rate_factors` take a smaller one."""
        try:
            return super().step(closure)
        finally:
            # A parameter that the next step does not use would take this gradient a second time.
            if self.grad_partitions_flat_buffer is not None:
                self.grad_partitions_flat_buffer.zero_()
            if self.offload_optimizer:
                for master in self.fp32_partitioned_groups_flat:
                    master.grad.zero_()

    def forget_gradients(self) -> None:
        """As of the other stages; see :meth:`step`."""
        super().forget_gradients()
        if self.grad_partitions_flat_buffer is not None:
            self.grad_partitions_flat_buffer.zero_()

    def _forget_offloaded(self) -> None:
        super()._forget_offloaded()
        self._gather_small()  # DeepSpeed returns early, before it does

    def let_go(self) -> None:
        """Release weights that passes have gathered, except small persistent ones: the state after a step."""
        self.parameter_offload.release_backward_leftovers()
        self._partition_all_parameters()
        self._gather_small()

    def _gather_small(self) -> None:
        # DeepSpeed assumes that persistent parameters stay gathered once they have been.
        if self.persistent_parameters:
            self.persistent_parameters[0].all_gather(self.persistent_parameters)

    # ---- parts of DeepSpeed's constructor through which a rebuild keeps what stays ---------------------------------

    def initialize_ds_offload(self, **settings: Any) -> Any:
        """The object that gathers weights; the module hooks that it has made stay."""
        if self._gathering is None:
            self._gathering = super().initialize_ds_offload(**settings)
        return self._gathering

    def _create_fp32_partitions(self) -> None:
        """DeepSpeed's without NVMe, one unit at a time: it would copy what is kept too."""
        self.subgroup_to_device = {i: "cpu" for i in range(len(self.fp16_partitioned_groups_flat))}
        for i, flat in enumerate(self.fp16_partitioned_groups_flat):
            number = self.sub_group_to_group_id[i]
            if number in self._kept:
                master = self._kept[number][self._sub_groups(number).index(i)]
            elif flat.dtype == self.master_weights_and_grads_dtype and not self.offload_optimizer:
                master = flat
            else:
                master = flat.to(self.device, self.master_weights_and_grads_dtype, copy=True).detach()
            master.requires_grad = True  # as some optimizers want it
            self.fp32_partitioned_groups_flat.append(master)
        for group in self.optimizer.param_groups:
            group["params"] = []

    # ---- buckets ---------------------------------------------------------------------------------------------------

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: nn.Parameter) -> None:
        """Put a ready gradient into the bucket of its kind."""
        with self._bucket_of(param):
            super().reduce_independent_p_g_buckets_and_remove_grads(param)

    def independent_gradient_partition_epilogue(self) -> None:
        """At the end of a backward pass: reduce what is left in both buckets."""
        with self._expert_bucket():
            for dtype in sort_dtypes(self.ipg_buckets):
                getattr(self, f"{_PRIVATE}reduce_and_partition_ipg_grads")(dtype)
        super().independent_gradient_partition_epilogue()

    def _pre_step(self) -> None:
        super()._pre_step()
        for bucket in self._expert_buckets.values():
            bucket.clear_params()

    # ---- gradient norm ---------------------------------------------------------------------------------------------

    def _get_norm_groups(self) -> list[Tensor]:
        return [self.scaled_global_norm()]
