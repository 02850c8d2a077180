"""What a run file says about the cost of its training and the cadence of its checks."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mocte_ds.config import MocteConfig
from mocte_ds.errors import MocteError
from mocte_ds.flops.ledger import Ledger
from mocte_ds.flops.model_sizes import ModelSizes
from mocte_ds.moe.attach import matching_modules
from mocte_ds.shipped import shipped_file
from mocte_ds.training.model import ModelConfig, config_sizes, make_model
from mocte_ds.training.run_config import RunConfig, read_run


@dataclass(frozen=True)
class RunPlan:
    """One run on a number of ranks."""

    path: str
    ranks: int
    model: ModelConfig
    sizes: ModelSizes
    """Of the model."""
    config: MocteConfig
    """The "mocte" block."""
    context: int
    """Tokens of a sequence."""
    micro_batch: int
    """Sequences."""
    tokens_per_step: int
    """All ranks together."""
    step_flops: float
    """Of the dense model's optimizer step, all ranks; forward and backward, recomputation not counted."""
    blocks: int
    interval: int
    """Optimizer steps between two checks."""
    window: int
    """Optimizer steps before a check whose forward passes offer features."""
    dtype: str
    """`bf16` or `fp32`: of the model's matrix products."""

    @property
    def local_experts(self) -> int:
        """Experts of all blocks that one rank holds."""
        slots = self.blocks * len(self.config.routers) * self.config.num_experts
        return slots // (self.config.ep_size if self.ranks > 1 else 1)


def read_plan(path: str | Path, ranks: int) -> RunPlan:
    """Read a run file.

    Args:
        path: a file, or the name of one that ships.
        ranks: data-parallel ranks.

    Raises:
        MocteError: no such file, a run without a "mocte" block, or ranks that do not divide its batch.
    """
    found = shipped_file("runs", path)
    run = read_run(found)
    if "mocte" not in run.deepspeed:
        raise MocteError(f'{found} has no "mocte" block: its run has no checks whose cost could be measured.')
    config = MocteConfig.from_dict(run.deepspeed["mocte"])
    unit = ranks * run.training.micro_batch * run.context
    if ranks < 1 or run.training.batch_tokens % unit:
        raise MocteError(
            f"{found}: its batch of {run.training.batch_tokens} tokens cannot be cut for {ranks} ranks of "
            f"{run.training.micro_batch} sequences of {run.context} tokens; give another number of ranks."
        )
    ledger = Ledger()
    sizes = config_sizes(run.model)
    ledger.step(sizes, run.training.batch_tokens, run.context, None, [])
    interval = max(1, round(config.check_every * run.training.steps))
    return RunPlan(
        path=str(found),
        ranks=ranks,
        model=run.model,
        sizes=sizes,
        config=config,
        context=run.context,
        micro_batch=run.training.micro_batch,
        tokens_per_step=run.training.batch_tokens,
        step_flops=ledger.total,
        blocks=_blocks(run, config),
        interval=interval,
        window=sampling_window(config, interval, run.training.batch_tokens // run.context),
        dtype="bf16" if (run.deepspeed.get("bf16") or {}).get("enabled") else "fp32",
    )


def sampling_window(config: MocteConfig, interval: int, sequences_per_step: int) -> int:
    """Steps before a check in which features are sampled; as Controller.bind has it (a test compares them)."""
    spectrum = config.spectrum
    enough = max((spectrum.rows << spectrum.doublings) / 16, spectrum.documents) / sequences_per_step
    return min(interval, max(1, round(enough + 0.5)))


def _blocks(run: RunConfig, config: MocteConfig) -> int:
    with torch.device("meta"):
        return len(matching_modules(make_model(run.model, weights=False), config.modules))
