"""Reads files out of wheels, npm's tarballs and Debian's packages in memory: nothing is unpacked, installed or run."""

import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mocte_ds.errors import DataError

_DEB, _ENTRY = b"!<arch>\n", 60
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError)
_LARGEST = 512 << 20
"""Bytes of one file in a package: a damaged one may claim any number."""


def read_members(path: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """Files in a package, in the order of the archive.

    Args:
        path: `.whl`, `.tgz`, `.deb`, or a folder, whose files come in alphabetical order.
        wanted: regular expression that the whole name of a file matches, from the archive's root on.

    Yields:
        Name and content.

    Raises:
        DataError: it is none of these, or damaged.
    """
    match = re.compile(wanted).fullmatch
    try:
        if path.is_dir():
            files = ((p.relative_to(path).as_posix(), p) for p in sorted(path.rglob("*")) if p.is_file())
            yield from ((name, file.read_bytes()) for name, file in files if match(name))
        elif path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if match(entry.filename):
                        _require_size(path, entry.filename, entry.file_size)
                        yield entry.filename, archive.read(entry)
        elif path.suffix == ".tgz":
            with tarfile.open(path, "r|gz") as tar:
                yield from _members(path, tar, match)
        elif path.suffix == ".deb":
            with path.open("rb") as file, _data_of(path, file) as tar:
                yield from _members(path, tar, match)
        else:
            raise DataError(f"{path} is not a wheel, npm tarball or Debian package.")
    except (*_DAMAGE, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no package: {error}; download it again.") from error


def _members(path: Path, tar: tarfile.TarFile, match: Any) -> Iterator[tuple[str, bytes]]:
    for entry in tar:
        name = entry.name.removeprefix("./")
        if entry.isfile() and match(name):
            _require_size(path, name, entry.size)
            content = tar.extractfile(entry)
            assert content is not None
            yield name, content.read()


def _data_of(path: Path, file: IO[bytes]) -> tarfile.TarFile:
    """The tarball of a Debian package's files; the package is an `ar` archive (deb(5))."""
    if file.read(len(_DEB)) != _DEB:
        raise DataError(f"{path} is not a Debian package.")
    while len(head := file.read(_ENTRY)) == _ENTRY:
        name, size = head[:16].decode("ascii").strip().rstrip("/"), int(head[48:58])
        if name.startswith("data.tar"):
            content: IO[bytes] = io.BytesIO(file.read(size))
            if not name.endswith(".zst"):
                return tarfile.open(fileobj=content, mode="r|*")
            import pyarrow

            return tarfile.open(fileobj=pyarrow.CompressedInputStream(content, "zstd"), mode="r|")
        file.seek(size + size % 2, io.SEEK_CUR)
    raise DataError(f"{path} has no data.tar; download it again.")


def _require_size(path: Path, name: str, size: int) -> None:
    if size > _LARGEST:
        raise DataError(f"{path}: {name} has {size} bytes, more than {_LARGEST}.")
