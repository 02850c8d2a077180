"""What a run has and megatron-core's model does not, in a folder beside it, so that the way back loses nothing."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.base_model import require_base
from mocte_ds.checkpoints.base import refuse_decoder
from mocte_ds.checkpoints.files import to_json
from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.names import is_gate
from mocte_ds.checkpoints.source import Source, empty_model
from mocte_ds.convert.hf.shards import Entry, Shards, write_shards
from mocte_ds.convert.megatron.settings import Settings, settings_of
from mocte_ds.convert.megatron.tensor_map import Pair, all_pairs, unused
from mocte_ds.errors import CheckpointError, MocteError
from mocte_ds.json_files import read_object
from mocte_ds.moe.block import running_state
from mocte_ds.ownership.facts import hash_file
from mocte_ds.ownership.manifest import Manifest

RECORD_FOLDER = "mocte_ds"
_STATE_FILE, _FORMAT = "state.json", 1


def write_record(folder: Path, source: Source, settings: Settings, pairs: list[Pair], manifest: Manifest) -> None:
    """Write our part beside megatron-core's.

    Args:
        folder: of both.
        source: what is converted.
        settings: of megatron-core's model.
        pairs: its tensors.
        manifest: of the checkpoint that is converted.

    Raises:
        CheckpointError: a tensor of the source has no place.
        OSError: a file cannot be written.
    """
    record = folder / RECORD_FOLDER
    record.mkdir()
    like = running_state(source.model)

    def dtype(name: str) -> torch.dtype:
        if not like[name].is_floating_point():
            return like[name].dtype
        return torch.bfloat16 if source.dtype == "bf16" and not is_gate(name) else torch.float32

    if names := unused(source, pairs):
        entries = [Entry(name, source.shapes[name], dtype(name)) for name in names]
        write_shards(record, entries, lambda name: source.read(name).to(dtype(name)))
    values = {"format": _FORMAT, "state": source.state, **settings.to_dict()}
    (record / _STATE_FILE).write_bytes(to_json(values))
    for written in (record, folder):
        files = {path.name: hash_file(path) for path in written.iterdir() if path.is_file()}
        Manifest(manifest.run, manifest.step, 1, files).write(written)


class MegatronSource(Source):
    """The weights of a distributed checkpoint of megatron-core, by the names of ours."""

    def __init__(self, folder: Path, dtype: str = "fp32") -> None:
        """Read everything but the weights.

        Args:
            folder: that :func:`write_record` wrote into.
            dtype: as of :class:`Source`.

        Raises:
            CheckpointError: our part is missing, damaged, or of another version.
            ConfigError: settings that this version does not know.
        """
        record = folder / RECORD_FOLDER
        if not record.is_dir():
            raise CheckpointError(
                f"{record} is missing, and with it the run's settings: name the folder that tools/to_megatron.py wrote "
                "for megatron-core with --settings."
            )
        self.manifest = require_whole(record)
        path = record / _STATE_FILE
        values = read_object(path, CheckpointError)
        if values.get("format") != _FORMAT:
            raise CheckpointError(f"{path} has format {values.get('format')!r}; this version reads format {_FORMAT}.")
        try:
            self._read(values, folder, path, dtype)
        except MocteError:
            raise
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} does not describe a run ({type(error).__name__}: {str(error)[:200]}): it is damaged; convert "
                "the checkpoint again."
            ) from error

    def _read(self, values: dict[str, Any], folder: Path, path: Path, dtype: str) -> None:
        """The structure, nothing of which is built if it claims more than the folder holds."""
        state = values["state"]
        refuse_decoder(state, path)
        base, experts, mocte = require_base(state.get("base"), path), 0, None
        if state["mocte"] is not None:
            mocte = {"config": state["mocte"], "blocks": state["blocks"]}
            experts = state["mocte"]["num_experts"] * len(state["mocte"].get("banks") or [None]) * len(state["blocks"])
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        # The least that lies there of so many layers and experts: a vector of features each.
        least = max(base["config"]["num_hidden_layers"], experts) * base["config"]["hidden_size"]
        model = empty_model(base, mocte, path) if least <= there else None
        if model is None or sum(tensor.numel() for tensor in running_state(model).values()) > there:
            raise CheckpointError(
                f"{folder} has {there:,} bytes, fewer than the parameters of the model that its {path.name} describes: "
                "it is damaged, or files are missing."
            )
        super().__init__(model, state, dtype)
        int(state["step"])
        self._theirs: dict[str, Tensor] = {}
        self._pairs: dict[str, tuple[Pair, int]] = {}
        self._rest = Shards(path.parent) if mocte is not None else None
        self.settings = settings_of(self, path)
        # As read from JSON. megatron-core would take memory for whatever other settings say.
        if any(values[key] != value for key, value in json.loads(json.dumps(self.settings.to_dict())).items()):
            raise CheckpointError(
                f"{path}: the settings of megatron-core's model are not those of the run's model: it is damaged; "
                "convert the checkpoint again."
            )
        pairs = all_pairs(self, self.settings)
        unused(self, pairs)
        self._pairs = {name: (pair, number) for pair in pairs for number, name in enumerate(pair.sources)}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Set the tensors of megatron-core's model, by their name there.

        Raises:
            CheckpointError: one has another shape than the run's.
        """
        self._theirs = tensors
        for name, (pair, _) in self._pairs.items():
            if tuple(self._stored(name).shape) != self.shapes[name]:
                raise CheckpointError(f"{pair.name} is {tuple(tensors[pair.name].shape)}, which does not fit {name}.")

    def _stored(self, name: str) -> Tensor:
        if name not in self._pairs:
            assert self._rest is not None  # names without a pair are read from there
            return self._rest.read(name)
        pair, number = self._pairs[name]
        return pair.split(self._theirs[pair.name])[number]
