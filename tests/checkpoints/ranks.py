"""What two ranks do in the tests of saving: good, late and failing saves, loading of damaged ones, random states."""

import contextlib
import hashlib
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocte_ds.checkpoints import save
from mocte_ds.checkpoints.random_states import RANDOM_FILE, random_states, restore_random_states
from mocte_ds.dist.mesh import Axis, mesh_of_processes
from mocte_ds.errors import CheckpointError

TOO_LONG = "x" * 300  # a file name that no file system takes


def draw() -> list[float]:
    """Some numbers from each generator, the cached second normal number of numpy among them."""
    return [random.random(), random.gauss(0, 1), *np.random.standard_normal(3), *torch.rand(3).tolist()]


def save_and_fail(folder: str) -> dict[str, Any]:
    """Save well, with a rank that cannot write, with one that writes late, and without moving `latest`."""
    root, rank = Path(folder), torch.distributed.get_rank()
    latest, saver = root / "latest", save.Saver(mesh_of_processes().world)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7 + rank)
    draw()
    name = RANDOM_FILE.format(rank=rank)
    saver.save(root, "good", {name: random_states(), f"own{rank}": bytes(rank)}, 5)
    result: dict[str, Any] = {"run": saver.run, "after good": latest.read_text(), "drawn": draw(), "errors": {}}
    for tag, content in (("blocked", b""), ("defect", lambda: 0)):
        bad = TOO_LONG if tag == "blocked" else "own1"
        try:
            saver.save(root, tag, {f"own{rank}": b"fine"} if rank == 0 else {bad: content}, 6)
        except Exception as error:
            result["errors"][tag] = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()
    result["after errors"] = latest.read_text()
    result["there after errors"] = sorted(path.name for path in root.iterdir())
    with _slow() if rank == 1 else contextlib.nullcontext():
        saver.save(root, "late", {f"own{rank}": b"fine"}, 7)
        result["after late"] = latest.read_text()
        torch.distributed.barrier()
        saver.save(root, "beside", {f"own{rank}": b"fine"}, 8, asynchronous=True)
        saver.look()
        result["while rank 1 writes"] = latest.read_text(), (root / "beside").exists()
        torch.distributed.barrier()
        saver.wait()
        result["after beside"] = latest.read_text()
        torch.distributed.barrier()
    saver.save(root, "aside", {f"own{rank}": b"fine"}, 9, save_latest=False)
    result["after aside"] = latest.read_text()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    draw()
    restore_random_states(root, "good", mesh_of_processes().world.rank)
    result["again"] = draw()
    return result


def fail_beside(folder: str) -> dict[str, str]:
    """Asynchronous saves that fail on rank 1, and where each rank hears of it."""
    root, rank = Path(folder), torch.distributed.get_rank()
    saver, heard = save.Saver(mesh_of_processes().world), {}
    bad = {f"own{rank}" if rank == 0 else TOO_LONG: b""}

    def at_the_next_step() -> None:
        for _ in range(200):
            saver.look()
            time.sleep(0.02)

    def at_the_next_save() -> None:
        saver.save(root, "next", {f"own{rank}": b""}, 2)

    for place in (at_the_next_step, at_the_next_save, saver.wait):
        saver.save(root, "beside", dict(bad), 1, asynchronous=True)
        try:
            place()
        except CheckpointError as error:
            heard[place.__name__] = str(error)
    saver.save(root, "good", {f"own{rank}": b"fine"}, 3)
    return heard


def slow_writer(folder: str) -> str:
    """Save where rank 1 writes for longer than exchanges may take; the checkpoint's manifest."""
    root, rank, write = Path(folder), torch.distributed.get_rank(), save.write_file
    axis = Axis.of(torch.distributed.new_group(timeout=timedelta(seconds=10)))

    def slowly(path: Path, content: Any) -> Any:
        time.sleep(14 * (rank == 1))
        return write(path, content)

    save.write_file = slowly
    save.Saver(axis).save(root, "slow", {f"own{rank}": b"fine"}, 1)
    return (root / "latest").read_text()


