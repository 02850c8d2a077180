"""ZeRO stage 3: the small run against plain PyTorch, runs with checks against the same at stage 2, and its files."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mocte_ds.checkpoints.names import PARTITIONED_MODEL_FILE
from mocte_ds.dist.mesh import Axis, mesh_of_processes
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.zero import let_go
from mocte_ds.zero.partitioned_files import require_same_partition, weights_in_state_dicts
from tests.engine import runs
from tests.spawn import spawn
from tests.zero.against import MATRIX, check_bytes, check_optimizer, check_trajectory
from tests.zero.small_run import DECAY, HIDDEN, LEARNING_RATE, Case, Net, batch, config, global_step, weight

TRAJECTORIES = [
    Case(2, 1, 3, MATRIX - 84, overlap=True, schedule="deepspeed", persist=30, live=400, parts=200),
    Case(2, 2, 3, 500_000_000, offload=True, recompute="reentrant"),
    Case(4, 2, 3, 700, overlap=True, recompute="plain", schedule="torch", live=400),
    Case(4, 4, 3, 2000, persist=30, optimizer="torch-fused"),
]


@pytest.mark.parametrize("case", TRAJECTORIES, ids=str)
def test_trajectory_is_that_of_an_optimizer_without_the_frozen_units(case: Case) -> None:
    results = check_trajectory(case)
    if case.ep == case.world == 2:
        check_bytes(results)


def test_offloaded_optimizer_in_bf16_is_adamw_over_the_trainable_units() -> None:
    check_optimizer(Case(1, 1, 3, MATRIX - 84, offload=True, bf16=True, optimizer="cpu"))


def with_an_idle_layer() -> dict[str, torch.Tensor]:
    """The second FFN runs at even steps only; the weights after five steps."""
    import mocte_ds

    case = Case(1, 1, 3)
    torch.manual_seed(0)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {
        "train_micro_batch_size_per_gpu": len(batch(0, 0)[0]),
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": DECAY, "torch_adam": True}},
        "mocte": {"modules": "layers.*", "num_experts": 4, "ep_size": case.ep, "auto": False},
    }
    settings["mocte"]["router"] = {"kind": "token"}
    engine, *_ = mocte_ds.initialize(model=Sometimes(), config=settings)
    for step in range(5):
        features, target = batch(step, 0)
        engine.module.both = step % 2 == 0
        engine.backward(engine(features=features, target=target))
        engine.step()
    return {name: weight(p) for name, p in engine.module.named_parameters() if ".banks." not in name}


class Sometimes(Net):
    """Runs one or two of its layers."""

    both = True

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.inlet(features)
        for layer in self.layers if self.both else self.layers[:1]:
            x = x + layer(x)
        return (x - target).square().mean()


def test_a_layer_that_does_not_run_takes_no_old_gradient() -> None:
    (found,) = spawn(with_an_idle_layer, 1, timeout=60, deepspeed=True)
    torch.manual_seed(0)
    net = Sometimes()
    groups = [{"params": [p], "weight_decay": DECAY if p.dim() >= 2 else 0.0} for p in net.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    for step in range(5):
        net.both = step % 2 == 0
        optimizer.zero_grad(set_to_none=False)  # zero, not none: moments decay on
        net(*batch(step, 0)).backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        dense = name.replace("layers.0.", "layers.0.dense.").replace("layers.1.", "layers.1.dense.")
        torch.testing.assert_close(found[dense], parameter.detach(), rtol=0, atol=1e-6, msg=name)


FREEZING = {"policy": "random", "checks": 1, "after_checks": 2, "rows": 32, "iterations": 4}
ROUTERS = [
    {"kind": "token", "weight": "softmax", "learn": True},
    {"kind": "random", "weight": "softmax", "learn": True},
    {"kind": "online", "directions": 8},
    {"kind": "type", "weight": "softmax", "learn": True, "std": 0.02},
    *[{"kind": kind} for kind in ("prefix", "pair", "previous", "pair-hash")],  # 8 banks divide 48 units
]
# Every freeze is decided by what experts have learned since the last check, and prepared by a slower rate.
PROGRESS = {**FREEZING, "policy": "progress", "gamma": 1.0, "beta": 1.0, "anneal": 0.05}
# What two runs never have in common; and the pass for gradient conflict makes other products of matrices at stage 3.
CLOCKS = ("seconds", "bytes", "beside", "flops")


def settings(stage: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The engine's tiny run without clipping: the last digit of a norm depends on how gradients are shared out."""
    config = runs.config(**changes)
    config["gradient_clipping"] = 0.0
    config["zero_optimization"]["stage"] = stage
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 40
    return config


