"""Seeds of single parts of a run: mixed by a hash, so that runs with neighbouring seeds share none of them."""

import hashlib


def derived_seed(seed: int, *parts: str | int) -> int:
    """Seed of one part of a run, the same on all machines.

    A sum such as `seed + rank` gives rank 1 of one run the numbers of rank 0 of the next.

    Args:
        seed: of the run.
        parts: what the seed is for, e.g. a block's path and a bank's number.

    Returns:
        A number in [0, 2**63).
    """
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
