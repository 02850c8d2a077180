"""How evenly ranks would share the rows of a run's experts, by how many ranks hold them."""

from mocte_ds.report.facts import MOCTE, fact
from mocte_ds.report.run import Run, block_entries
from mocte_ds.text_table import is_number


def slowest_ranks(run: Run) -> dict[int, tuple[float, float]]:
    """Rows of the fullest rank over the mean: the mean over checks and blocks, and the largest.

    All ranks wait for the fullest one in each block. A rank holds consecutive experts of each bank.

    Returns:
        By the number of ranks, where each holds several experts; empty where the log has no loads.
    """
    experts = fact(run, *MOCTE, "num_experts")
    if not isinstance(experts, int) or experts < 1:
        return {}
    loads = []
    for check in run.checks:
        for entry in block_entries(check):
            load = entry.get("load")
            if isinstance(load, list) and load and all(map(is_number, load)) and sum(load) > 0:
                loads.append(load)
    loads = [load for load in loads if len(load) % experts == 0]
    found = {}
    for ranks in (n for n in range(2, experts) if experts % n == 0) if loads else ():
        each = experts // ranks
        ratios = []
        for load in loads:
            by_rank = [sum(n for k, n in enumerate(load) if k % experts // each == rank) for rank in range(ranks)]
            ratios.append(max(by_rank) * ranks / sum(load))
        found[ranks] = (sum(ratios) / len(ratios), max(ratios))
    return found
