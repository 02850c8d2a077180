"""Whether a run may write into its folder: what others put there stays, and what is read is not written."""

from pathlib import Path

from mocte_ds.data.stored_tokenizer import AnyTokenizer, other_tokenizer, tokenizer_files
from mocte_ds.errors import ConfigError
from mocte_ds.ownership import require_apart, require_ours
from mocte_ds.ownership.proof import is_checkpoint_of_ours
from mocte_ds.training.run_folder import TOOL, checkpoint_step
from mocte_ds.watch.watchdog import require_own_folder

LOGS = ("run.json", "ledger.json", "metrics.jsonl", "events.jsonl")
_WATCH = ("left_out.json", "metrics.prom")
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"


def require_out(out: Path, sources: list[Path], tokenizer: AnyTokenizer, resumed: bool, done: int, steps: int) -> None:
    """Refuse a folder where the run would write in place of something else, before any process waits for another.

    Args:
        out: the run's folder.
        sources: folders that are read: data, weights to start from, checkpoints of another run. They may lie in
            ``out``, beside what is written there.
        tokenizer: of the data, which is copied into ``out``.
        resumed: whether the run goes on from its own checkpoint. Then logs that are not shown to be its own are kept
            under another name when they have to change.
        done: steps that are done.
        steps: of the whole run.

    Raises:
        NotOurs: names what is there.
        ConfigError: a folder with the name of a checkpoint that will be written.
    """
    for source in sources:
        require_apart(out, source, inside=True)
        for part in (CHECKPOINTS, TENSORBOARD, *tokenizer_files(tokenizer)):
            require_apart(out / part, source)
    files = tokenizer_files(tokenizer)
    changed = [name for name, path in files.items() if not _same(out / name, path)]
    require_ours(out, [*(() if resumed else LOGS), *changed, *_WATCH, *other_tokenizer(out, files)], TOOL)
    require_own_folder(out)
    folder = out / CHECKPOINTS
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        step = checkpoint_step(path.name)
        if step is not None and done < step <= steps and not is_checkpoint_of_ours(path):
            raise ConfigError(
                f"{path} is there and is not, or not only, a whole checkpoint, and the run would write one of this "
                "name. Nothing was changed; move it away or remove it, or take another --out."
            )


def _same(path: Path, other: Path) -> bool:
    plain = path.is_file() and not path.is_symlink()
    return plain and path.read_bytes() == other.read_bytes()
