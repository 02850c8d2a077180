"""What a run has and megatron-core's model does not, in a folder beside it, so that the way back loses nothing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.base_model import make_config, require_base
from mocte_ds.checkpoints.files import to_json
from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.names import is_gate
from mocte_ds.checkpoints.source import Source, empty_decoder, empty_model
from mocte_ds.convert.hf.imports.config import decoder_of
from mocte_ds.convert.hf.shards import Entry, Shards, write_shards
from mocte_ds.convert.megatron.model import Settings, settings_of
from mocte_ds.convert.megatron.pairs import Pair, all_pairs
from mocte_ds.errors import CheckpointError, MocteError
from mocte_ds.json_files import read_object
from mocte_ds.models import DecoderConfig
from mocte_ds.ownership.facts import hash_file
from mocte_ds.ownership.manifest import Manifest
from mocte_ds.sections import parse_section

OWN_FOLDER = "mocte_ds"
_STATE_FILE, _FORMAT = "state.json", 1
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rest(source: Source, pairs: Iterable[Pair]) -> list[Entry]:
    """Tensors of ours that no tensor of megatron-core's model holds: FFNs and experts that do not run, zero biases."""
    used = {name for pair in pairs for name in pair.sources}
    if source.config.tied:
        used.add(_HEAD)
    own = source.model.state_dict()

    def dtype(name: str) -> torch.dtype:
        if not own[name].is_floating_point():
            return own[name].dtype
        return torch.bfloat16 if source.dtype == "bf16" and not is_gate(name) else torch.float32

    return [Entry(name, shape, dtype(name)) for name, shape in source.shapes.items() if name not in used]


def write(
    folder: Path,
    source: Source,
    state: dict[str, Any],
    settings: Settings,
    pairs: Iterable[Pair],
    manifest: Manifest,
) -> None:
    """Write our part beside megatron-core's.

    Args:
        folder: of the whole.
        source: what is converted.
        state: of the checkpoint, as of :class:`Source`.
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
    values = {"format": _FORMAT, "state": state, **settings.to_dict()}
    (own / _STATE_FILE).write_bytes(to_json(values))
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
        try:
            state = values["state"]
            self._config = _decoder(state, folder, own / _STATE_FILE)
            mocte = None if state["mocte"] is None else {"config": state["mocte"], "blocks": state["blocks"]}
            base, path = state.get("base"), own / _STATE_FILE
            model = empty_decoder(state["model"], mocte, path) if base is None else empty_model(base, mocte, path)
            super().__init__(model, state, dtype)
            self.settings = Settings(values["transformer_config"], values["gpt_model"], values["router_scale"])
            self.pairs = all_pairs(self, self.settings)
            int(state["step"])
        except MocteError:
            raise
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{own / _STATE_FILE} does not describe a run ({type(error).__name__}: {str(error)[:200]}): it is "
                "damaged; convert the checkpoint again."
            ) from error
        self._rest = Shards(own) if rest(self, self.pairs) else None
        self._theirs: dict[str, Tensor] = {}
        self._pairs = {name: (pair, number) for pair in self.pairs for number, name in enumerate(pair.sources)}
        self._require_settings(own / _STATE_FILE)

    def _require_settings(self, path: Path) -> None:
        """Refuse settings of another model than the run's: megatron-core would take memory for whatever they say."""
        wanted = settings_of(self)
        if json.loads(json.dumps(self.settings.to_dict())) != json.loads(json.dumps(wanted.to_dict())):
            raise CheckpointError(
                f"{path}: the settings of megatron-core's model are not those of the run's model: it is damaged; "
                "convert the checkpoint again."
            )

    @property
    def config(self) -> DecoderConfig:
        """Sizes of the run's model."""
        return self._config

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
        if name == _HEAD and self.config.tied:
            name = _EMBEDDING
        if name not in self._pairs:
            assert self._rest is not None  # names without a pair are read from there
            return self._rest.read(name)
        pair, number = self._pairs[name]
        return pair.split(self._theirs[pair.name])[number]


def _read_state(path: Path) -> dict[str, Any]:
    values = read_object(path, CheckpointError)
    if values.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {values.get('format')!r}; this version reads format {_FORMAT}.")
    return values


def _decoder(state: dict[str, Any], folder: Path, path: Path) -> DecoderConfig:
    """Sizes of the run's model.

    Raises:
        CheckpointError: it has more parameters than the folder has bytes; nothing is built of it.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    base, mocte = state.get("base"), state["mocte"]
    layers = state["model"]["num_layers"] if base is None else base["config"]["num_hidden_layers"]
    experts = 0 if mocte is None else mocte["num_experts"] * len(mocte.get("banks") or [None]) * len(state["blocks"])
    if isinstance(layers, int) and max(layers, experts) <= there:
        if base is None:
            decoder = parse_section(DecoderConfig, state["model"])
        else:
            base = require_base(base, path)
            decoder = decoder_of(base["architecture"], make_config(base, path), path)
        if decoder.num_params() <= there:
            return decoder
    raise CheckpointError(
        f"{folder} has {there:,} bytes, fewer than the parameters of the model that its {_STATE_FILE} describes: "
        "it is damaged, or files are missing."
    )