def same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Every number that two runs have said is the same."""
    for rank, result in enumerate(found):
        for key in ("losses", "modes", "load", "bytes"):
            assert result[key] == expected[rank][key], key
    assert timeless(found[0]["events"]) == timeless(expected[0]["events"])


def timeless(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return json.loads(json.dumps([{k: v for k, v in event.items() if k not in CLOCKS} for event in events]))


def test_a_run_with_checks_is_that_of_stage_2() -> None:
    changes = {"banks": ROUTERS, "freeze": FREEZING}
    found, expected = (
        spawn(runs.run, 2, settings(stage, changes), 0, 18, None, None, timeout=120, deepspeed=True) for stage in (3, 2)
    )
    assert {"emergence", "freeze"} <= {event["event"] for event in expected[0]["events"]}
    same_run(found, expected)


def test_lora_experts_and_the_front_as_at_stage_2() -> None:
    """But for rounding: stage 3 adds up the gradients of an input that dense FFN and experts share in another order."""
    policy = {"policy": "paper", "alpha": 2.0, "beta": 2.0, "prefix": {"layers": 1, "end": 0.4}}
    both = []
    for stage in (3, 2):
        config = settings(stage, {"expert": {"kind": "lora"}, "freeze": {**FREEZING, **policy}})
        config["bf16"]["enabled"] = False
        both.append(spawn(runs.run, 2, config, 0, 22, None, None, timeout=120, deepspeed=True))
    found, expected = both
    steps = [[(e["event"], e["step"], e.get("block"), e.get("expert")) for e in run[0]["events"]] for run in both]
    assert steps[0] == steps[1]
    assert {"emergence", "freeze", "prefix"} <= {step[0] for step in steps[0]}
    for rank in range(2):
        torch.testing.assert_close(found[rank]["losses"], expected[rank]["losses"], rtol=1e-4, atol=0)
        assert found[rank]["modes"] == expected[rank]["modes"]
        assert found[rank]["bytes"] == expected[rank]["bytes"]


def test_checkpoint_is_resumed_and_has_whole_weights(tmp_path: Path) -> None:
    """Step 24 has measured; what follows from it is decided after step 25, by another process."""
    changes = {"freeze": PROGRESS, "conflict_every": 2}
    folders = [str(tmp_path / str(stage)) for stage in (2, 3)]
    expected = spawn(runs.run, 2, settings(2, changes), 0, 30, None, folders[0], timeout=120, deepspeed=True)
    first = spawn(runs.run, 2, settings(3, changes), 0, 24, None, folders[1], timeout=120, deepspeed=True)
    second = spawn(runs.run, 2, settings(3, changes), 24, 30, folders[1], folders[1], timeout=120, deepspeed=True)
    assert any(event["event"] == "freeze" and event["step"] < 24 for event in expected[0]["events"])
    both = [{**b, "losses": a["losses"] + b["losses"]} for a, b in zip(first, second, strict=True)]
    both[0]["events"] = first[0]["events"] + second[0]["events"]
    same_run(both, expected)
    assert [result["random"] for result in second] == [result["random"] for result in expected]

    of2, of3 = (Path(folder) / "global_step30" for folder in folders)
    files = sorted(path.name for path in of2.glob("layer_*"))
    assert len(files) == 8
    for name in files:
        same_weights(read(of3 / name), read(of2 / name))
    dense = read(of3 / PARTITIONED_MODEL_FILE)["module"]
    same_weights(dense, read(of2 / "mp_rank_00_model_states.pt")["module"])

    for folder, stage, ranks, message in (
        (of3, 2, 2, "saved under ZeRO stage 3"),
        (of3, 3, 4, "saved by 2 ranks"),
        (of2, 3, 2, "saved under ZeRO stage 1 or 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            require_same_partition(folder, stage, replace(mesh_of_processes(), data=Axis(None, 0, ranks)))


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False)


def same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert value.numel() and torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"offload_param": {"device": "cpu"}}, "zero_optimization.offload_param = .* remove it"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, "offload_optimizer.device = 'nvme'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio = 0.5"),
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size = 2"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights = True"),
        ({"mics_shard_size": 2}, "mics_shard_size = 2"),
        ({"stage3_module_granularity_threshold": 10}, "stage3_module_granularity_threshold = 10"),
    ],
)
def test_what_does_not_work_is_refused_by_name(zero: dict[str, Any], message: str) -> None:
    import mocte_ds

    config = runs.config()
    config["zero_optimization"] = {"stage": 3, "offload_param": {"device": "none"}, **zero}
    with pytest.raises(ConfigError, match=message):
        mocte_ds.initialize(model=torch.nn.Linear(2, 2), config=config)


def test_a_partitioned_model_is_refused() -> None:
    import mocte_ds

    config, model = runs.config(), torch.nn.Linear(2, 2)
    config["zero_optimization"]["stage"] = 3
    model.weight.ds_id = 0  # as deepspeed.zero.Init leaves it
    with pytest.raises(ConfigError, match=r"inside deepspeed.zero.Init"):
        mocte_ds.initialize(model=model, config=config)


class Tied(Net):
    """Two layers share a matrix, and one takes part without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Linear(HIDDEN, HIDDEN)
        self.other.weight = self.inlet.weight
        self.matrix = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.linear(self.other(features), self.matrix.weight), target)


