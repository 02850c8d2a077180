"""DeepSpeed's ZeRO-1/2 optimizer whose partition units can leave (frozen) and enter (born, thawed) in mid-run.

Everything here relies on private parts of DeepSpeed; mocte_ds/zero/conformance.py names the versions it was checked on.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor, nn

from mocte_ds.dist.collectives import gather_rows
from mocte_ds.dist.mesh import Axis
from mocte_ds.watch import phase
from mocte_ds.zero.unit_optimizer import UnitOptimizer, UnitState, placed_scalar


class UnitZeroOptimizer(UnitOptimizer, DeepSpeedZeroOptimizer):
    """ZeRO-1/2 over units: what is frozen costs no communication.

    A rebuild keeps the masters, moments and flat buffers of what stays, so it communicates nothing and copies at most
    one unit at a time.
    """

    def __init__(self, init_optimizer: torch.optim.Optimizer, param_names: dict, **settings: Any) -> None:
        """As DeepSpeed's."""
        self._begin({"param_names": param_names, **settings})
        self._kept_flats: dict[int, Tensor] = {}
        self._expert_large: dict[torch.dtype, nn.Parameter] = {}
        self._linked: set[int] = set()
        """Numbers of the groups whose moments are linked to their parameters."""
        self._build(init_optimizer)

    def _build(self, optimizer: torch.optim.Optimizer) -> None:
        self._expert_large = {}
        self._construct(optimizer.param_groups, optimizer)
        self._kept_flats = {}

    def _take_apart(self, stays: dict[int, int]) -> None:
        self._kept_flats = {number: self.bit16_groups_flat[old] for number, old in stays.items()}
        leave = set(range(len(self.bit16_groups))) - set(stays.values())
        left = [parameter for number in sorted(leave) for parameter in self.bit16_groups[number]]
        self.destroy()
        for parameter in left:
            # deepspeed.utils.safe_get_full_* would give zeros for what no partition has; without it they give None.
            del parameter._hp_mapping

    def regroup(self, groups: Sequence[dict[str, Any]], born: UnitState | None = None) -> list[int]:
        """As of :class:`UnitOptimizer`."""
        sources = super().regroup(groups, born)
        self._lazy_init_hp_params_optimizer_state()
        return sources

    def _link_all_hp_params(self) -> None:
        super()._link_all_hp_params()
        self._linked = set()

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        """Let deepspeed.utils.safe_get_full_optimizer_state find the moments, group by group as they are made.

        DeepSpeed links all groups once, after the first one's step; moments that start anew are made by each
        group's own first step.
        """
        for number, master in enumerate(self.single_partition_of_fp32_groups):
            if number not in self._linked and self.optimizer.state.get(master):
                lazy_init_hp_params_optimizer_state(self.bit16_groups[number], master, self.optimizer.state)
                self._linked.add(number)

    def _masters_of(self, number: int) -> list[Tensor]:
        return [self.single_partition_of_fp32_groups[number]]

    def _gradients_of(self, number: int) -> list[Tensor]:
        if self.cpu_offload:
            return [self.single_partition_of_fp32_groups[number].grad]
        return [g for g in self.averaged_gradients[number] or [] if not getattr(g, "_zero_padding", False)]

    def unit_state(self, unit: str) -> UnitState:
        """Unpartitioned fp32 master weights and optimizer state of a unit (collective over the ranks that share it)."""
        state: UnitState = {}
        for number, group in enumerate(self.optimizer.param_groups):
            if group["unit"] != unit:
                continue
            master = self.single_partition_of_fp32_groups[number]
            parts = {"master": master, **self.optimizer.state.get(master, {})}
            for name, part in parts.items():
                whole = part
                if torch.is_tensor(part) and part.shape == master.shape:
                    whole = gather_rows(part.detach().clone(), Axis.of(self.real_dp_process_group[number]))
                for parameter, offset in zip(
                    self.round_robin_bit16_groups[number], self.round_robin_bit16_offsets[number], strict=True
                ):
                    value = whole
                    if torch.is_tensor(part) and part.shape == master.shape:
                        value = whole.narrow(0, offset, parameter.numel()).view(parameter.shape)
                    state.setdefault(parameter, {})[name] = value
        return state

    @torch.no_grad()
    def _fill(self, number: int, born: UnitState) -> None:
        master = self.single_partition_of_fp32_groups[number]
        parameters = self.round_robin_bit16_groups[number]
        if not all(parameter in born for parameter in parameters):
            return
        size = master.numel() * self.partition_count[number]
        start = dist.get_rank(group=self.real_dp_process_group[number]) * master.numel()
        state = {}
        for name, example in born[parameters[0]].items():
            if not torch.is_tensor(example) or example.shape != parameters[0].shape:
                state[name] = placed_scalar(example, self.optimizer.param_groups[number], master.device)
                continue
            whole = torch.zeros(size, dtype=torch.float32, device=master.device)
            for parameter, offset in zip(parameters, self.round_robin_bit16_offsets[number], strict=True):
                whole.narrow(0, offset, parameter.numel()).copy_(born[parameter][name].reshape(-1))
            state[name] = whole.narrow(0, start, master.numel()).clone()
        for parameter in parameters:
            del born[parameter]
        master.data.copy_(state.pop("master"))
        if state:
            self.optimizer.state[master] = state

    # ---- hooks of DeepSpeed's constructor through which a rebuild keeps what stays ---------------------------------

    def flatten_dense_tensors_aligned(self, tensor_list: list, alignment: int, *args: Any, **kwargs: Any) -> Tensor:
        """The flat model weights of a group; those of a group that stays are used again."""
        number = len(self.bit16_groups_flat)
        if number in self._kept_flats and self._constructing:
            return self._kept_flats[number]
        return super().flatten_dense_tensors_aligned(tensor_list, alignment, *args, **kwargs)

    def get_partition_info(self, *args: Any, **kwargs: Any) -> tuple:
        """Called once per group, right after its master weights were made: puts the kept ones in their place."""
        number = len(self.single_partition_of_fp32_groups) - 1
        if number in self._kept:
            (master,) = self._kept[number]
            self.single_partition_of_fp32_groups[number] = master
            self.optimizer.param_groups[number]["params"] = [master]
        return super().get_partition_info(*args, **kwargs)

    def initialize_optimizer_states(self) -> None:
        """DeepSpeed allocates the gradients of all groups at once here; only CPU offload goes on to use them."""
        for master in self.single_partition_of_fp32_groups if self.cpu_offload else ():
            if master.grad is not None:
                master.grad.zero_()
                continue
            gradient = torch.zeros_like(master, requires_grad=False)
            master.grad = get_accelerator().pin_memory(gradient) if self.cpu_offload_pin_memory else gradient

    @property
    def _constructing(self) -> bool:
        return not self._expert_buckets

    def _configure_moe_settings(self) -> None:
        """DeepSpeed insists on an expert group; a rank may have none left, or none yet."""
        if any(self.is_moe_group(group) for group in self.optimizer.param_groups):
            super()._configure_moe_settings()
        else:
            self.is_moe_param_group = [False] * len(self.optimizer.param_groups)

    # ---- buckets ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _expert_bucket(self) -> Iterator[None]:
        # A gradient larger than a bucket stands beside it.
        large, self.extra_large_param_to_reduce = self.extra_large_param_to_reduce, self._expert_large
        try:
            with super()._expert_bucket():
                yield
        finally:
            self.extra_large_param_to_reduce = large

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: nn.Parameter, i: int) -> None:
        """Put a ready gradient into the bucket of its kind."""
        with self._bucket_of(param):
            super().reduce_independent_p_g_buckets_and_remove_grads(param, i)

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce the bucket that is full, or at the end of the backward pass both."""
        with phase("reduction of gradients", waits=True):
            super().reduce_ipg_grads(comm_dtype)
            if comm_dtype is None and not self._in_expert_bucket and self._has_experts:
                with self._expert_bucket():
                    super().reduce_ipg_grads(None)

    def forget_gradients(self) -> None:
        """As of stage 3; the next backward pass is the first one of its step."""
        super().forget_gradients()
        # As DeepSpeed's step leaves them; micro-batches before the last one of a step are summed in the first.
        self.all_grad_tensors = dict.fromkeys(self.all_grad_tensors)
        self.micro_step_id = -1
        if self.cpu_offload:
            self._offload_accumulated_param_ids: set[int] = set()

    def setup_buckets(self) -> None:
        """Allocate the buffers; those of the experts where one trains."""
        if not self.ready_for_gradients and self._has_experts:
            micro_step = self.micro_step_id
            with self._expert_bucket():
                super().setup_buckets()
            self.ready_for_gradients, self.micro_step_id = False, micro_step
        super().setup_buckets()

    def _release_ipg_buffers(self) -> None:
        with self._expert_bucket():
            super()._release_ipg_buffers()
        super()._release_ipg_buffers()
