"""What a run has and megatron-core's model does not, in a folder beside it, so that the way back loses nothing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.checkpoints.files import hash_file, to_json
from mocte_ds.checkpoints.hf.shards import Entry, Shards, write_shards
from mocte_ds.checkpoints.manifest import Manifest, require_whole
from mocte_ds.checkpoints.megatron.model import Settings
from mocte_ds.checkpoints.megatron.pairs import Pair, all_pairs
from mocte_ds.checkpoints.source import Source, empty_decoder
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.json_files import read_json

OWN_FOLDER = "mocte_ds"
_STATE_FILE, _FORMAT = "state.json", 1


def rest(source: Source, pairs: Iterable[Pair]) -> list[Entry]:
    """Tensors of ours that no tensor of megatron-core's model holds: FFNs and experts that do not run, zero biases."""
    used = {name for pair in pairs for name in pair.sources}
    own = source.model.state_dict()

    def dtype(name: str) -> torch.dtype:
        if not own[name].is_floating_point():
            return own[name].dtype
        return torch.bfloat16 if source.dtype == "bf16" and ".gate." not in name else torch.float32

    return [Entry(name, shape, dtype(name)) for name, shape in source.shapes.items() if name not in used]


def write(folder: Path, source: Source, settings: Settings, pairs: Iterable[Pair], manifest: Manifest) -> None:
    """Write our part beside megatron-core's.

    Args:
        folder: of the whole.
        source: what is converted.
        settings: of megatron-core's model.
        pairs: its tensors.
        manifest: of the checkpoint that is converted.

    Raises:
        OSError: a file cannot be written.
    """
    own = folder / OWN_FOLDER
    own.mkdir()
    entries = {entry.name: entry for entry in rest(source, pairs)}
    if entries:
        write_shards(own, list(entries.values()), lambda name: source.read(name).to(entries[name].dtype))
    state = {"format": _FORMAT, "state": source.state}
    (own / _STATE_FILE).write_bytes(to_json({**state, **settings.to_dict()}))
    sign(own, manifest)
    sign(folder, manifest)


def sign(folder: Path, manifest: Manifest) -> None:
    """List the files of a folder with their hashes, in the name of a run."""
    files = {path.name: hash_file(path) for path in folder.iterdir() if path.is_file()}
    Manifest(manifest.run, manifest.step, 1, files).write(folder)


class MegatronSource(Source):
    """The weights of a distributed checkpoint of megatron-core, by the names of ours."""

    def __init__(self, folder: Path, dtype: str = "fp32") -> None:
        """Read everything but the weights.

        Args:
            folder: that :func:`write` wrote into.
            dtype: as of :class:`Source`.

        Raises:
            CheckpointError: our part is missing, damaged, or of another version.
            ConfigError: settings that this version does not know.
        """
        own = folder / OWN_FOLDER
        if not own.is_dir():
            raise CheckpointError(
                f"{own} is missing, and with it the run's settings: name the folder that tools/to_megatron.py wrote "
                "for megatron-core with --settings."
            )
        self.manifest = require_whole(own)
        values = _read_state(own / _STATE_FILE)
        self.settings = Settings(values["transformer_config"], values["gpt_model"], values["router_scale"])
        state = values["state"]
        mocte = None if state["mocte"] is None else {"config": state["mocte"], "blocks": state["blocks"]}
        super().__init__(empty_decoder(state["model"], mocte, own / _STATE_FILE), state, dtype)
        self.pairs = all_pairs(self, self.settings)
        self._rest = Shards(own) if rest(self, self.pairs) else None
        self._theirs: dict[str, Tensor] = {}
        self._pairs = {name: (pair, number) for pair in self.pairs for number, name in enumerate(pair.sources)}

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
            return self._rest.read(name)
        pair, number = self._pairs[name]
        return pair.split(self._theirs[pair.name])[number]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != _FORMAT:
        raise CheckpointError(f"{path} has format {found!r}; this version reads format {_FORMAT}.")
    return values
