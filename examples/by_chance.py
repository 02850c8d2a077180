"""A freeze policy for comparisons: at the times of another run, as many experts of each bank, chosen by chance.

FREEZES_OF=runs/A/events.jsonl deepspeed launch/pretrain.py --run FILE --out runs/B --import examples/by_chance.py \
    --set deepspeed.mocte.freeze.policy=by-chance
"""

import functools
import json
import os
import random
from collections import defaultdict
from pathlib import Path

from mocte_ds.trainability import Case, policy


@functools.cache
def times(seed: int) -> dict[tuple[int, int], int]:
    """(block, expert) to the step of the check that freezes it; those that keep training are missing."""
    measured, banks = 0, dict[int, int]()
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for line in Path(os.environ["FREEZES_OF"]).read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "check":
            measured = event["measured_at"]
            for block in event["blocks"]:
                sizes[block["block"]], banks[block["block"]] = len(block["experts"]), len(block["imbalance"] or [0])
        elif event["event"] == "freeze":
            size = sizes[event["block"]] // banks[event["block"]]
            found[event["block"], event["expert"] // size].append(measured)
    chance, result = random.Random(seed), {}
    for (block, bank), steps in sorted(found.items()):
        size = sizes[block] // banks[block]
        experts = chance.sample(range(bank * size, bank * size + size), len(steps))
        result.update({(block, expert): step for expert, step in zip(experts, steps, strict=True)})
    return result


@policy("by-chance", in_a_row=False)
def by_chance(case: Case) -> str | None:
    """The reason to freeze an expert now, or None."""
    step = times(case.seed).get(case.who)
    if step is None or case.history[-1].step < step:
        return None
    return f"an expert of its bank froze at the check of step {step} of the other run"
