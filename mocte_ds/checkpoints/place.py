"""Where checkpoints lie on the disk, and the few renames by which a new one takes its place whole or not at all."""

import contextlib
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from mocte_ds.checkpoints.names import MODEL_FILE
from mocte_ds.errors import CheckpointError, NotOurs
from mocte_ds.ownership import workshop
from mocte_ds.ownership.durable import sync_folder, write_new
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest
from mocte_ds.ownership.marker import Marker
from mocte_ds.ownership.proof import LONGEST_NAME, is_checkpoint_of_ours, is_pointer
from mocte_ds.shown import shown

PARTIAL, REPLACED = ".{}.mocte-partial", ".{}.mocte-replaced"
_LEFTOVER = re.compile(r"\.(.+)\.mocte-(partial|replaced)")
_ROOM = 1 << 20  # bytes for what is not counted: file headers, the manifest
_PATIENCE = 10.0  # seconds until a new folder must be seen by all ranks


@dataclass(frozen=True)
class Place:
    """One checkpoint's place in the folder of all checkpoints."""

    root: Path
    tag: str
    _held: list[int] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_tag(self.tag)

    @property
    def final(self) -> Path:
        """Where the checkpoint lies when it is whole."""
        return self.root / self.tag

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return self.root / PARTIAL.format(self.tag)

    @property
    def replaced(self) -> Path:
        """Where an older one of the same name lies for the moment in which it is replaced."""
        return self.root / REPLACED.format(self.tag)

    def prepare(self, needed: int) -> None:
        """Make the empty folder that is written to; what killed saves left is removed.

        Args:
            needed: bytes that all ranks will write.

        Raises:
            CheckpointError: the disk has less room.
            CheckpointError: something else than a checkpoint of ours has the name, or is called `latest`.
            OSError: the folder cannot be made.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.root)
        self._require_ours()
        free = shutil.disk_usage(self.root).free
        if needed + _ROOM > free:
            raise CheckpointError(
                f"could not save the checkpoint {self.final}: it needs {(needed + _ROOM) / 1e6:.0f} MB and "
                f"{free / 1e6:.0f} MB are free there. Nothing was written. {last_good(self.root)}"
            )
        self.partial.mkdir()
        self._held.append(workshop.hold(self.partial, wait=True))
        try:
            workshop.begin(self.partial)
            sync_folder(self.root)
        except BaseException:
            self.give_up()
            raise

    def _require_ours(self) -> None:
        if self.partial.is_dir() and workshop.is_in_use(self.partial):
            raise CheckpointError(
                f"could not save the checkpoint {self.final}: another save writes it at this moment. Nothing was "
                "changed; wait for it, or save to another folder."
            )
        for path in (self.final, self.partial, self.replaced):
            if os.path.lexists(path) and not is_checkpoint_of_ours(path):
                raise CheckpointError(
                    f"could not save the checkpoint {self.final}: {path} is there and is not, or not only, what a "
                    f"save wrote. Nothing was changed there; move it away or remove it. {last_good(self.root)}"
                )
        latest = self.root / "latest"
        if os.path.lexists(latest) and not is_pointer(latest):
            raise CheckpointError(
                f"could not save the checkpoint {self.final}: {latest} is not the name of a checkpoint. Nothing was "
                "changed; move it away, or save to another folder."
            )

    def require_seen(self) -> None:
        """Raise CheckpointError where this rank does not see the folder that rank zero made."""
        deadline = time.monotonic() + _PATIENCE
        # Listing asks a network file system anew; looking for one name may be answered from what it remembers.
        while not (self.root.is_dir() and self.partial.name in os.listdir(self.root)):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"a rank does not see {self.partial}, which rank 0 made: checkpoints need a folder in a file "
                    "system that all hosts share."
                )
            time.sleep(0.05)

    def swap_in(self) -> None:
        """Give the finished folder its name.

        An older one of this name steps aside first, where readers still find it, until :meth:`settle`.
        """
        if self.final.exists():
            os.rename(self.final, self.replaced)
        os.rename(self.partial, self.final)
        sync_folder(self.root)

    def move_latest(self) -> None:
        """Let `latest` name this checkpoint."""
        with workshop.workshop(self.root) as work:
            write_new(work / "latest", self.tag.encode())
            os.replace(work / "latest", self.root / "latest")
        sync_folder(self.root)

    def settle(self) -> None:
        """Say that the save is done, `latest` included; the older checkpoint of this name goes."""
        workshop.end(self.final)
        workshop.discard(self.replaced)
        self._let_go()

    def give_up(self) -> None:
        """Remove what was written."""
        workshop.discard(self.partial)
        self._let_go()

    def _let_go(self) -> None:
        while self._held:
            os.close(self._held.pop())


def require_tag(tag: str) -> None:
    """Refuse a name that no checkpoint can have: `latest` holds it, and would not be taken for one of ours.

    Raises:
        CheckpointError: says what a name may be.
    """
    wrong = not tag or Path(tag).name != tag or tag.startswith(".") or any(sign.isspace() for sign in tag)
    if wrong or not tag.isprintable() or len(PARTIAL.format(tag).encode()) > LONGEST_NAME:
        raise CheckpointError(
            f"a checkpoint cannot be named {shown(tag)}: take a name without '/' and white space, no dot first, and of "
            f"at most {LONGEST_NAME - len(PARTIAL.format(''))} bytes, e.g. 'step100'."
        )


def remove_leftovers(root: Path) -> None:
    """Tidy up after saves that were killed; a checkpoint that was being replaced comes back.

    Saves under way, also those of other processes, and others' files stay.
    """
    for path in sorted(root.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if not found or path.is_symlink() or not path.is_dir():
            continue
        if found[2] == "replaced" and not (root / found[1]).exists():
            os.rename(path, root / found[1])
        elif workshop.is_in_use(path):
            continue
        elif workshop.is_unfinished_work(path) or is_checkpoint_of_ours(path):
            workshop.discard(path)


def find_checkpoint(root: Path, tag: str) -> Path | None:
    """Folder of a checkpoint, also of one that a killed save was about to replace; None: not there."""
    if tag in ("", ".", "..") or Path(tag).name != tag:
        return None
    for name in (tag, REPLACED.format(tag)):
        with contextlib.suppress(OSError):  # a name that is too long
            if (root / name).is_dir():
                return root / name
    return None


def is_unsettled(folder: Path) -> bool:
    """Whether a checkpoint got its name, and the save was killed before `latest` named it or a moment later."""
    with contextlib.suppress(NotOurs):
        marker = Marker.read(folder)
        return marker is not None and marker.work == PARTIAL.format(folder.name)
    return False


def resolve_tag(load_dir: str | Path) -> str | None:
    """Name of the last good checkpoint's folder, None where there is none.

    Raises:
        CheckpointError: `latest` is damaged, names a folder that does not exist, or is missing beside a checkpoint.
    """
    latest = Path(load_dir) / "latest"
    if not os.path.isfile(latest):
        _require_nothing_to_name(latest)
        return None
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{latest} cannot be read: {error}; write the name of a checkpoint into it.") from error
    # An empty name would be the folder itself, and the run would start anew as if there were no checkpoint.
    folder = find_checkpoint(Path(load_dir), tag)
    if folder is None:
        raise CheckpointError(
            f"{latest} names the checkpoint '{tag[:100]}', which is not there; write another tag into it."
        )
    return folder.name


def _require_nothing_to_name(latest: Path) -> None:
    """Refuse a folder whose `latest` was lost: a run would begin again over the checkpoints."""
    found = sorted((step, path.name) for path in _folders(latest.parent) if (step := _settled_step(path)) is not None)
    if not os.path.lexists(latest) and not found:
        return
    if os.path.isfile(latest):
        return  # a save has ended meanwhile
    what = "is not a file" if os.path.lexists(latest) else "is missing"
    advice = f"write {found[-1][1]} into it to go on from there" if found else "remove it"
    names = f", and {latest.parent} holds {', '.join(name for _, name in found[-3:])}" if found else ""
    raise CheckpointError(f"{latest} {what}{names}: {advice}, or name another folder. Nothing was changed.")


def _folders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []


def _settled_step(folder: Path) -> int | None:
    """The step of a checkpoint whose save was done."""
    if not os.path.isfile(folder / MANIFEST_FILE) or is_unsettled(folder):
        return None
    with contextlib.suppress(CheckpointError):
        return Manifest.read(folder).step
    return None


def find_tag(checkpoint: str | Path) -> Path:
    """The folder of one checkpoint, from itself or from the folder of all checkpoints.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(checkpoint).absolute()
    if os.path.isfile(folder / MANIFEST_FILE) or os.path.isfile(folder / MODEL_FILE):
        return folder
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a folder; name a run's checkpoints folder, or one tag in it.")
    tag = resolve_tag(folder)
    if tag is None:
        raise CheckpointError(f"{folder} is not a checkpoint: neither a file 'latest' nor {MODEL_FILE} is there.")
    return folder / tag


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, or has a latest one."""
    return any(os.path.isfile(folder / name) for name in (MANIFEST_FILE, MODEL_FILE, "latest"))


def last_good(root: Path) -> str:
    """A sentence that says which checkpoint a run can go on from."""
    name = None
    with contextlib.suppress(CheckpointError):
        name = resolve_tag(root)
    return (
        f"The last good checkpoint ({name or 'none'}) is untouched; make room or choose another folder, and start "
        "again: the run resumes from it."
    )
