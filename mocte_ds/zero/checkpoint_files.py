"""DeepSpeed's checkpoint files, collected for our saver instead of pickled, and read without executing code."""

import contextlib
import glob
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.utils.tensor_fragment import fragment_address

from mocte_ds.checkpoints.files import put_file
from mocte_ds.checkpoints.names import EXPERT_FILE, is_other_cut, tensor_ranks_of, uncut_expert_file
from mocte_ds.checkpoints.place import Place
from mocte_ds.checkpoints.random_states import RANDOM_FILE, random_states
from mocte_ds.checkpoints.reshaping.rank_layout import RankLayout
from mocte_ds.checkpoints.reshaping.reshaped import Reshaped
from mocte_ds.checkpoints.reshaping.saved import SavedCheckpoint
from mocte_ds.checkpoints.save import Saver
from mocte_ds.checkpoints.values import from_plain, only_plausible, read_plain, to_plain
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.dist.mesh import Axis, Mesh
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.ownership.manifest import Manifest
from mocte_ds.secret_keys import without_secrets

_CONFIG = "ds_config"
"""Key under which DeepSpeed keeps its config in each of its files."""
# Objects that DeepSpeed's ZeRO optimizers put into their state.
_CLASSES = {kind.__name__: kind for kind in (DynamicLossScaler, LossScaler, fragment_address)}