def tied_weights(folder: str, persist: int) -> dict[str, Any]:
    """Emerge and train on, once in one go and once after a resume; names of this rank's weights in a state_dict."""
    import mocte_ds

    losses = []
    for resumed in (False, True):
        torch.manual_seed(0)
        engine, *_ = mocte_ds.initialize(model=Tied(), config=config(Case(2, 2, 3, persist=persist)))
        if resumed:
            engine.load_checkpoint(folder)
        else:
            global_step(engine, 0)
            engine.save_checkpoint(folder)
        losses.append([global_step(engine, 1)])
        let_go(engine.module)  # as a check does
        losses[-1].append(global_step(engine, 2))
        engine.mocte.emerge(0)
        losses[-1] += [global_step(engine, step) for step in (3, 4)]
        engine.mocte.freeze(0, 1)
        losses[-1].append(global_step(engine, 5))
    with weights_in_state_dicts(engine.module):
        state = engine.module.state_dict()
    names = [name for name, weight in state.items() if name.endswith("weight") and weight.numel()]
    return {"losses": losses, "names": names}


@pytest.mark.parametrize("persist", [0, 100_000])
def test_tied_weights_through_emergence_and_a_resume(tmp_path: Path, persist: int) -> None:
    first, second = spawn(tied_weights, 2, str(tmp_path), persist, timeout=60, deepspeed=True)
    for result in (first, second):
        assert result["losses"][0] == result["losses"][1]
    assert {"inlet.weight", "other.weight", "matrix.weight", "layers.1.dense.up_proj.weight"} <= set(first["names"])
    if not persist:  # each rank is the first that holds its experts
        assert all(".experts." in name or ".gate." in name for name in second["names"])
        # Two experts of the block that has emerged, three matrices each.
        assert sum(".experts." in name for name in second["names"]) == 6


def what_a_freeze_leaves(bf16: bool) -> dict[str, list[bool]]:
    """Which memory is gone after the freezing of an expert, and which is still there."""
    import mocte_ds

    engine, *_ = mocte_ds.initialize(model=Net(), config=config(Case(1, 1, 3, bf16=bf16)))
    engine.mocte.emerge(0)
    global_step(engine, 0, torch.bfloat16 if bf16 else torch.float32)
    optimizer = engine.optimizer

    def watched(unit: str) -> list[StorageWeakRef]:
        tensors = []
        for group in [n for n, group in enumerate(optimizer.optimizer.param_groups) if group["unit"] == unit]:
            for master in optimizer._masters_of(group):
                tensors += [master, *optimizer.optimizer.state[master].values()]
        return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors if tensor.dim()]

    buffers = [optimizer.lp_param_buffer, optimizer.grad_partitions_flat_buffer]
    buffers += [
        bucket.buffer for buckets in (optimizer.ipg_buckets, optimizer._expert_buckets) for bucket in buckets.values()
    ]
    shared = [StorageWeakRef(tensor.untyped_storage()) for tensor in buffers]
    frozen, trunk = watched("layers.0.2"), watched("trunk")
    buffers.clear()
    engine.mocte.freeze(0, 2)
    gc.collect()
    names = {"buffers": shared, "frozen": frozen, "trunk": trunk}
    return {name: [reference.expired() for reference in references] for name, references in names.items()}


@pytest.mark.parametrize("bf16", [True, False])
def test_a_freeze_frees_what_leaves_and_the_buffers_of_all(bf16: bool) -> None:
    (gone,) = spawn(what_a_freeze_leaves, 1, bf16, timeout=60, deepspeed=True)
    assert len(gone["buffers"]) == 4 and all(gone["buffers"])
    assert len(gone["frozen"]) == 6 and all(gone["frozen"])
    # In fp32 the masters are the model's weights, in the buffer of all weights.
    masters = gone["trunk"][0::3]
    assert masters == [not bf16] * 2 and not any(gone["trunk"][1::3] + gone["trunk"][2::3])
