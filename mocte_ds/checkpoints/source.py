"""A checkpoint whose tensors are read one at a time, for models that are larger than memory."""

import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.base_model import make_model, require_base
from mocte_ds.checkpoints.base import refuse_decoder
from mocte_ds.checkpoints.disk_tensors import DiskTensor, read_disk_tensors
from mocte_ds.checkpoints.load import STATE_FILE, read_state
from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.names import EXPERT_FILE, expert_parameter, is_gate, model_file
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.reshaping.saved import require_experts
from mocte_ds.checkpoints.values import only_plausible, require_keys
from mocte_ds.claims import require_backed
from mocte_ds.config import MocteConfig
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.attach import AUTO, attach
from mocte_ds.moe.block import Block, BlockMode, idle_prefixes, running_state
from mocte_ds.ownership.manifest import Manifest

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights can be rounded to."""


class Source:
    """What is trained: its structure without any weights, and each weight when it is asked for."""

    def __init__(self, model: nn.Module, state: dict[str, Any], dtype: str = "fp32") -> None:
        """Take the structure.

        Args:
            model: with its blocks in their modes, all experts local; its weights are not looked at.
            state: "step", "tokens", "base" (what :func:`mocte_ds.base_model.base_facts` says of the model), "mocte"
                (None for a dense run), "blocks", "tokenizer".
            dtype: `fp32`, or one of NARROW: weights are rounded to it; gates keep their precision.
        """
        self.model, self.state, self.dtype = model, state, dtype
        self.shapes = {name: tuple(tensor.shape) for name, tensor in running_state(model).items()}
        """Of every tensor that the model computes with."""

    def read(self, name: str) -> Tensor:
        """A copy of a tensor: fp32, rounded to ``dtype``, or integers as they are.

        Raises:
            CheckpointError: the file is gone or damaged.
        """
        tensor = self.rounded(name)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    def rounded(self, name: str) -> Tensor:
        """A copy of a tensor as an export stores it: in ``dtype``, gates in fp32, integers as they are.

        Raises:
            CheckpointError: the file is gone or damaged.
        """
        tensor = self._stored(name)
        narrow = self.dtype in NARROW and not is_gate(name)
        kind = NARROW[self.dtype] if narrow else torch.float32
        copy = tensor.to(kind if tensor.is_floating_point() else tensor.dtype)
        return copy.clone() if copy is tensor and not self._stored_is_new else copy

    _stored_is_new = False
    """Whether :meth:`_stored` gives a copy that nobody else has."""

    def _stored(self, name: str) -> Tensor:
        """A tensor as it lies there; not to be changed."""
        raise NotImplementedError

    def stored_dtype(self) -> str:
        """What the weights lie there as, gates apart: `fp32` or one of NARROW; `fp32` where they differ."""
        names = [name for name, like in running_state(self.model).items() if like.is_floating_point()]
        found = {self._dtype(name) for name in names if not is_gate(name)}
        return next((name for name, kind in NARROW.items() if found == {kind}), "fp32")

    def _dtype(self, name: str) -> torch.dtype:
        return self._stored(name).dtype

    @property
    def base(self) -> dict[str, Any]:
        """What is known of the model around the blocks, as of :func:`mocte_ds.base_model.base_facts`."""
        return self.state["base"]

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in the order of the model."""
        return [module for module in self.model.modules() if isinstance(module, Block)]

    @property
    def emerged(self) -> list[Block]:
        """The blocks that run their experts."""
        return [block for block in self.blocks if block.mode is not BlockMode.WARMUP]


