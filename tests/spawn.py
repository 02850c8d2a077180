"""Runs a function on several ranks of a new process group: processes forked from a server that has imported all."""

import functools
import socket

from mocte_ds.dist.processes import run_ranks

# Those from the model on are imported late, by transformers, by DeepSpeed's engine and where they are needed.
PRELOADED = ("torch", "deepspeed", "mocte_ds.engine", "transformers.models.llama.modeling_llama")
PRELOADED += ("deepspeed.runtime.zero.muon.muon_optimizer", "mocte_ds.training.loop", "transformers.models.auto")
PRELOADED += ("sklearn.cluster", "sklearn.metrics")

spawn = functools.partial(run_ranks, preload=PRELOADED, capture=True)
"""``spawn(function, ranks, *args, timeout=..., deepspeed=...)``: see :func:`mocte_ds.dist.processes.run_ranks`."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
