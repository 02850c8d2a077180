"""A routing key of your own: letters, digits, white space and the rest go to an expert each.

A file of its own, which imports nothing but the standard library, torch and mocte_ds.moe.keys, so that an export takes
it along. Import it before `mocte_ds.initialize`, in every script that makes an engine from the checkpoint.
docs/extending.md says what a key may read and what it must say of itself.
"""

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
