"""How each tensor of a decoder comes from those of a Hugging Face folder; every one must be there, and none be left."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mocte_ds.convert.hf.folder import Folder
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.checksums import checksum

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Taken:
    """One tensor of ours and where it comes from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    """The folder's tensors that it is made of."""
    make: Callable[..., Tensor]
    """From those."""

    def tensor(self, folder: Folder) -> Tensor:
        """Its numbers.

        Raises:
            CheckpointError: a file of the folder is damaged.
        """
        return self.make(*(folder.read(name) for name in self.sources))


Plan = dict[str, Taken]


def same(tensor: Tensor) -> Tensor:
    """A tensor as it is."""
    return tensor


class Planner:
    """Collects where a decoder's tensors come from; what does not fit is refused before anything is read."""

    def __init__(self, folder: Folder, model: nn.Module) -> None:
        """Start with nothing.

        Args:
            folder: whose tensors are taken.
            model: the decoder that takes them, without weights.
        """
        self.folder, self.plan = folder, Plan()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._used: set[str] = set()

    def take(self, name: str, *sources: str, make: Callable[..., Tensor] = same) -> None:
        """Say where a tensor of ours comes from.

        Args:
            name: ours.
            *sources: the folder's; none: the same name.
            make: ours from those; works on tensors without numbers too.

        Raises:
            CheckpointError: one is missing, or of another shape.
        """
        sources = sources or (name,)
        missing = [source for source in sources if source not in self.folder.blanks]
        if missing:
            raise CheckpointError(f"{self.folder.folder} has no tensor {missing[0]}, which its config asks for.")
        blanks = [self.folder.blanks[source] for source in sources]
        try:
            made = make(*blanks)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(self._misfit(sources[0], error)) from error
        if tuple(made.shape) != self._shapes[name]:
            raise CheckpointError(self._misfit(sources[0], f"{self._shapes[name]} for {name}"))
        self._used.update(sources)
        self.plan[name] = Taken(tuple(made.shape), made.dtype, sources, make)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of ours."""
        return self._shapes[name]

    def zero(self, name: str, dtype: torch.dtype) -> None:
        """Say that a tensor of ours holds zeros: the folder has nothing like it."""
        shape = self._shapes[name]
        self.plan[name] = Taken(shape, dtype, (), lambda: torch.zeros(shape, dtype=dtype))

    def use_zeros(self, source: str) -> None:
        """Take a tensor of the folder that has no place in our model, if it holds nothing.

        Raises:
            CheckpointError: it holds something.
        """
        if source in self.folder.blanks:
            if self.folder.read(source).any():
                raise CheckpointError(
                    f"{self.folder.folder}: {source} belongs to a shared expert that our blocks do not have; only one "
                    "of zeros can be left out."
                )
            self._used.add(source)

    def use(self, source: str) -> None:
        """Take a tensor of the folder that changes nothing."""
        if source in self.folder.blanks:
            self._used.add(source)

    def finish(self, tied: bool) -> Plan:
        """The plan, if nothing is missing and nothing is left.

        Raises:
            CheckpointError: names what is.
        """
        left = set(self.folder.files) - self._used
        if tied and HEAD in left:
            embedding = self.plan[EMBEDDING].sources[0]
            if checksum(self.folder.read(HEAD)) != checksum(self.folder.read(embedding)):
                raise CheckpointError(
                    f"{self.folder.folder} has an output matrix {HEAD} of its own, but tie_word_embeddings is true in "
                    "its config; set it to false in a copy of the folder, if the model was trained so."
                )
            self.folder.forget(HEAD)
            left.remove(HEAD)
        if left:
            raise CheckpointError(f"{self.folder.folder} has the tensor {min(left)}, which its architecture lacks.")
        missing = self._shapes.keys() - self.plan.keys()
        assert not missing, missing  # of our own names: a reader that left one out is a defect
        return {name: self.plan[name] for name in self._shapes}

    def _misfit(self, source: str, reason: object) -> str:
        shape = tuple(self.folder.blanks[source].shape)
        return f"{self.folder.folder}: {source} has the shape {shape}, which does not fit the config: {reason}."


def plan_dense(folder: Folder, model: nn.Module) -> Plan:
    """Where the tensors of a decoder without experts come from.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    planner = Planner(folder, model)
    for name in model.state_dict():
        if model.config.style == "gpt2":
            _take_gpt2(planner, name)
        else:
            planner.take(name)
    return planner.finish(model.config.tied)


_GPT2 = {
    "self_attn.o_proj": "attn.c_proj",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
_GPT2_ENDS = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}


def _take_gpt2(planner: Planner, name: str) -> None:
    """GPT-2 joins q, k and v and stores its matrices transposed."""
    path, _, kind = name.removeprefix("model.").rpartition(".")
    if not path.startswith("layers."):
        planner.take(name, f"transformer.{_GPT2_ENDS[path]}.{kind}")
        return
    _, layer, part = path.split(".", 2)
    prefix, matrix = f"transformer.h.{layer}", kind == "weight" and "norm" not in part
    if part in _GPT2:
        planner.take(name, f"{prefix}.{_GPT2[part]}.{kind}", make=_transposed if matrix else same)
        return
    number = "qkv".index(part.removeprefix("self_attn.")[0])

    def third(joined: Tensor) -> Tensor:
        chosen = joined.chunk(3, dim=-1)[number]
        return _transposed(chosen) if matrix else chosen.clone()

    planner.take(name, f"{prefix}.attn.c_attn.{kind}", make=third)


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()
