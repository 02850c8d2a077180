"""The list of a checkpoint's files with their hashes, which also proves that the files are ours."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mocte_ds.errors import CheckpointError
from mocte_ds.json_files import parse_json, read_text
from mocte_ds.ownership.durable import replace_text
from mocte_ds.ownership.facts import FileFacts
from mocte_ds.paths import is_file_name

FORMAT = 2
MANIFEST_FILE = "mocte_manifest.json"
_BEGINNING = b'{\n "format": '  # of every manifest


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    run: str
    """Unique name of the run, kept when it is resumed."""
    step: int
    """Optimizer steps that are done."""
    world_size: int
    """Ranks that wrote it."""
    files: dict[str, FileFacts]
    """Every file of the folder but this one."""

    def write(self, folder: Path) -> None:
        """Write it into a folder, onto the disk."""
        replace_text(folder / MANIFEST_FILE, self._text())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: it is missing, damaged or of another format.
        """
        path = folder / MANIFEST_FILE
        if not os.path.lexists(path):
            raise CheckpointError(
                f"{path} is missing: {folder} is not a whole checkpoint of this version (format {FORMAT}); what "
                f"version 0.1.0 wrote has none. Write the name of another checkpoint into {folder.parent / 'latest'}."
            )
        try:
            text = read_text(path, kind=CheckpointError)
            values = parse_json(text, "it", CheckpointError, foreign=True)  # what it claims is looked at below
            found = values["format"]
        except (CheckpointError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {type(error).__name__}: {error}{_moved_manifest(folder)}"
            ) from error
        if found != FORMAT:
            raise CheckpointError(f"{path} has format {found!r}; this version reads format {FORMAT}.")
        try:
            files = {name: FileFacts(facts["bytes"], facts["sha256"]) for name, facts in values["files"].items()}
            manifest = cls(values["run"], values["step"], values["world_size"], files)
            same = manifest._text() == text
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
        if not same:
            raise CheckpointError(f"{path} was changed after it was written: it does not agree with its own checksum.")
        manifest._require_possible(path)
        return manifest

    def _require_possible(self, path: Path) -> None:
        """Refuse values that no save writes: whoever changes a manifest can give it a new checksum."""
        changed = f"{path} was changed after it was written:"
        for name, facts in self.files.items():
            if not is_file_name(name):
                raise CheckpointError(f"{changed} {name!r:.80} is not the name of a file.")
            if not _is_count(facts.bytes, 0) or not isinstance(facts.sha256, str):
                raise CheckpointError(f"{changed} it does not say how long {name} is and which sha256 it has.")
        if not isinstance(self.run, str) or not _is_count(self.step, 0) or not _is_count(self.world_size, 1):
            raise CheckpointError(
                f"{changed} run {self.run!r:.80}, step {self.step!r:.80}, world_size {self.world_size!r:.80}."
            )
        # Every rank writes a file at least, so that nothing is built for ranks that only the number has.
        if self.world_size > max(1, len(self.files)):
            raise CheckpointError(f"{changed} world_size is {self.world_size:.0f}, with {len(self.files)} files.")

    def _text(self) -> str:
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        values = {"format": FORMAT, "run": self.run, "step": self.step, "world_size": self.world_size, "files": files}
        checksum = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        return json.dumps({**values, "checksum": checksum}, indent=1) + "\n"


def _moved_manifest(folder: Path) -> str:
    """A sentence that names the file which looks like the manifest; nothing where there is none."""
    try:
        for path in sorted(folder.iterdir()):
            if path.name != MANIFEST_FILE and path.is_file():
                with open(path, "rb") as file:
                    if file.read(len(_BEGINNING)) == _BEGINNING:
                        return f" {path.name} holds a manifest: files were mixed up."
    except OSError:
        pass
    return ""


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 63