class CheckpointFiles(CheckpointEngine):
    """What a DeepSpeed engine hands its files to, and reads them from; :func:`use_checkpoint_files` puts it in."""

    def __init__(self, mesh: Mesh, engine: Any = None) -> None:
        """Make it for an engine and its ranks; without an engine it reads and collects single files."""
        super().__init__()
        self.name, self._engine, self._mesh = "mocte_ds", engine, mesh
        self.saver = Saver(mesh.world)
        """Writes the checkpoints."""
        self.always: dict[str, bytes] = {}
        """Further files of every checkpoint, by name; rank zero's are written."""
        self.note: str | None = None
        """How the checkpoint that was loaded last was brought into the run's layout; None where it had it already."""
        self._collected: dict[str, Any] | None = None
        self._reshaped: Reshaped | None = None
        self._unborn: set[str] = set()
        """Names that files of experts would have which have not emerged in the checkpoint that is loaded."""
        self._copy = False
        self._refused: CheckpointError | None = None
        self._writers: Iterator[int] = iter(())

    def save_checkpoint(
        self,
        deepspeed_save: Callable[[dict[str, Any]], Any],
        save_dir: str | Path,
        tag: str,
        step: int,
        client_state: Mapping[str, Any],
        own: Callable[[], dict[str, Any]],
        save_latest: bool = True,
        asynchronous: bool = False,
    ) -> None:
        """Write DeepSpeed's files and ours as one checkpoint (collective).

        Args:
            deepspeed_save: DeepSpeed's save with a client state; its files go through :meth:`save`.
            save_dir: folder of all checkpoints.
            tag: name of this one.
            step: optimizer steps that are done.
            client_state: the caller's own values.
            own: makes this rank's further files, after DeepSpeed's; an entry "mocte" of the random states' file is left
                out, with a warning, where it is not plain.
            save_latest: whether `latest` moves.
            asynchronous: copy everything to CPU memory and return; threads write it.

        Raises:
            CheckpointError: on all ranks; no checkpoint that was there before was touched.
        """
        self.saver.wait()  # before the memory for another copy is taken
        Place(Path(save_dir), tag)
        client = to_plain(dict(client_state), "client_state", asynchronous)
        files: dict[str, Any] = {}
        self._collected, self._copy, self._refused = files, asynchronous, None
        try:
            deepspeed_save(client)
        finally:
            self._collected = None
        try:
            for name, content in own().items():
                files[name] = to_plain(content, name, asynchronous)
        except CheckpointError as error:
            self._refused = self._refused or error
        reason = str(self._refused) if self._refused else None
        refused = [text for text in gather_objects(reason, self._mesh.world) if text]
        if refused:
            raise CheckpointError(f"could not save the checkpoint {Path(save_dir) / tag}: {refused[0]}")
        if self._mesh.world.rank == 0:
            files.update(self.always)
        self.saver.save(save_dir, tag, files, step, save_latest, asynchronous)

    @contextlib.contextmanager
    def reading(self, folder: Path, manifest: Manifest, ep_size: int = 1) -> Iterator[Callable[[Path], Any]]:
        """Let DeepSpeed load a checkpoint, which is reshaped on the way if its layout is not the run's.

        Args:
            folder: of the checkpoint.
            manifest: of the checkpoint, whose files agree with it.
            ep_size: of the run.

        Yields:
            What gives the content of one of its files.

        Raises:
            CheckpointError: of another data type, or of an architecture that cannot be brought into the run's layout.
        """
        self.saver.run = manifest.run
        with only_plausible(folder):
            written = SavedCheckpoint(folder, manifest)
        experts = range(written.num_experts)
        banks = set(range(len(written.blocks) * written.banks)) - set(written.born)
        self._unborn = {EXPERT_FILE.format(layer=bank, expert=k) for bank in banks for k in experts}
        if self._engine.zero_optimization_partition_weights():  # refused before, where the layout is another one
            yield self._read
            return
        data, tensor = self._mesh.data, self._mesh.tensor
        with only_plausible(folder):
            cut_over = tensor_ranks_of(manifest.files)
            if cut_over > 1 or tensor.size > 1:
                self._require_same_cut(written, cut_over, ep_size)
                yield self._read
                return
        layout = RankLayout(data.size, ep_size, self._engine._config.use_data_before_expert_parallel_)
        with only_plausible(folder):
            written.require_precision(self._engine.bfloat16_enabled())
            self._reshaped = Reshaped(written, layout, data.rank)
            self.note = self._reshaped.note(self._engine.train_batch_size())
        if self.note and self._mesh.world.rank == 0:
            logging.getLogger("mocte_ds").warning(self.note)
        try:
            yield self._read
        finally:
            self._reshaped = None

    def _require_same_cut(self, written: SavedCheckpoint, cut_over: int, ep_size: int) -> None:
        """Refuse a checkpoint of another layout where matrices are cut.

        Its weights are whole, but the optimizer's files hold parts of them.
        """
        mesh, first = self._mesh, self._engine._config.use_data_before_expert_parallel_
        saved = (written.manifest.world_size, cut_over, written.state and written.state["mocte"]["config"]["ep_size"])
        own = (mesh.world.size, mesh.tensor.size, ep_size)
        named = "{} ranks with tensor_parallel.autotp_size {} and ep_size {}"
        if saved != own or written.model["ds_config"].get("use_data_before_expert_parallelism", False) != first:
            raise CheckpointError(
                f"the checkpoint {written.folder} was saved by {named.format(*saved)}, this run has "
                f"{named.format(*own)}. With cut matrices the optimizer's state stays in its layout: resume as "
                f"it was saved, or begin a run with its weights, in any layout (model.init: {written.folder} in a run "
                "file)."
            )
        written.require_precision(self._engine.bfloat16_enabled())

    def _read(self, path: Path) -> Any:
        reshaped = self._reshaped
        return reshaped.read(path.name) if reshaped and path.parent == reshaped.written.folder else read_plain(path)

    def _fit(self, state: dict[str, Any], path: Path) -> None:
        """Refuse another optimizer's state, and complete one that another implementation of Adam has written.

        Optimizers take whatever has the right length; the moments of the wrong parameter would go unnoticed.
        """
        optimizer: Any = getattr(self._engine, "optimizer", None)
        if "param_slice_mappings" not in state or not hasattr(optimizer, "_param_slice_mappings"):
            return
        saved_groups, own_groups = state["param_slice_mappings"], optimizer._param_slice_mappings
        if saved_groups != own_groups:
            pairs = zip(saved_groups, own_groups, strict=False)
            names = [n for saved, own in pairs for n in {**saved, **own} if saved.get(n) != own.get(n)]
            where = f"{names[0]} elsewhere than" if names else f"{len(saved_groups)} parameter groups, unlike"
            raise CheckpointError(
                f"{path} has {where} this run's optimizer: the checkpoint is of another model or of other parameter "
                "groups, or its files were mixed up."
            )
        base = state["base_optimizer_state"]
        if isinstance(base, dict):
            for saved, own in zip(base["param_groups"], optimizer.optimizer.param_groups, strict=True):
                if "rate" in own and "rate" not in saved:  # earlier versions had trained routers among the others
                    saved.update({name: own[name] for name in ("options", "weight_decay")})
                saved.update({name: value for name, value in own.items() if name not in saved})

    @contextlib.contextmanager
    def taking_turns(self, writers: Sequence[int]) -> Iterator[None]:
        """Context manager for DeepSpeed's save of experts: the ranks that hold the same ones share the writing.

        Args:
            writers: for each bank in the order of the model, which of these ranks writes its experts.
        """
        self._writers = iter(writers)
        try:
            yield
        finally:
            self._writers = iter(())

    # ---- what DeepSpeed calls --------------------------------------------------------------------------------------

    def create(self, info: CheckpointCommitInfo) -> None:
        """Called by DeepSpeed when it starts to save: nothing to do."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Called by DeepSpeed for a folder; for a checkpoint the saver makes its own."""
        if self._collected is None:
            Path(path).mkdir(parents=True, exist_ok=True)

    def save(self, state_dict: Any, path: str) -> None:
        """Keep the content of one of DeepSpeed's files, or write one that is not of a checkpoint (save_16bit_model).

        Raises:
            CheckpointError: it could not be written, or holds a value that is not plain.
            NotOurs: a file lies there that this did not write.
        """
        name = Path(path).name
        if isinstance(state_dict, dict) and _CONFIG in state_dict:
            state_dict = {**state_dict, _CONFIG: without_secrets(state_dict[_CONFIG])}
        if self._collected is None:
            try:
                put_file(Path(path), to_plain(state_dict, name, classes=_CLASSES), "DeepSpeed")
            except (OSError, RuntimeError) as error:
                raise CheckpointError(
                    f"could not write {path}: {error}. Make room or choose another folder."
                ) from error
            return
        if is_other_cut(name):
            return  # the first tensor rank has written all of the model
        name = uncut_expert_file(name)
        try:
            self._collected[name] = to_plain(state_dict, name, self._copy, _CLASSES)
        except CheckpointError as error:  # raised after DeepSpeed's barriers, on all ranks
            self._refused = self._refused or error

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether a rank writes what DeepSpeed has come to: each bank in turn, and then what the first one writes."""
        return dp_rank == next(self._writers, 0)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Content of one of DeepSpeed's files, in CPU memory; nothing in it is executed."""
        path = str(Path(path).with_name(uncut_expert_file(Path(path).name)))
        if Path(path).name in self._unborn:
            return {}
        content = from_plain(self._read(Path(path)), _CLASSES)
        if isinstance(content, dict) and isinstance(content.get("optimizer_state_dict"), dict):
            self._fit(content["optimizer_state_dict"], Path(path))
        return content

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Called by DeepSpeed when it has handed over everything."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """False: DeepSpeed need not copy tensors that are views; :func:`to_plain` does."""
        return False


def own_files(world: Axis, rank_state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Content of this rank's file of random states, with the part of the controller's state that only this rank has.

    Args:
        world: all ranks, each of which has a file.
        rank_state: of the controller; None: there is none.
    """
    states = random_states()
    if rank_state:
        try:
            states["mocte"] = to_plain(rank_state, "the controller's state of this rank")
        except CheckpointError as error:
            warnings.warn(
                f"{error} It is left out of the checkpoint: a resumed run collects its samples anew.", stacklevel=2
            )
    return {RANDOM_FILE.format(rank=world.rank): states}


