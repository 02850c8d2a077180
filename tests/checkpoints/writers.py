"""What two ranks do in the tests of DeepSpeed's other writers and of names that look like patterns."""

from pathlib import Path
from typing import Any

import torch

from mocte_ds.errors import CheckpointError


def write_and_load(folder: str) -> dict[str, Any]:
    """Two runs of other weights into `r[1]` and `r1`, with numbers as tags; then every way to weights.

    Returns:
        "errors" by call, "same" (what was loaded is what was saved), "weights" of this rank with the numbers that its
        experts have in the bank.
    """
    import mocte_ds
    from tests.checkpoints import runs

    root, rank = Path(folder), torch.distributed.get_rank()
    torch.manual_seed(0)
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=runs.config())
    engine.mocte.emerge(0)
    runs.train(engine, 0)
    engine.save_checkpoint(root / "r[1]", tag=0)
    first = _copy(engine)
    runs.train(engine, 3)
    engine.mocte.freeze(0, 1)
    runs.train(engine, 6)
    engine.save_checkpoint(root / "r[1]", tag=1)
    engine.save_checkpoint(root / "r1", tag="0")
    last = _copy(engine)
    same = {"other weights": not _equal(first, last)}
    path, _ = engine.load_checkpoint(root / "r[1]", tag=0)
    same["tag 0"] = _equal(first, _copy(engine)) and "r[1]/0/" in str(path)
    engine.load_checkpoint(root / "r[1]")
    same["latest"] = _equal(last, _copy(engine))
    errors = {}
    calls = {
        "module_state_dict": engine.module_state_dict,
        "frozen left out": lambda: engine.save_checkpoint(root / "left", exclude_frozen_parameters=True),
        "empty tag": lambda: engine.load_checkpoint(root / "r[1]", tag=""),
        "no room": lambda: engine.save_16bit_model("/dev/full/x"),
        "of the user": lambda: engine.save_16bit_model(str(root / "mine"), "thesis.bin"),
    }
    if rank == 0:
        (root / "mine").mkdir()
        (root / "mine" / "thesis.bin").write_text("the only copy")
    torch.distributed.barrier()
    for name, call in calls.items():
        try:
            call()
        except CheckpointError as error:
            errors[name] = str(error)
    engine.save_16bit_model(str(root / "w[*]"), "all.bin")
    same["written"] = engine.save_16bit_model(str(root / "w[*]"), "all.bin")  # again, over what it wrote
    same["trained"] = engine.save_16bit_model(str(root / "w[*]"), "trained.bin", exclude_frozen_parameters=True)
    weights = engine._consolidated_16bit_state_dict()
    same["on rank 0"] = (weights is not None) == (rank == 0)
    own = {}
    for name, tensor in engine.module.state_dict().items():
        before, mark, after = name.partition("deepspeed_experts.")
        number, _, rest = after.partition(".")
        own[f"{before}{mark}{int(number) + 2 * rank}.{rest}" if mark else name] = tensor.float().numpy()
    return {"errors": errors, "same": same, "weights": own}


def _copy(engine: Any) -> list[torch.Tensor]:
    return [
        tensor.detach().clone()
        for tensor in (*engine.module.state_dict().values(), *engine.optimizer.single_partition_of_fp32_groups)
    ]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
