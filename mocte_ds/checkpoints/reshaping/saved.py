"""What a checkpoint on the disk is: its layout, its files by kind, and whether this version knows all of them."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.disk_tensors import read_disk_tensors
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.names import (
    CONVERTERS_FILE,
    EXPERT_NAME,
    MODEL_FILE,
    OPTIMIZER_FILE,
    OPTIMIZER_NAME,
    model_file,
    tensor_ranks_of,
)
from mocte_ds.checkpoints.random_states import RANDOM_FILE, RANDOM_NAME
from mocte_ds.checkpoints.reshaping.rank_layout import RankLayout
from mocte_ds.checkpoints.values import require_keys
from mocte_ds.config import MocteConfig
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import BlockMode
from mocte_ds.ownership.manifest import Manifest


def require_experts(mocte: dict[str, Any], files: Iterable[str], path: Path) -> None:
    """Refuse a number of experts that nothing in the checkpoint bears out, before anything is built for them.

    Blocks list their experts one by one; those that have been born have files.

    Args:
        mocte: what the file of the blocks says.
        files: names of all files of the checkpoint.
        path: of that file, for the message.

    Raises:
        CheckpointError: names the numbers.
    """
    config = mocte["config"]
    count, experts, banks = sum(1 for _ in filter(EXPERT_NAME.fullmatch, files)), config["num_experts"], 1
    if isinstance(config.get("banks"), list):
        banks = len(config["banks"])
    listed = max([len(block["experts"]) for block in mocte["blocks"]], default=0)
    if type(experts) is not int or not 1 <= experts * banks <= max(count, listed):
        raise CheckpointError(
            f"{path} has {experts!r:.80} experts in {banks} banks, with {listed} experts in a block and files of "
            f"{count} experts."
        )


def is_born(block: dict[str, Any]) -> bool:
    """Whether the experts of a block have emerged, as its state says: earlier there are no files of them."""
    return block["mode"] != BlockMode.WARMUP.value


class SavedCheckpoint:
    """A checkpoint without its numbers; only read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Read our own file.

        Args:
            folder: of one checkpoint.
            manifest: of the folder; its files agree with it.

        Raises:
            CheckpointError: our own file cannot be read.
        """
        self.folder, self.manifest = folder, manifest
        self.state: dict[str, Any] | None = None
        """Content of our own file; None for a run without blocks."""
        if STATE_FILE in manifest.files:
            path = folder / STATE_FILE
            self.state = require_keys(read_disk_tensors(path), ("mocte",), path)
            require_keys(self.state["mocte"], ("config", "blocks", "tokens"), path)
            require_keys(self.state["mocte"]["config"], ("num_experts", "ep_size"), path)
            require_experts(self.state["mocte"], manifest.files, path)
        found = [match for match in map(OPTIMIZER_NAME.fullmatch, manifest.files) if match]
        self.precision: str | None = found[0][1] or "" if found else None
        """`bf16_` or nothing: how the names of the optimizer's files start; None where it has no files of its own."""

    @functools.cached_property
    def weights_alone(self) -> dict[str, Any] | None:
        """Content of the file with the weights, if no engine has written it; else None."""
        content = read_disk_tensors(self.folder / model_file(self.manifest.files))
        known = isinstance(content, dict) and {"module", "global_steps"} <= content.keys()
        return content if self.precision is None and known and "ds_config" not in content else None

    @functools.cached_property
    def model(self) -> dict[str, Any]:
        """Content of the file with the weights outside of the experts.

        Raises:
            CheckpointError: it cannot be read.
        """
        self._require_engine()
        needed = ("module", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config")
        path = self.folder / model_file(self.manifest.files)
        return require_keys(read_disk_tensors(path), needed, path)

    def _require_engine(self) -> None:
        if self.weights_alone is not None:
            raise CheckpointError(
                f"{self.folder} holds weights alone, as tools/import_hf.py writes them: name it as model.init of a "
                "run, with any number of ranks."
            )

    @functools.cached_property
    def layout(self) -> RankLayout:
        """How it is spread over ranks.

        Raises:
            CheckpointError: experts and ranks do not fit each other.
        """
        ranks = self.manifest.world_size
        if self.state is None:
            return RankLayout(ranks)
        config, ds_config = self.state["mocte"]["config"], self.model["ds_config"]
        first = isinstance(ds_config, dict) and bool(ds_config.get("use_data_before_expert_parallelism"))
        ep_size, experts = config["ep_size"], config["num_experts"]
        if not isinstance(ep_size, int) or ep_size < 1 or ranks % ep_size or experts % ep_size:
            raise CheckpointError(
                f"{self.folder / STATE_FILE} has ep_size {ep_size!r}, which does not fit {ranks} ranks and {experts} "
                "experts."
            )
        return RankLayout(ranks, ep_size, first)

    def optimizer_file(self, rank: int) -> str:
        """Name of a rank's part of the optimizer."""
        return OPTIMIZER_FILE.format(precision=self.precision, rank=rank)

    @property
    def batch(self) -> int | None:
        """Sequences of a global batch, where all steps had as many."""
        steps, samples = self.model["global_steps"], self.model["global_samples"]
        return samples // steps if steps and samples % steps == 0 else None

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """State of each block; none in a run without blocks."""
        return self.state["mocte"]["blocks"] if self.state else []

    @property
    def has_open_check(self) -> bool:
        """Whether a check has measured, and not decided yet."""
        return bool(self.state and self.state["mocte"].get("check"))

    @property
    def num_experts(self) -> int:
        """Experts of a bank; 1 where there are none."""
        return self.state["mocte"]["config"]["num_experts"] if self.state else 1

    @property
    def banks(self) -> int:
        """Banks of a block."""
        return len(self.state["mocte"]["config"].get("banks") or [None]) if self.state else 0

    @property
    def born(self) -> list[int]:
        """Numbers of the banks, in the order of the model, whose experts have emerged."""
        return [
            b * self.banks + bank for b, block in enumerate(self.blocks) if is_born(block) for bank in range(self.banks)
        ]

    @property
    def idle(self) -> tuple[str, ...]:
        """What the names of weights begin with that nothing runs with; only earlier versions have kept them."""
        if self.state is None:
            return ()
        replaced = MocteConfig.from_dict(self.state["mocte"]["config"]).expert.kind == "ffn"
        found = []
        for block in self.blocks:
            if not is_born(block):
                found += [f"{block['name']}.banks.{bank}.deepspeed_moe.experts." for bank in range(self.banks)]
            elif replaced:
                found.append(f"{block['name']}.dense.")
        return tuple(found)

    def require_precision(self, bf16: bool) -> None:
        """Refuse a checkpoint whose model had another data type.

        Raises:
            CheckpointError: names both.
        """
        if self.precision is not None and bool(self.precision) != bf16:
            raise CheckpointError(
                f"the checkpoint {self.folder} was written with bf16.enabled = {str(not bf16).lower()}, the run has "
                f"{str(bf16).lower()}; use the checkpoint's."
            )

    def require_batch(self, ranks: int) -> None:
        """Refuse a number of ranks that the global batch cannot be shared by: it would become another one.

        Raises:
            CheckpointError: names both numbers.
        """
        if self.batch is not None and self.batch % ranks:
            raise CheckpointError(
                f"{ranks} ranks do not divide the global batch of {self.batch} sequences of the checkpoint "
                f"{self.folder}."
            )

    def require_supported(self) -> None:
        """Refuse what cannot be brought into another layout.

        Raises:
            CheckpointError: files are missing or too many, of an architecture that is not supported, or mixed up.
        """
        self._require_engine()
        if (cut_over := tensor_ranks_of(self.manifest.files)) > 1:
            raise CheckpointError(
                f"{self.folder} was saved with tensor_parallel.autotp_size {cut_over}: its optimizer's files hold "
                "parts of matrices, and stay in their layout. Its weights are whole: tools/export_hf.py."
            )
        ranks, kinds = self.manifest.world_size, (EXPERT_NAME, OPTIMIZER_NAME, RANDOM_NAME)
        expected = {MODEL_FILE, *(RANDOM_FILE.format(rank=rank) for rank in range(ranks))}
        if self.precision is not None:
            expected.update(self.optimizer_file(rank) for rank in range(ranks))
        for name in sorted(self.manifest.files.keys() - expected - {STATE_FILE, CONVERTERS_FILE}):
            if any(kind.fullmatch(name) for kind in kinds[1:]):
                raise CheckpointError(
                    f"{self.folder / name} is of a rank that the checkpoint of {ranks} ranks does not have: files of "
                    "two checkpoints were mixed up."
                )
            if not EXPERT_NAME.fullmatch(name) and not name.endswith(".json"):
                raise CheckpointError(
                    f"{self.folder / name} is of an architecture that is not supported: only ZeRO stages 0 to 2 with "
                    "data and expert parallelism can be brought into another layout."
                )
        for name in sorted(expected - self.manifest.files.keys()):
            raise CheckpointError(f"{self.folder / name} is missing: the checkpoint is incomplete.")
        if self.model["dp_world_size"] != ranks or self.model["mp_world_size"] != 1:
            raise CheckpointError(
                f"{self.folder / MODEL_FILE} is of {self.model['dp_world_size']} data-parallel and "
                f"{self.model['mp_world_size']} model-parallel ranks, the checkpoint of {ranks} data-parallel ones: "
                "files were mixed up, or tensor or pipeline parallelism was used, which is not supported."
            )
