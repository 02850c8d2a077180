"""FLOPs, bytes on the wire and seconds of a step, from the rates of a machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError
from mocte_ds.flops.ledger import Ledger
from mocte_ds.plan.memory import Layout, Task
from mocte_ds.sections import Positive, parse_section, section
from mocte_ds.yaml_files import read_yaml

SHIPPED = Path(__file__).with_name("hardware.yaml")


@section("hardware")
class Hardware:
    """Rates of one GPU and of what connects it."""

    memory: Positive
    """Bytes of a GPU."""
    gemm: Positive
    """FLOPs per second that products of matrices reach in training."""
    link: Positive
    """Bytes per second between GPUs of one host, each way."""
    net: Positive
    """Bytes per second per GPU between hosts, each way."""
    disk: Positive
    """Bytes per second of the shared file system."""


def read_hardware(name: str, path: Path | None = None) -> Hardware:
    """Rates by name.

    Args:
        name: of a machine in the file.
        path: YAML file; None: the shipped one.

    Raises:
        ConfigError: no such file or machine, or a rate that is missing.
    """
    path = SHIPPED if path is None else path
    values: Any = read_yaml(path)
    if not isinstance(values, dict) or name not in values:
        known = ", ".join(str(key) for key in values) if isinstance(values, dict) else "nothing"
        raise ConfigError(f"{path} says nothing of {name!r:.80}; it has {known}.")
    return parse_section(Hardware, values[name])


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step."""

    flops_per_token: float
    """Forward, backward and recomputation, with gates; without checks."""
    wire: dict[str, float]
    """Bytes that leave one rank, by cause."""
    compute: float
    """Seconds of products."""
    communication: float
    """Seconds on the wire; nothing of it is taken to be hidden behind products."""

    @property
    def step(self) -> float:
        """Seconds."""
        return self.compute + self.communication


def speed(task: Task, layout: Layout, hardware: Hardware, per_host: int, batch_tokens: int, born: bool) -> Speed:
    """A step before or after emergence, nothing frozen, tokens spread evenly.

    Rings: an all-reduce over n ranks sends 2 (n - 1) / n of its bytes from each rank, a reduce-scatter, an all-gather
    and an all-to-all (n - 1) / n.

    Args:
        task: the run.
        layout: of its ranks.
        hardware: rates.
        per_host: ranks of a host.
        batch_tokens: of the global batch.
        born: whether experts run.
    """
    p, cut = task.parameters, layout.ranks // layout.ep_size
    ledger = Ledger()
    blocks = []
    if born and task.config is not None:
        load = batch_tokens * p.per_token / max(1, p.experts)
        experts = {"experts": ["training"] * p.experts, "load": [load] * p.experts}
        first = len(task.sizes.layers) - p.blocks
        blocks = [{"layer": first + i, "mode": "specialising", **experts} for i in range(p.blocks)]
    ledger.step(task.sizes, batch_tokens, task.context, task.config if born else None, blocks)
    flops = ledger.forward + ledger.dgrad + ledger.wgrad + ledger.routing
    if layout.recompute and not task.sizes.recomputes:
        flops += ledger.forward
    flops += ledger.recompute if layout.recompute else 0.0
    tokens = batch_tokens / layout.ranks
    shared = p.trunk + (p.dense if not born or p.keeps_dense else 0)
    local = p.in_experts / layout.ep_size if born else 0.0
    wire = {
        # Stage 1 and 2: gradients are reduced once, weights gathered once.
        "gradients": task.width * (_ring(layout.ranks) * shared + _ring(cut) * local),
        "weights": task.width * (_ring(layout.ranks) * shared + _ring(cut) * local),
        # There and back, forward and backward.
        "tokens": 0.0,
    }
    if layout.stage == 3:
        wire["weights"] *= layout.passes * (3 if layout.recompute else 2)
        wire["gradients"] *= layout.passes
    if born and layout.ep_size > 1:
        again = 3 if layout.recompute else 2
        rows = tokens * task.sizes.hidden_size * p.per_token * p.blocks
        wire["tokens"] = 2.0 * again * task.width * rows * _ring(layout.ep_size)
    across = {"gradients": layout.ranks > per_host, "weights": layout.ranks > per_host}
    across["tokens"] = layout.ep_size > per_host
    seconds = sum(wire[key] / (hardware.net if across[key] else hardware.link) for key in wire)
    return Speed(flops / batch_tokens, wire, flops / layout.ranks / hardware.gemm, seconds)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def save_seconds(size: float, hardware: Hardware) -> float:
    """Seconds that a checkpoint takes on the shared file system."""
    return size / hardware.disk
