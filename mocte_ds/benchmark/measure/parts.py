"""A part of a check: what it has to do by formula, and how long it took here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mocte_ds.text_table import brief, text_table


@dataclass(frozen=True)
class Work:
    """What one part of a check has to do on one rank, from the formulas of its sizes."""

    units: float
    """What its seconds are proportional to, in a unit of its own."""
    flops: float
    """Matrix products, a multiply-add counts as two."""
    moved_bytes: int
    """Given to collectives by this rank."""
    held_bytes: int
    """Memory that it needs beside the features."""

    def times(self, factor: float) -> "Work":
        """As much work ``factor`` times."""
        return Work(self.units * factor, self.flops * factor, round(self.moved_bytes * factor), self.held_bytes)


@dataclass(frozen=True)
class TimedPart:
    """One part of a check, as it was timed."""

    what: str
    """In words, for the table."""
    work: Work
    seconds: float
    """For ``work``."""
    where: str
    """`device`; `host` for what runs on the CPU on any machine; `beside`: there in a thread beside the next step."""
    every_check: bool = True
    """False: once per block (cold starts)."""

    def for_work(self, work: Work) -> "TimedPart":
        """The part with its seconds scaled to other work."""
        factor = work.units / self.work.units if self.work.units else 0.0
        return replace(self, work=work, seconds=self.seconds * factor)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        facts = {**asdict(self.work), **{k: v for k, v in asdict(self).items() if k != "work"}}
        return {"seconds": facts.pop("seconds"), **facts}


def parts_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The parts of a result, as :meth:`TimedPart.to_dict` gave them, one line each."""
    head = ["part", "seconds", "GFLOP", "GFLOP/s", "MB moved", "MB held", "what"]
    rows = []
    for name, part in parts.items():
        rate = part["flops"] / part["seconds"] / 1e9 if part["seconds"] else None
        numbers = (part["seconds"], part["flops"] / 1e9, rate, part["moved_bytes"] / 1e6, part["held_bytes"] / 1e6)
        rows.append([name, *(brief(number) for number in numbers), part["what"]])
    return text_table(head, rows, left=("part", "what"))
