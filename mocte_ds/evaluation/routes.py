"""Which experts the tokens of a call go to, in a model with blocks of experts."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

BLOCK, BANK = "MocteBlock", "MocteBank"
"""Names of the classes that stand for an FFN in the class around a base model, and that hold experts in it."""


def banks(network: nn.Module) -> dict[str, Any]:
    """The banks of experts by name, in the model's order; the class around the base model adds no word to them."""
    found = [(name, module) for name, module in network.named_modules() if type(module).__name__ == BANK]
    return {name.removeprefix("base."): module for name, module in found}


@contextlib.contextmanager
def routes(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While it is open: by bank, (n, k) int64 experts of each token of the last call, also of padding."""
    seen: dict[str, Tensor] = {}
    gates = {name: bank.gate for name, bank in banks(network).items()}

    def watched(name: str, choose: Any) -> Any:
        def chosen(*args: Any, **how: Any) -> Any:
            result = choose(*args, **how)
            seen[name] = result[0].detach()
            return result

        return chosen

    for name, gate in gates.items():
        gate.choose = watched(name, gate.choose)  # hides the method of the class
    try:
        yield seen
    finally:
        for gate in gates.values():
            del gate.choose
