"""A routing key of your own in deepspeed_loop.py's loop: letters, digits, spaces and the rest go to an expert each.

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/routing_key.py --out runs/key

Register the key before `mocte_ds.initialize`, in every script that makes an engine from the checkpoint.
docs/extending.md says what a key may read and what it must say of itself.
"""

from deepspeed_loop import CONFIG, main
from torch import Tensor

from mocte_ds.moe.keys import KEYS, Key


@KEYS.register("kind-of-byte")
class KindOfByte(Key):
    """The expert of a token follows from its byte alone."""

    reads_ids, has_logits, of_sample = True, False, False

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int | None = None) -> None:
        super().__init__(hidden_size, num_experts, vocab_size)
        kinds = [0 if chr(b).isalpha() else 1 if chr(b).isdigit() else 2 if chr(b).isspace() else 3 for b in range(256)]
        # Stored with the model; the same on all ranks.
        self.register_buffer("table", Tensor(kinds).long() % num_experts)

    def fit(self, birth) -> None:
        """Nothing is learned from the clusters."""

    def choose(self, features: Tensor, tokens) -> Tensor:
        """(n,) expert of each token; ``tokens.ids`` are (B, T)."""
        return self.table[tokens.ids].reshape(-1)


if __name__ == "__main__":
    main({**CONFIG, "mocte": {**CONFIG["mocte"], "router": {"kind": "kind-of-byte"}}})