class CheckpointSource(Source):
    """The weights of a checkpoint on disk; only read."""

    def __init__(self, checkpoint: str | Path, dtype: str = "fp32") -> None:
        """Read everything but the weights, and check that each of them is there.

        Args:
            checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag.
            dtype: as of :class:`Source`.

        Raises:
            CheckpointError: missing, damaged or unknown files, or nothing says which model it is.
            ConfigError: settings that this version does not know.
        """
        self.folder = folder = find_tag(checkpoint)
        manifest = Manifest.read(folder)
        require_whole(folder, model_files(manifest))
        self._model_file = model_file(manifest.files)
        with only_plausible(folder):
            self._read_structure(manifest, dtype)

    def _read_structure(self, manifest: Manifest, dtype: str) -> None:
        """Everything but the weights; raises as :meth:`__init__` does, or what implausible values lead to."""
        folder = self.folder
        path = folder / self._model_file
        shared = require_keys(read_disk_tensors(path), ("module", "global_steps"), path)
        has_blocks = STATE_FILE in manifest.files
        saved = read_state(folder.parent, folder.name, None, None) if has_blocks else None
        client = saved["client_state"] if saved else shared
        if saved:
            require_experts(saved["mocte"], manifest.files, folder / STATE_FILE)
        state: dict[str, Any] = {"step": shared["global_steps"], "mocte": None, "blocks": [], "tokenizer": None}
        state["tokens"] = client.get("tokens", 0)
        self.of_a_run = "base" in client
        if self.of_a_run:
            state["tokenizer"] = client.get("tokenizer")
        refuse_decoder(client, folder)
        base = state["base"] = require_base(saved.get("base") if saved else client.get("base"), folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in shared["module"].items()}
        require_backed(base["config"], shapes, folder / STATE_FILE)
        model = empty_model(base, saved["mocte"] if saved else None, folder / STATE_FILE)
        if saved:
            mocte = saved["mocte"]
            state.update(mocte=mocte["config"], tokens=mocte["tokens"])
            state["blocks"] = [{key: entry[key] for key in ("name", "mode", "experts")} for entry in mocte["blocks"]]
        super().__init__(model, state, dtype)
        # Checkpoints of earlier versions hold what does not run, too.
        without = idle_prefixes(model)
        kept = {name: tensor for name, tensor in shared["module"].items() if not name.startswith(without)}
        self._tensors = {**kept, **self._find_experts()}
        self._require_fit(kept)

    of_a_run: bool
    """Whether launch/pretrain.py or tools/import_hf.py has written it."""

    @property
    def kept_dtype(self) -> str:
        """What an export of it is stored as if nothing is said: an imported model as it came, a trained one in fp32."""
        return self.stored_dtype() if self.state["step"] == 0 else "fp32"

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the files with weights."""
        paths = {piece.path for tensor in self._tensors.values() for piece in tensor.pieces}
        return sum(path.stat().st_size for path in paths)

    _stored_is_new = True

    def _stored(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        try:
            return tensor.read()
        except OSError as error:
            raise CheckpointError(f"{tensor.pieces[0].path} cannot be read: {error.strerror or error}.") from error

    def _dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def _find_experts(self) -> dict[str, DiskTensor]:
        """Where each expert's tensors lie.

        DeepSpeed writes one file per expert; its layer number counts the banks in the order of the model.

        Raises:
            CheckpointError: a file is missing, damaged, incomplete, another expert's, or one too many.
        """
        tensors: dict[str, DiskTensor] = {}
        blocks = [module for module in self.model.modules() if isinstance(module, Block)]
        banks = [(block, number) for block in blocks for number in range(len(block.banks))]
        known: set[str] = set()
        for layer, (block, number) in enumerate(banks):
            for k, expert in enumerate(block.banks[number].local_experts):
                path = self.folder / EXPERT_FILE.format(layer=layer, expert=k)
                known.add(path.name)
                if block.mode is BlockMode.WARMUP:
                    continue
                prefix = expert_parameter(block.name, number, k, "")
                found = require_keys(read_disk_tensors(path), (), path)
                wrong = [key for key in found if not str(key).startswith(prefix)]
                if wrong:
                    raise CheckpointError(
                        f"{path} holds {wrong[0]}, not expert {k} of {block.name}: files were mixed up."
                    )
                for name, parameter in expert.state_dict().items():
                    value: Any = found.get(prefix + name)
                    if not isinstance(value, DiskTensor) or value.shape != tuple(parameter.shape):
                        raise CheckpointError(
                            f"{path} does not hold {name} {tuple(parameter.shape)} of expert {k} of {block.name}."
                        )
                    tensors[prefix + name] = value
        strange = {path.name for path in self.folder.glob(EXPERT_FILE.format(layer="*", expert="*"))} - known
        if strange:
            raise CheckpointError(f"{self.folder} holds {min(strange)}, an expert that its {STATE_FILE} does not know.")
        return tensors

    def _require_fit(self, shared: dict[str, Any]) -> None:
        missing, unexpected = (
            [n for n in self.shapes if n not in self._tensors],
            list(self._tensors.keys() - self.shapes),
        )
        if missing or unexpected:
            raise CheckpointError(
                f"{self.folder} does not fit its own model: missing {missing[:3]}, unexpected {unexpected[:3]}."
            )
        for name, value in shared.items():
            if not isinstance(value, DiskTensor) or value.shape != self.shapes[name]:
                raise CheckpointError(f"{self.folder} does not fit its own model: {name} has another shape.")


def model_files(manifest: Manifest) -> list[str]:
    """Names of the files of a checkpoint that hold the model, and not the optimizer or random states."""
    experts = fnmatch.filter(manifest.files, EXPERT_FILE.format(layer="*", expert="*"))
    return [model_file(manifest.files), *(name for name in (STATE_FILE,) if name in manifest.files), *experts]


def empty_model(base: dict[str, Any], mocte: dict[str, Any] | None, path: Path) -> nn.Module:
    """The model of a run with its blocks in their modes, all experts local, without weights.

    Args:
        base: from :func:`mocte_ds.base_model.require_base`.
        mocte: "config" (the "mocte" block) and "blocks" ("name" and "mode" of each); None: a dense run.
        path: where those stand, for messages.

    Raises:
        CheckpointError: transformers do not make such a model, the blocks are not those that the config gives, or a
            mode is unknown.
        ConfigError: settings that this version does not know.
    """
    model = make_model(base, path)
    return model if mocte is None else with_blocks(model, mocte, path)


def with_blocks(model: nn.Module, mocte: dict[str, Any], path: Path) -> nn.Module:
    """Put the blocks of a run into a model in their modes, all experts local; what is new in them has no weights.

    Args:
        model: dense; changed in place.
        mocte: as of :func:`empty_model`.
        path: where it stands, for messages.

    Raises:
        CheckpointError: the blocks are not those that the config gives, or a mode is unknown.
        ConfigError: settings that this version does not know.
    """
    entries, config = mocte["blocks"], {**mocte["config"], "ep_size": 1}
    names = [entry.get("name") for entry in entries]
    others = CheckpointError(f"{path} lists the blocks {names}, which its own config does not give.")
    if not names or not all(isinstance(name, str) for name in names):
        raise others
    if config.get("modules") == AUTO:  # found by what FFNs compute, which weights that are not there do not tell
        config["modules"] = names
    with torch.device("meta"):
        blocks = attach(model, MocteConfig.from_dict(config))
    if names != [block.name for block in blocks]:
        raise others
    for block, entry in zip(blocks, entries, strict=True):
        try:
            block.mode = BlockMode(entry["mode"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: the mode of {block.name} is unknown ({error}).") from error
    return model
