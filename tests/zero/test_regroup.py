"""A change of the partition: no communication, little memory, the same objects before and after."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mocte_ds.errors import ConfigError
from mocte_ds.zero.unit_optimizer import _source, placed_scalar
from tests.spawn import spawn
from tests.zero.small_run import Case, Net, act, config, global_step

COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter", "barrier")
COLLECTIVES += ("reduce_scatter_tensor", "all_to_all_single", "all_gather_object", "send", "recv")


class Allocations(TorchDispatchMode):
    """Bytes of storages that operations make: those alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return output

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]


def watch(case: Case) -> dict[str, Any]:
    """Freeze three experts one after another; what each rebuild of the partition sent, allocated and left in place."""
    import mocte_ds

    engine, optimizer, *_ = mocte_ds.initialize(model=Net(), config=config(case))
    for step in range(6):
        act(engine, step)
        global_step(engine, step, torch.bfloat16 if case.bf16 else torch.float32)
    calls: list[str] = []
    peaks, kept = [], []

    def counting(name: str, function: Callable) -> Callable:
        return lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]

    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    regroup = optimizer.regroup

    def watched(*args: Any) -> Any:
        before = {key: tensor.data_ptr() for key, tensor in places(engine).items()}
        values = {key: tensor.clone() for key, tensor in places(engine).items()}
        for name, function in originals.items():
            setattr(dist, name, counting(name, function))
        try:
            with Allocations() as allocations:
                result = regroup(*args)
        finally:
            for name, function in originals.items():
                setattr(dist, name, function)
        after = places(engine)
        kept.append(all(tensor.data_ptr() == before[key] for key, tensor in after.items()))
        kept.append(all(torch.equal(tensor, values[key]) for key, tensor in after.items()))
        peaks.append(allocations.peak)
        return result

    optimizer.regroup = watched
    # A partition of the largest unit, as model weights and as masters.
    size = 6 if case.bf16 else 4
    largest = max(size * sum(part.numel() for part in parts) for parts in optimizer.masters().values())
    if case.offload:  # buffers that take the place of equal ones
        buffers = [*optimizer.param_buffer_of_bit16_for_cpu_offload_groups]
        buffers += [optimizer.temp_grad_buffer_for_cpu_offload, optimizer.temp_grad_buffer_for_gpu_offload]
        largest += sum(buffer.nbytes for buffer in buffers)
    scaler = optimizer.loss_scaler
    optimizer.override_loss_scale(8.0)
    for k in range(3):
        engine.mocte.freeze(0, k)
    objects = [engine.optimizer is optimizer, engine.basic_optimizer is optimizer.optimizer]
    objects += [optimizer.loss_scaler is scaler, optimizer.loss_scale == 8.0]
    return {"calls": calls, "peaks": peaks, "kept": kept, "largest": largest, "objects": objects}


def places(engine: Any) -> dict[tuple, torch.Tensor]:
    """Master weights, moments and flat model weights, by unit."""
    zero, found = engine.optimizer, {}
    for number, group in enumerate(zero.optimizer.param_groups):
        key, master = (group["unit"], group["options"]), zero.single_partition_of_fp32_groups[number]
        state = {name: value for name, value in zero.optimizer.state[master].items() if torch.is_tensor(value)}
        tensors = {"master": master.detach(), "flat": zero.bit16_groups_flat[number], **state}
        found.update({(*key, name): tensor for name, tensor in tensors.items()})
    return found


@pytest.mark.parametrize(
    "case", [Case(2, 1, 2), Case(2, 2, 1, bf16=True), Case(2, 1, 1, offload=True, bf16=True)], ids=str
)
def test_a_rebuild_moves_nothing(case: Case) -> None:
    results = spawn(watch, 2, case, timeout=90, deepspeed=True)
    # With two ranks of experts each rank rebuilds for its own ones only.
    assert sum(len(result["peaks"]) for result in results) == (3 if case.ep == 2 else 6)
    for result in results:
        assert result["calls"] == []
        assert all(result["kept"]) and all(result["objects"])
        assert all(0 < peak <= result["largest"] for peak in result["peaks"])


def refuse(section: str, changes: dict[str, Any]) -> str:
    import mocte_ds

    settings = config(Case(1))
    settings[section].update(changes)
    with pytest.raises(ConfigError) as caught:
        mocte_ds.initialize(model=Net(), config=settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("zero_optimization", {"contiguous_gradients": False}, "zero_optimization.contiguous_gradients = false"),
        ("zero_optimization", {"reduce_scatter": False}, "zero_optimization.reduce_scatter = false"),
        ("zero_optimization", {"stage": 0}, "zero_optimization.stage = 0: use stage 1, 2 or 3"),
        ("optimizer", {"type": "Muon"}, "optimizer.type 'Muon'"),
    ],
)
def test_what_cannot_follow_is_refused_at_the_start(section: str, changes: dict[str, Any], told: str) -> None:
    (said,) = spawn(refuse, 1, section, changes, timeout=60, deepspeed=True)
    assert told in said


def test_a_router_that_enters_follows_the_rate_of_its_ffn() -> None:
    old = [{"options": 0}, {"options": 1}]
    assert _source({"options": 2, "like": 1}, old) == 1
    assert _source({"options": 1, "like": 0}, old) == 1 and _source({"options": 2, "like": 5}, old) == 0


@pytest.mark.parametrize("group", [{"fused": True}, {"capturable": True}, {"fused": None}, {}], ids=str)
def test_steps_from_a_checkpoint_go_where_the_optimizer_reads_them(group: dict[str, Any]) -> None:
    """ "meta" stands for a GPU: checkpoints are read to a CPU, where AdamW's fused kernel would not find its step."""
    step = torch.tensor(7.0)
    placed = placed_scalar(step, group, torch.device("meta"))
    assert placed.device.type == ("meta" if any(group.values()) else "cpu")
    assert placed is not step and placed_scalar(3, group, torch.device("meta")) == 3
