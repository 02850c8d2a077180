"""Which rank holds which experts, and which part of everything else."""

from dataclasses import dataclass

ALIGNMENT = 2  # DeepSpeed pads a group of parameters to a multiple of this times the ranks that share it


@dataclass(frozen=True)
class RankLayout:
    """How a run is spread over its ranks."""

    world_size: int
    """Data-parallel ranks."""
    ep_size: int = 1
    """Ranks that share the experts of a block; divides the number of ranks."""
    data_before_expert: bool = False
    """DeepSpeed's `use_data_before_expert_parallelism`: neighbours hold the same experts."""

    def ep_rank(self, rank: int) -> int:
        """A rank's place among the ranks that share a block's experts."""
        return rank // (self.world_size // self.ep_size) if self.data_before_expert else rank % self.ep_size

    def sharers(self, ep_rank: int | None) -> list[int]:
        """Ranks that share the experts of ``ep_rank``; None: the ranks that share everything else, which are all."""
        return [rank for rank in range(self.world_size) if ep_rank is None or self.ep_rank(rank) == ep_rank]

    def same_as(self, other: "RankLayout") -> bool:
        """Whether every rank holds the same in both."""
        ranks = range(self.world_size)
        sizes = (self.world_size, self.ep_size) == (other.world_size, other.ep_size)
        return sizes and all(self.ep_rank(rank) == other.ep_rank(rank) for rank in ranks)

    def __str__(self) -> str:
        topology = ", data before expert parallelism" if self.data_before_expert and self.ep_size > 1 else ""
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''} with ep_size {self.ep_size}{topology}"


def partition_size(numel: int, ranks: int) -> int:
    """Elements of a flat group of ``numel`` elements that each of ``ranks`` ranks holds, padding included."""
    return -(-numel // (ALIGNMENT * ranks)) * ALIGNMENT