def load_each(good: str, damaged: list[str]) -> list[str]:
    """Load damaged checkpoints of the run `ffn`, then the good one, into one engine.

    Returns:
        The errors; after each a word where it changed a weight or moment of this rank, or the modes of blocks.
    """
    import mocte_ds
    from tests.checkpoints import runs

    engine, *_ = mocte_ds.initialize(model=runs.model(), config=runs.config())

    def state() -> str:
        tensors = [*engine.module.state_dict().values(), *engine.optimizer.single_partition_of_fp32_groups]
        content = b"".join(tensor.detach().float().numpy().tobytes() for tensor in tensors)
        modes = str([(block.mode, [expert.mode for expert in block.experts]) for block in engine.mocte.blocks])
        return hashlib.sha256(content + modes.encode()).hexdigest()

    before, errors = state(), []
    for folder in damaged:
        try:
            engine.load_checkpoint(str(Path(folder).parent), Path(folder).name)
            errors.append("no error")
        except CheckpointError as error:
            errors.append(str(error) + ("" if state() == before else " CHANGED"))
    engine.load_checkpoint(str(Path(good).parent), Path(good).name)
    if state() == before:
        errors.append("the good checkpoint changed nothing")
    return errors


def load_code(folders: list[str]) -> list[str]:
    """The errors that checkpoints of the run `ffn` with code in their files give."""
    import mocte_ds
    from tests.checkpoints import runs

    engine, *_ = mocte_ds.initialize(model=runs.model(), config=runs.config())
    errors = []
    for folder in folders:
        try:
            engine.load_checkpoint(str(Path(folder).parent), Path(folder).name)
            errors.append("no error")
        except CheckpointError as error:
            errors.append(str(error))
    return errors


def load_dense(damaged: list[str]) -> list[str]:
    """The errors that damaged checkpoints of the dense run give."""
    import deepspeed

    from mocte_ds.training import saving
    from tests.checkpoints import runs

    settings = {key: value for key, value in runs.config().items() if key != "mocte"}
    model = runs.model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    saving.prepare(engine, {})
    errors = []
    for folder in damaged:
        try:
            client = saving.load(engine, Path(folder).parent, Path(folder).name)
            errors.append(f"loaded step {engine.global_steps}, {client['tokens']} tokens")
        except CheckpointError as error:
            errors.append(str(error))
    return errors


def save_what_is_not_plain(folder: str) -> list[str]:
    """The errors of a client state that is not plain, and of a value in DeepSpeed's state of rank 1 alone."""
    import mocte_ds
    from tests.checkpoints import runs

    engine, *_ = mocte_ds.initialize(model=runs.model(), config=runs.config())
    errors = []
    for client in ({"folder": Path("/x")}, {}):
        clip = engine.optimizer.clip_grad
        if not client and torch.distributed.get_rank() == 1:
            engine.optimizer.clip_grad = Path("/x")
        try:
            engine.save_checkpoint(folder, "one", client_state=client)
            errors.append("no error")
        except CheckpointError as error:
            errors.append(str(error))
        engine.optimizer.clip_grad = clip
    return errors


def change_while_saving(folder: str) -> dict[str, Any]:
    """Train on while an asynchronous save waits to be written.

    Returns:
        Weights and moments of this rank when the save was called, and after it was loaded again.
    """
    import mocte_ds
    from tests.checkpoints import runs

    torch.manual_seed(0)
    settings = runs.config(checkpoint={"async_save": True})
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    engine.mocte.emerge(0)
    runs.train(engine, 0)
    with _slow(), open(Path(folder) / f"seen{torch.distributed.get_rank()}", "w") as seen:
        before = _numbers(engine)
        client = {"tensor": torch.ones(3), "number": np.float64(1.5)}
        engine.save_checkpoint(folder, "one", client_state=client)
        client["tensor"].zero_()
        print((Path(folder) / "latest").exists(), file=seen)
        runs.train(engine, runs.STEPS)
        engine.wait_for_checkpoint()
    trained = _numbers(engine)
    _, client = engine.load_checkpoint(folder)
    return {"before": before, "trained": trained, "after": _numbers(engine), "client": client}


def _numbers(engine: Any) -> list[np.ndarray]:
    tensors = list(engine.module.state_dict().values()) + list(engine.optimizer.single_partition_of_fp32_groups)
    for values in engine.optimizer.optimizer.state.values():
        tensors += [value for value in values.values() if torch.is_tensor(value)]
    return [tensor.detach().float().numpy().copy() for tensor in tensors]


@contextlib.contextmanager
def _slow() -> Any:
    """Files are written a second late."""
    write = save.write_file

    def late(*arguments: Any) -> Any:
        time.sleep(1.0)
        return write(*arguments)

    save.write_file = late
    try:
        yield
    finally:
        save.write_file = write
