"""DeepSpeed's ZeRO-1/2 optimizer whose partition units can leave (frozen) and enter (born, thawed) in mid-run.

Everything here relies on private parts of DeepSpeed; mocte_ds/zero/conformance.py names the versions it was checked on.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, IPGBucket
from torch import Tensor, nn

UnitState = dict[nn.Parameter, dict[str, Tensor]]
"""fp32 `master` and optimizer state (`exp_avg`, ...; scalars such as `step` too) of each parameter, unpartitioned."""


_SCALING = ("loss_scaler", "dynamic_loss_scale", "custom_loss_scaler", "external_loss_scale")


class UnitZeroOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO over units: what leaves costs no memory, no gradient and no communication, and nothing else moves a byte.

    Differences from DeepSpeed's class, each for a reason:
      - `regroup` rebuilds the partition around the units that stay; their master weights, moments and flat buffers are
        the same tensors before and after, so it communicates nothing and copies at most one unit at a time.
      - The gradient norm is one all-reduce of the sum of squares over distinct parameters. DeepSpeed's takes one
        all-reduce a group, which deadlocks when ranks hold different numbers of groups, and averages expert norms.
      - Gradients of experts fill a bucket of their own. In a shared bucket, ranks that froze different experts flush
        at different moments, one inside a dense all-reduce while another waits in an all-to-all.
    """

    def __init__(self, init_optimizer: torch.optim.Optimizer, param_names: dict, **settings: Any) -> None:
        """As DeepSpeed's; the arguments are kept, because `regroup` builds again with them."""
        self._settings = {"param_names": param_names, **settings}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._expert_buckets: dict[torch.dtype, IPGBucket] = {}
        self._expert_large: dict[torch.dtype, nn.Parameter] = {}
        self._in_expert_bucket = False
        self._unit_squares: tuple[list[str], Tensor] | None = None
        self.rate_factors: dict[str, float] = {}
        """Part of the learning rate that a unit gets; 1 for units that are not named."""
        self.step_rates: dict[str, float] = {}
        """Learning rate of each unit in the last step."""
        self._build(init_optimizer)

    def _build(self, optimizer: torch.optim.Optimizer) -> None:
        self._expert_buckets, self._expert_large = {}, {}
        scaling = {name: getattr(self, name) for name in _SCALING if hasattr(self, name)}
        super().__init__(optimizer, **self._settings)
        # A rebuild must not start the search for fp16's loss scale anew.
        for name, value in scaling.items():
            setattr(self, name, value)
        self._expert_buckets = {dtype: IPGBucket() for dtype in self.ipg_buckets}
        # A bucket larger than all gradients only wastes its buffer, and there are two of them now.
        totals = [0, 0]
        for group in self.bit16_groups:
            for parameter in group:
                totals[is_moe_param(parameter)] += parameter.numel()
        self.reduce_bucket_size = min(self.reduce_bucket_size, max(totals))

    # ---- units leave and enter -------------------------------------------------------------------------------------

    def regroup(self, groups: Sequence[dict[str, Any]], born: UnitState | None = None) -> list[int]:
        """Make ``groups`` the parameter groups; groups that were there before keep every byte of their state.

        Must be called between two optimizer steps, with no gradient pending.

        Args:
            groups: parameter groups with "params" (model parameters), "unit" and "options" (see UnitRegistry).
            born: starting values for parameters of groups that enter; without them the master weights are the model's
                and the moments start anew.

        Returns:
            For each new group the index of the old group whose learning rate it follows.
        """
        optimizer = self.optimizer
        old_groups = list(optimizer.param_groups)
        old_index = {(g["unit"], g["options"]): i for i, g in enumerate(old_groups)}
        masters, flats = list(self.single_partition_of_fp32_groups), list(self.bit16_groups_flat)
        members, old_state = list(self.bit16_groups), dict(optimizer.state)
        self.destroy()

        new_groups, sources, self._kept = [], [], {}
        for number, group in enumerate(groups):
            stays = old_index.get((group["unit"], group["options"]))
            source = stays if stays is not None else _source(group, old_groups)
            sources.append(source)
            if stays is not None:
                new_groups.append({**old_groups[stays], "params": list(members[stays])})
                self._kept[number] = (masters[stays], flats[stays])
            else:
                follows = {key: old_groups[source][key] for key in old_groups[source] if key != "params"}
                new_groups.append({**follows, **group, "params": list(group["params"])})
        optimizer.param_groups[:] = new_groups
        optimizer.state = defaultdict(dict)
        self._build(optimizer)
        for number, (master, _) in self._kept.items():
            if master in old_state:
                optimizer.state[self.single_partition_of_fp32_groups[number]] = old_state[master]
        for number in range(len(groups)):
            if number not in self._kept and born:
                self._fill(number, born)
        self._kept = {}
        self._link_all_hp_params()
        self._hp_optimizer_states_linked = False
        return sources

    def step(self, closure: Any = None) -> Any:
        """DeepSpeed's step; units in `rate_factors` take a smaller one."""
        slowed = [group for group in self.optimizer.param_groups if group["unit"] in self.rate_factors]
        rates = [group["lr"] for group in slowed]
        for group in slowed:
            group["lr"] *= self.rate_factors[group["unit"]]
        self.step_rates = {group["unit"]: group["lr"] for group in self.optimizer.param_groups}
        try:
            return super().step(closure)
        finally:
            # The scheduler may compute the next rate from this one.
            for group, rate in zip(slowed, rates, strict=True):
                group["lr"] = rate

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
                    whole = self._all_gather(part.detach(), number)
                for parameter, offset in zip(
                    self.round_robin_bit16_groups[number], self.round_robin_bit16_offsets[number], strict=True
                ):
                    value = whole
                    if torch.is_tensor(part) and part.shape == master.shape:
                        value = whole.narrow(0, offset, parameter.numel()).view(parameter.shape)
                    state.setdefault(parameter, {})[name] = value
        return state

    def optimizer_bytes(self) -> int:
        """Bytes of fp32 master weights and optimizer state on this rank."""
        tensors = list(self.single_partition_of_fp32_groups)
        for values in self.optimizer.state.values():
            tensors.extend(value for value in values.values() if torch.is_tensor(value))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def held_gradients(self) -> list[Tensor]:
        """Gradients of this rank's partition, with its padding; there between the backward pass and the step only."""
        return [gradient for group in self.averaged_gradients.values() for gradient in group or []]

    @property
    def unit_square_norms(self) -> dict[str, float]:
        """Sum of squares of each unit's gradient at the last step, this rank's partition only."""
        found: dict[str, float] = defaultdict(float)
        if self._unit_squares is not None:
            units, squares = self._unit_squares
            for unit, value in zip(units, squares.tolist(), strict=True):
                found[unit] += value
        return found

    def masters(self) -> dict[str, list[Tensor]]:
        """This rank's partitions of the fp32 master weights, by unit."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for group, master in zip(self.optimizer.param_groups, self.single_partition_of_fp32_groups, strict=True):
            found[group["unit"]].append(master.detach())
        return found

    def _all_gather(self, part: Tensor, number: int) -> Tensor:
        group = self.real_dp_process_group[number]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group=group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @torch.no_grad()
    def _fill(self, number: int, born: UnitState) -> None:
        """Give an entering group its starting master weights and moments."""
        master = self.single_partition_of_fp32_groups[number]
        parameters = self.round_robin_bit16_groups[number]
        if not all(parameter in born for parameter in parameters):
            return
        size = master.numel() * self.partition_count[number]
        start = dist.get_rank(group=self.real_dp_process_group[number]) * master.numel()
        state = {}
        for name, example in born[parameters[0]].items():
            if not torch.is_tensor(example) or example.shape != parameters[0].shape:
                state[name] = example.clone() if torch.is_tensor(example) else example
                continue
            whole = torch.zeros(size, dtype=torch.float32, device=master.device)
            for parameter, offset in zip(parameters, self.round_robin_bit16_offsets[number], strict=True):
                whole.narrow(0, offset, parameter.numel()).copy_(born[parameter][name].reshape(-1))
            state[name] = whole.narrow(0, start, master.numel()).clone()
        master.data.copy_(state.pop("master"))
        if state:
            self.optimizer.state[master] = state

    # ---- hooks of DeepSpeed's constructor through which a rebuild keeps what stays ---------------------------------

    def flatten_dense_tensors_aligned(self, tensor_list: list, alignment: int, *args: Any, **kwargs: Any) -> Tensor:
        """The flat model weights of a group; those of a group that stays are used again."""
        number = len(self.bit16_groups_flat)
        if number in self._kept and self._constructing:
            return self._kept[number][1]
        return super().flatten_dense_tensors_aligned(tensor_list, alignment, *args, **kwargs)

    def get_partition_info(self, *args: Any, **kwargs: Any) -> tuple:
        """Called once a group, right after its master weights were made: puts the kept ones in their place."""
        number = len(self.single_partition_of_fp32_groups) - 1
        if number in self._kept:
            master = self._kept[number][0]
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
        dense, self.ipg_buckets, self._in_expert_bucket = self.ipg_buckets, self._expert_buckets, True
        # A gradient larger than a bucket stands beside it.
        large, self.extra_large_param_to_reduce = self.extra_large_param_to_reduce, self._expert_large
        try:
            yield
        finally:
            self.ipg_buckets, self._in_expert_bucket = dense, False
            self.extra_large_param_to_reduce = large

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: nn.Parameter, i: int) -> None:
        """Put a ready gradient into the bucket of its kind."""
        with self._expert_bucket() if is_moe_param(param) else contextlib.nullcontext():
            super().reduce_independent_p_g_buckets_and_remove_grads(param, i)

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce the bucket that is full, or at the end of the backward pass both."""
        super().reduce_ipg_grads(comm_dtype)
        if comm_dtype is None and not self._in_expert_bucket:
            with self._expert_bucket():
                super().reduce_ipg_grads(None)

    def setup_buckets(self) -> None:
        """Allocate the buffers of both kinds."""
        if not self.ready_for_gradients:
            micro_step = self.micro_step_id
            with self._expert_bucket():
                super().setup_buckets()
            self.ready_for_gradients, self.micro_step_id = False, micro_step
        super().setup_buckets()

    def _release_ipg_buffers(self) -> None:
        with self._expert_bucket():
            super()._release_ipg_buffers()
        super()._release_ipg_buffers()

    # ---- gradient norm ---------------------------------------------------------------------------------------------

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """L2 norm over all distinct trainable parameters, equal on all ranks and for every ep_size.

        A parameter's gradient is partitioned over the ranks that share it and nobody else has it, so the sum of squares
        over all ranks counts each element once.
        """
        if norm_type != 2:
            raise ValueError(f"only the L2 norm is supported, not {norm_type}")
        device = self.bit16_groups_flat[0].device
        squares = torch.zeros(len(self.bit16_groups), dtype=torch.float32, device=device)
        for number in range(len(self.bit16_groups)):
            if self.cpu_offload:
                gradients = [self.single_partition_of_fp32_groups[number].grad]
            else:
                gradients = self.averaged_gradients[number] or []
            for gradient in gradients:
                if not getattr(gradient, "_zero_padding", False):
                    squares[number] += gradient.detach().float().square().sum().to(device)
        self._unit_squares = ([group["unit"] for group in self.optimizer.param_groups], squares)
        total = squares.sum()
        dist.all_reduce(total, group=self.dp_process_group)
        norm = total.sqrt()
        mask_nan_or_inf_with_val_inplace(norm, device=device)
        # It scales the gradients, which CPU offload has elsewhere.
        return norm.to(self.device)


def _source(group: dict[str, Any], old_groups: list[dict[str, Any]]) -> int:
    """Old group whose learning rate an entering group follows: one with the same options, else the first."""
    for number, old in enumerate(old_groups):
        if old["options"] == group["options"]:
            return number
    return 0
