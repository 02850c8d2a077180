"""What is the same in the optimizers of all ZeRO stages: units that leave and enter, their rates, norm and buckets."""

import contextlib
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.pg_utils import is_parallel
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from torch import Tensor, nn

from mocte_ds.watch import phase
from mocte_ds.zero.agreement import agreed_total, take_first

UnitState = dict[nn.Parameter, dict[str, Tensor]]
"""fp32 `master` and optimizer state (`exp_avg`, ...; scalars such as `step` too) of each parameter, unpartitioned."""

# A rebuild must neither start the search for fp16's loss scale anew nor forget who waits for a backward pass.
_KEPT = ("loss_scaler", "dynamic_loss_scale", "custom_loss_scaler", "external_loss_scale", "_grad_acc_post_hooks")


class UnitOptimizer(ZeROOptimizer):
    """ZeRO over units: what leaves costs no optimizer memory and no gradient, and nothing else changes its state.

    A stage's class derives from this one first and from DeepSpeed's second. Differences from DeepSpeed's, and why:
      - `regroup` rebuilds the partition around the units that stay; their master weights and moments are the same
        before and after.
      - The gradient norm is one all-reduce of the sum of squares over distinct parameters. DeepSpeed's takes one
        all-reduce per group, which deadlocks when ranks hold different numbers of groups.
      - Gradients of experts fill a bucket of their own. In a shared bucket, ranks that froze different experts flush
        at different moments, one inside a dense all-reduce while another waits in an all-to-all.
    """

    optimizer: torch.optim.Optimizer
    ipg_buckets: dict[torch.dtype, Any]
    averaged_gradients: dict[int, list[Tensor] | None]
    dp_process_group: Any
    device: Any
    dtype: torch.dtype
    overflow: bool
    reduce_bucket_size: int
    model_parallel_group: Any
    model_parallel_rank: int

    def _begin(self, settings: dict[str, Any]) -> None:
        """Start without a partition; the settings are kept, because `regroup` builds again with them."""
        self._settings = settings
        self._kept: dict[int, list[Tensor]] = {}
        """Master weights that a group keeps, by the number of the group that is built."""
        self._expert_buckets: dict[torch.dtype, Any] = {}
        self._in_expert_bucket = False
        self._unit_squares: tuple[list[str], Tensor] | None = None
        self.spoiled: Tensor | float = 0.0
        """NaN where a loss of this rank in the step is not finite, else 0; in the norm, so that all ranks skip it."""
        self._gradient_scale = 1.0
        """fp16's loss scale in the gradients of this step, which the step itself may change."""
        self.rate_factors: dict[str, float] = {}
        """Factor of a unit's learning rate; 1 for units that are not named."""
        self.step_rates: dict[str, float] = {}
        """Learning rate of each unit in the last step."""

    def _construct(self, groups: Sequence[dict[str, Any]], *arguments: Any) -> None:
        """Run DeepSpeed's constructor, at first and at every rebuild."""
        self._expert_buckets = {}
        kept = {name: getattr(self, name) for name in _KEPT if hasattr(self, name)}
        size = min(self._settings["reduce_bucket_size"], _most_gradients(groups))
        super().__init__(*arguments, **{**self._settings, "reduce_bucket_size": size})
        for name, value in kept.items():
            setattr(self, name, value)
        self._expert_buckets = {dtype: type(bucket)() for dtype, bucket in self.ipg_buckets.items()}

    # ---- what each stage's class implements ------------------------------------------------------------------------

    @abstractmethod
    def _build(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the partition of the optimizer's groups, with the masters in `_kept`."""

    @abstractmethod
    def _take_apart(self, stays: dict[int, int]) -> None:
        """Free the partition except for what stays (numbers of new groups to numbers of old ones)."""

    @abstractmethod
    def _masters_of(self, number: int) -> list[Tensor]:
        """This rank's fp32 master weights of a group."""

    @abstractmethod
    def _gradients_of(self, number: int) -> list[Tensor]:
        """This rank's partition of the gradients of a group, before the optimizer's step."""

    @abstractmethod
    def _fill(self, number: int, born: UnitState) -> None:
        """Give a group that enters its starting master weights and moments."""

    @abstractmethod
    def unit_state(self, unit: str) -> UnitState:
        """Unpartitioned fp32 master weights and optimizer state of a unit (collective over the ranks that share it)."""

    def own_part(self, state: UnitState) -> UnitState:
        """What `regroup` needs to have of the starting values of parameters: all of them, or less."""
        return state

    # ---- units leave and enter -------------------------------------------------------------------------------------

    def changed_by(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether this rank has to call :meth:`regroup` for these groups; others may have to."""
        return [_key(group) for group in groups] != [_key(group) for group in self.optimizer.param_groups]

    def regroup(self, groups: Sequence[dict[str, Any]], born: UnitState | None = None) -> list[int]:
        """Make ``groups`` the parameter groups; groups that were there before keep every byte of their state.

        Must be called between two optimizer steps, with no gradient pending.

        Args:
            groups: parameter groups with "params" (model parameters), "unit" and "options" (see UnitRegistry).
            born: starting values (see :meth:`own_part`) for parameters of groups that enter; without them the master
                weights are the model's and the moments start anew. Emptied.

        Returns:
            For each new group the index of the old group whose learning rate it follows.
        """
        optimizer = self.optimizer
        old_groups = list(optimizer.param_groups)
        old_index = {_key(group): i for i, group in enumerate(old_groups)}
        stays = {n: old_index[_key(group)] for n, group in enumerate(groups) if _key(group) in old_index}
        sources = [stays[n] if n in stays else _source(group, old_groups) for n, group in enumerate(groups)]
        self._kept = {n: self._masters_of(i) for n, i in stays.items()}
        states = {n: [optimizer.state.get(master) for master in masters] for n, masters in self._kept.items()}
        self._take_apart(stays)
        optimizer.state = defaultdict(dict)
        optimizer.param_groups[:] = [
            {**_without_parameters(old_groups[sources[n]]), "params": group["params"]}
            if n in stays
            else _following(group, old_groups[sources[n]])
            for n, group in enumerate(groups)
        ]
        self._build(optimizer)
        for number, kept in states.items():
            for master, state in zip(self._masters_of(number), kept, strict=True):
                if state is not None:
                    optimizer.state[master] = state
        for number in range(len(groups)):
            if number not in stays and born:
                self._fill(number, born)
        self._kept = {}
        return sources

    # ---- rates -----------------------------------------------------------------------------------------------------

    def step(self, closure: Any = None) -> Any:
        """As DeepSpeed's step; units in `rate_factors` and groups with a `rate` take that part of it."""
        factors = [
            self.rate_factors.get(group["unit"], 1.0) * group.get("rate", 1.0) for group in self.optimizer.param_groups
        ]
        slowed = [
            (group, factor) for group, factor in zip(self.optimizer.param_groups, factors, strict=True) if factor != 1.0
        ]
        rates, before = [group["lr"] for group, _ in slowed], (self.step_rates, self._unit_squares)
        for group, factor in slowed:
            group["lr"] *= factor
        self.step_rates = {group["unit"]: group["lr"] for group in self.optimizer.param_groups}
        self._gradient_scale = float(self.loss_scale)
        try:
            result = super().step(closure)
        finally:
            # The scheduler may compute the next rate from this one.
            for (group, _), rate in zip(slowed, rates, strict=True):
                group["lr"] = rate
        if self.overflow:
            self.step_rates, self._unit_squares = before
            self._forget_offloaded()
        return result

    def forget_gradients(self) -> None:
        """Drop what the backward passes of a step that will not be finished have left for it."""
        self.spoiled = 0.0
        self.zero_grad(set_to_none=True)
        self.reset_cpu_buffers()  # and whether gradients that go to CPU memory were finite
        for number in self.averaged_gradients:
            self.averaged_gradients[number] = None
        self._forget_offloaded()

    def _forget_offloaded(self) -> None:
        """After a step that was skipped: with CPU offload DeepSpeed keeps its gradients for what the next one lacks."""
        for number in range(len(self.optimizer.param_groups)):
            for master in self._masters_of(number):
                if master.grad is not None:
                    master.grad.zero_()

    # ---- inspection ------------------------------------------------------------------------------------------------

    def masters(self) -> dict[str, list[Tensor]]:
        """This rank's partitions of the fp32 master weights, by unit."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for number, group in enumerate(self.optimizer.param_groups):
            found[group["unit"]] += [master.detach() for master in self._masters_of(number)]
        return found

    def uncut(self) -> dict[str, list[Tensor]]:
        """Of :meth:`masters` those that every rank of a tensor group has, at the same place of its partition."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for number, group in enumerate(self.optimizer.param_groups):
            if not group.get("moe") and not group.get("cut"):
                found[group["unit"]] += [master.detach() for master in self._masters_of(number)]
        return found

    def optimizer_bytes(self) -> int:
        """Bytes of fp32 master weights and optimizer state on this rank."""
        tensors = [master for masters in self.masters().values() for master in masters]
        for values in self.optimizer.state.values():
            tensors.extend(value for value in values.values() if torch.is_tensor(value))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def held_gradients(self) -> list[Tensor]:
        """Gradients of this rank's partition, with its padding; there between the backward pass and the step only."""
        return [gradient for group in self.averaged_gradients.values() for gradient in group or []]

    @property
    def unit_square_norms(self) -> dict[str, float]:
        """Sum of squares of each unit's gradient at the last step, this rank's partition only, without a loss scale."""
        found: dict[str, float] = defaultdict(float)
        if self._unit_squares is not None:
            units, squares = self._unit_squares
            for unit, value in zip(units, squares.tolist(), strict=True):
                found[unit] += value
        return found

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """L2 norm over all distinct trainable parameters, equal on all ranks and for every ep_size.

        A parameter's gradient is partitioned over the ranks that share it and nobody else has it, so the sum of squares
        over all ranks counts each element once.
        """
        if norm_type != 2:
            raise ValueError(f"only the L2 norm is supported, not {norm_type}")
        device = torch.device(get_accelerator().current_device_name())
        groups = self.optimizer.param_groups
        squares = torch.zeros(len(groups), dtype=torch.float32, device=device)
        for number in range(len(groups)):
            for gradient in self._gradients_of(number):
                squares[number] += gradient.detach().float().square().sum().to(device)
        self._unit_squares = ([group["unit"] for group in groups], squares / self._gradient_scale**2)
        with phase("reduction of the gradient norm", waits=True):
            if is_parallel(self.model_parallel_group):  # a caller's mpu may have groups of one rank
                total = self._agreed_total(squares)
            else:
                total = squares.sum() + self.spoiled
                dist.all_reduce(total, group=self.dp_process_group)
            norm = total.sqrt()
        mask_nan_or_inf_with_val_inplace(norm, device=device)
        # It scales the gradients, which CPU offload has elsewhere.
        return norm.to(self.device)

    def _agreed_total(self, squares: Tensor) -> Tensor:
        """Sum of squares over all ranks where matrices are cut; see :func:`agreed_total`, :func:`take_first`."""
        groups, tensor = self.optimizer.param_groups, self.model_parallel_group
        whole = [None if group.get("moe") or group.get("cut") else group["unit"] for group in groups]
        rounding = torch.finfo(self.dtype).eps
        data, rank = self.dp_process_group, self.model_parallel_rank
        total = agreed_total(squares, whole, rounding, data, tensor, rank, self.spoiled)
        numbers = [number for number, unit in enumerate(whole) if unit is not None]
        take_first([gradient for number in numbers for gradient in self._gradients_of(number)], tensor)
        return total

    # ---- buckets ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _expert_bucket(self) -> Iterator[None]:
        """Context manager: DeepSpeed's methods fill, reduce and free the bucket of the experts."""
        dense, self.ipg_buckets, self._in_expert_bucket = self.ipg_buckets, self._expert_buckets, True
        try:
            yield
        finally:
            self.ipg_buckets, self._in_expert_bucket = dense, False

    @property
    def _has_experts(self) -> bool:
        """Whether an expert of this rank trains, so that there are gradients for their bucket."""
        return any(group.get("moe") for group in self.optimizer.param_groups)

    def _bucket_of(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager:
        """The bucket of a gradient's kind."""
        return self._expert_bucket() if is_moe_param(parameter) else contextlib.nullcontext()


def placed_scalar(value: Any, group: dict[str, Any], device: torch.device) -> Any:
    """A copy of a part of the state that is no moment, such as AdamW's step, where the optimizer wants it.

    Args:
        value: it may come from a checkpoint, and so from a CPU.
        group: a fused optimizer, or one for CUDA graphs, reads it where the weights are; others on any device.
        device: of the master weights.
    """
    if not torch.is_tensor(value):
        return value
    return value.to(device, copy=True) if group.get("fused") or group.get("capturable") else value.clone()


def _key(group: dict[str, Any]) -> tuple[str, int]:
    return group["unit"], group["options"]


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _following(group: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """A group that enters, with its own options, at another group's point of the schedule."""
    new = {**_without_parameters(old), **group}
    if group["options"] == old["options"]:
        new["lr"] = old["lr"]
    elif "lr" in group and old.get("initial_lr"):
        new["lr"], new["initial_lr"] = group["lr"] * old["lr"] / old["initial_lr"], group["lr"]
    return new


def _source(group: dict[str, Any], old_groups: list[dict[str, Any]]) -> int:
    """Old group whose learning rate an entering one follows: one with its options, one like it, or the first."""
    for wanted in (group["options"], group.get("like")):
        for number, old in enumerate(old_groups):
            if old["options"] == wanted:
                return number
    return 0


def _most_gradients(groups: Sequence[dict[str, Any]]) -> int:
    """Elements of all dense gradients or of all expert gradients, whichever are more.

    A bucket larger than that only wastes its buffer, and there are two of them.
    """
    totals = [0, 0]
    for group in groups:
        for parameter in group["params"]:
            totals[is_moe_param(parameter)] += getattr(parameter, "ds_numel", parameter.numel())
    return max(totals)
