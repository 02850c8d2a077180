"""A run with experts as a mixture class of transformers: which one, and its files, written tensor by tensor."""

from pathlib import Path

import torch
from torch import Tensor

from mocte_ds.checkpoints.source import NARROW, Source
from mocte_ds.convert.hf.families import FAMILIES, Family, Mixture
from mocte_ds.convert.hf.shards import SHARD_BYTES, Entry, Shards, write_shards
from mocte_ds.convert.hf.tokenizer import SpecialIds
from mocte_ds.convert.hf.trained import generation_of
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.checksums import SumsBeside


class StockMixture:
    """A run in the class that computes what it computes."""

    def __init__(self, family: Family, run: Mixture) -> None:
        """Look at the tensors.

        Args:
            family: that fits.
            run: the trained model.
        """
        self.family, self.run, self.pairs = family, run, family.pairs(run)
        self.architecture = family.architecture
        """Name of the class."""
        kind = run.source.dtype
        self._entries = [Entry(pair.theirs, pair.shape, pair.dtype(kind)) for pair in self.pairs]

    @property
    def nbytes(self) -> int:
        """Size of the weights in the files."""
        return sum(entry.nbytes for entry in self._entries)

    def write(self, special: SpecialIds, folder: Path, shard_bytes: int = SHARD_BYTES) -> tuple[int, dict[str, str]]:
        """Write what `save_pretrained` of the class writes, and read it again; memory holds one tensor at a time.

        Args:
            special: ids where the base model's config names none.
            folder: to write to.
            shard_bytes: largest file of weights.

        Returns:
            Parameters, and the checksum of each tensor in the files.

        Raises:
            CheckpointError: a tensor has another shape than the class says, or does not arrive.
        """
        from transformers import GenerationConfig

        source, config = self.run.source, self.family.config(self.run)
        config.architectures, config.dtype = [self.architecture], NARROW.get(source.dtype, torch.float32)
        generation = generation_of(source, GenerationConfig.from_model_config(config))
        for settings in (config, generation):
            for name, number in special.fields().items():
                if getattr(settings, name, None) is None:
                    setattr(settings, name, number)
        config.save_pretrained(folder)
        generation.to_json_file(folder / "generation_config.json")
        pairs = {pair.theirs: pair for pair in self.pairs}
        with SumsBeside() as made:

            def make(name: str) -> Tensor:
                tensor = pairs[name].tensor(source)
                made.add(name, tensor)
                return tensor

            write_shards(folder, self._entries, make, shard_bytes)
        written = Shards(folder)
        with SumsBeside() as arrived:
            for name in made.found:
                if name in written.files:
                    arrived.add(name, written.read(name))
        for name, wanted in made.found.items():
            if arrived.found.get(name) != wanted:
                raise CheckpointError(f"{folder}: the weight {name} was lost or changed on its way through the file.")
        return sum(torch.Size(pair.shape).numel() for pair in self.pairs if not pair.buffer), made.found


def find_mixture(source: Source) -> StockMixture:
    """A run with experts in the first class that fits.

    Raises:
        CheckpointError: there is none; says which setting stands in the way and what to use instead.
    """
    run, reasons = Mixture(source), {}
    for family in FAMILIES.values():
        reason = family.refusal(run)
        if reason is None:
            return StockMixture(family, run)
        near = run.architecture in (family.architecture, *family.bases)
        reasons[near + (near and family.kind == run.some.kind)] = reason
    raise CheckpointError(f"{reasons[max(reasons)]}; export with --class own.")