def use_checkpoint_files(engine: Any, mesh: Mesh) -> CheckpointFiles:
    """Let a DeepSpeed engine save and load through files that hold values only.

    Args:
        engine: of DeepSpeed, or ours.
        mesh: of its ranks.

    Raises:
        ConfigError: settings of DeepSpeed that bypass them.
    """
    settings = engine._config.checkpoint_config
    if settings.get("writer") is not None or engine._config.datastates_config.enabled:
        raise ConfigError(
            "checkpoint.writer and datastates are not supported: mocte_ds writes checkpoints; remove them."
        )
    if engine.use_node_local_storage():
        raise ConfigError(
            "checkpoint.use_node_local_storage is not supported: a checkpoint is one folder in a file system that all "
            "hosts share; remove it."
        )
    if engine.load_universal_checkpoint():
        raise ConfigError("checkpoint.load_universal is not supported: DeepSpeed unpickles such files; remove it.")
    files = CheckpointFiles(mesh, engine)
    engine.checkpoint_engine = files
    # It would be code that nobody verifies; `python -m deepspeed.utils.zero_to_fp32` is the same script.
    engine._copy_recovery_script = lambda save_path: None
    # DeepSpeed takes names with [ ] * ? in them for patterns, and would load files of other folders that match.
    matching = engine._get_all_ckpt_names
    # It takes as many as there are tensor ranks, or would merge or cut them as Megatron's; ours is whole.
    engine._get_all_ckpt_names = lambda folder, tag: (
        matching(glob.escape(str(folder)), glob.escape(str(tag))) * mesh.tensor.size
    )
    return files
