"""The ranks' mesh against arithmetic, and the source: nobody communicates without naming the ranks."""

import ast
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from mocte_ds.checkpoints.names import file_names
from mocte_ds.dist import collect, collectives
from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.zero.process_groups import make_mesh, make_tensor_groups, require_axes_of
from tests.spawn import spawn

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "mocte_ds").rglob("*.py"), *(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")]
LIBRARIES = ("torch.distributed", "deepspeed.comm")


def _axes_of_four(data_before_expert: bool) -> dict:
    mesh = make_mesh(2, data_before_expert)
    assert make_mesh(2, data_before_expert) == mesh, "DeepSpeed's groups are made once"
    pair = dist.new_group([0, 1])
    refusals = []

    def engine(gradients: object, tokens: object) -> SimpleNamespace:
        model = torch.nn.Sequential(torch.nn.Identity())
        model[0].ep_group = tokens
        return SimpleNamespace(seq_data_parallel_group=gradients, module=model)

    data, expert = mesh.data.group, mesh.expert.group
    if mesh.world.rank < 2:
        for call in (
            lambda: make_mesh(2, data_before_expert, SimpleNamespace(get_data_parallel_group=lambda: pair)),
            lambda: require_axes_of(engine(pair, expert), mesh),
            lambda: require_axes_of(engine(None, expert), mesh),
            lambda: require_axes_of(engine(data, data), mesh),
            lambda: make_mesh(2, not data_before_expert),
        ):
            with pytest.raises(MocteError) as caught:
                call()
            refusals.append((type(caught.value), str(caught.value)))
    require_axes_of(engine(data, expert), mesh)
    axes = {name: getattr(mesh, name) for name in ("world", "data", "expert", "expert_data", "tensor")}
    ranks = {name: axis.group and dist.get_process_group_ranks(axis.group) for name, axis in axes.items()}
    return {"ranks": ranks, "places": {name: (axis.rank, axis.size) for name, axis in axes.items()}, "no": refusals}


@pytest.mark.parametrize("data_before_expert", [False, True])
def test_axes_of_four_ranks(data_before_expert: bool) -> None:
    for rank, found in enumerate(spawn(_axes_of_four, 4, data_before_expert, deepspeed=True, timeout=90)):
        near, far = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        expert, replicas = (far, near) if data_before_expert else (near, far)
        expected = {"world": [0, 1, 2, 3], "data": [0, 1, 2, 3], "expert": expert, "expert_data": replicas}
        assert found["ranks"] == {**expected, "tensor": None}
        places = {name: (ranks.index(rank), len(ranks)) for name, ranks in expected.items()}
        assert found["places"] == {**places, "tensor": (0, 1)}
        if rank < 2:
            (kind, why), *others = found["no"]
            assert kind is ConfigError and "mpu has 2 data-parallel ranks of 4" in why
            told = (
                "DeepSpeed sends gradients over the ranks [0, 1], the mesh has [0, 1, 2, 3]",
                "DeepSpeed sends gradients over the ranks None",
                f"DeepSpeed sends tokens of 0 over the ranks [0, 1, 2, 3], the mesh has {expert}",
                "another engine in this process has made groups of",
            )
            assert len(others) == len(told) and all(
                text in other for text, (_, other) in zip(told, others, strict=True)
            )


def _tensor_axes(ep_size: int, data_before_expert: bool) -> dict:
    mesh = make_mesh(ep_size, data_before_expert, make_tensor_groups(2), 2)
    with pytest.raises(MocteError, match="the tensor group of this rank would be"):
        make_tensor_groups(4)
    with pytest.raises(ConfigError, match="autotp_size = 3 does not divide the 4 ranks"):
        make_tensor_groups(3)
    axes = {name: getattr(mesh, name) for name in ("world", "data", "expert", "expert_data", "tensor")}
    assert all(
        axis.rank == dist.get_rank(axis.group) and axis.size == dist.get_world_size(axis.group)
        for axis in axes.values()
    )
    return {name: dist.get_process_group_ranks(axis.group) for name, axis in axes.items()}


@pytest.mark.parametrize(("ep_size", "data_before_expert"), [(2, False), (2, True), (4, False)])
def test_tensor_axis_of_four_ranks(ep_size: int, data_before_expert: bool) -> None:
    """Neighbours have one batch, and the experts are spread over all ranks as without tensor parallelism."""
    for rank, found in enumerate(spawn(_tensor_axes, 4, ep_size, data_before_expert, deepspeed=True, timeout=90)):
        near, far = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        expert, replicas = (far, near) if data_before_expert else (near, far)
        if ep_size == 4:
            expert, replicas = [0, 1, 2, 3], [rank]
        others = {"expert": expert, "expert_data": replicas}
        assert found == {"world": [0, 1, 2, 3], "data": far, "tensor": near, **others}


@pytest.mark.parametrize("rank", [0, 3])
def test_names_are_those_that_deepspeed_gives(rank: int) -> None:
    names = file_names(rank)
    engine = SimpleNamespace(checkpoint_mp_rank=rank, zero_optimization_partition_weights=lambda: False)
    engine._get_zero_ckpt_prefix = lambda *a, **k: DeepSpeedEngine._get_zero_ckpt_prefix(engine, *a, **k)
    assert DeepSpeedEngine._get_ckpt_name(engine, "", "") == names.model
    engine.zero_optimization_partition_weights = lambda: True
    partitioned = DeepSpeedEngine._get_ckpt_name(engine, "", "", mp_placeholder=f"{rank:02d}", pp_placeholder="5")
    assert partitioned == names.partitioned_model.format(rank=5)
    expert = DeepSpeedEngine._get_expert_ckpt_name("", 4, 7, "", checkpoint_mp_rank=rank)
    assert expert == names.expert.format(layer=4, expert=7)
    for bf16 in (False, True):
        optimizer = DeepSpeedEngine._get_rank_zero_ckpt_name(engine, "", "", rank, 2, bf16)
        assert optimizer == names.optimizer.format(precision="bf16_" if bf16 else "", rank=2)


def _libraries_in(tree: ast.AST) -> dict[str, str]:
    """By the name that a file calls them: modules that communicate, and functions of theirs."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in LIBRARIES:
                    names[alias.asname or alias.name] = alias.name
                elif alias.name.split(".")[0] in ("torch", "deepspeed"):
                    short = alias.name.split(".")[0]
                    names.update({name: name for name in LIBRARIES if name.startswith(short)})
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in LIBRARIES or node.module in LIBRARIES:
                    names[alias.asname or alias.name] = whole
    return names


def without_a_group(tree: ast.AST) -> Iterator[str]:
    """Calls of a library for communication that leave the group out, or say that it is all ranks."""
    names = _libraries_in(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        module, _, function = called.rpartition(".")
        if module not in names and called not in names:
            continue
        function = function if module in names else names[called].rpartition(".")[2]
        meant = getattr(dist, function, None)  # DeepSpeed's have the same arguments, behind a wrapper
        parameters = list(inspect.signature(meant).parameters) if inspect.isfunction(meant) else []
        if "group" not in parameters or function == "destroy_process_group":
            continue  # it makes groups, asks whether there are any, or ends all of them
        group = next((word.value for word in node.keywords if word.arg == "group"), None)
        if group is None and len(node.args) > parameters.index("group"):
            group = node.args[parameters.index("group")]
        if group is None or isinstance(group, ast.Constant):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def fixed_parts(tree: ast.AST) -> Iterator[str]:
    """Strings of a file, but for its docstrings, that say which part of a model a file holds."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            if "mp_rank" in node.value:
                yield f"line {node.lineno}: {node.value}"


def test_every_collective_is_told_the_ranks() -> None:
    found = []
    for path in SOURCES:
        found += [f"{path.relative_to(ROOT)} {text}" for text in without_a_group(ast.parse(path.read_text("utf-8")))]
    assert not found, "\n".join(found)
    own = [*vars(collectives).values(), *vars(collect).values()]
    asked = [function for function in own if inspect.isfunction(function) and not function.__name__.startswith("_")]
    for function in asked:
        axis = inspect.signature(function).parameters["axis"]
        assert axis.default is inspect.Parameter.empty, f"{function.__name__} has ranks that nobody has named"
    assert len(asked) >= 9


def test_names_of_tensor_parallel_parts_come_from_one_place() -> None:
    found = {
        str(path.relative_to(ROOT)): list(fixed_parts(ast.parse(path.read_text("utf-8"))))
        for path in SOURCES
        if "mp_rank" in path.read_text("utf-8")
    }
    assert {name: len(texts) for name, texts in found.items() if texts} == {
        os.path.join("mocte_ds", "checkpoints", "names.py"): 1
    }


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("import torch\ntorch.distributed.barrier()", 1),
        ("import torch.distributed as d\nd.all_reduce(x)\nd.all_reduce(x, group=g)\nd.all_reduce(x, group=None)", 2),
        ("from torch import distributed\ndistributed.all_gather(a, b, g)\ndistributed.get_rank()", 1),
        ("from deepspeed import comm as dist\ndist.get_world_size()\ndist.is_initialized()\ndist.new_group([0])", 1),
        ("from torch.distributed import broadcast\nbroadcast(x, 0)\nbroadcast(x, 0, g)", 1),
        ("import deepspeed\ndeepspeed.comm.barrier()\nother.barrier()", 1),
    ],
)
def test_what_is_left_out_is_seen(text: str, faults: int) -> None:
    assert len(list(without_a_group(ast.parse(text)))) == faults


def test_a_fixed_part_is_seen() -> None:
    text = '"""Not mp_rank_00 here."""\nname = f"{rank}_mp_rank_00_optim_states.pt"\nother = "rank"'
    assert len(list(fixed_parts(ast.parse(text)))) == 1
