"""Archives of the three registries' forms, made of a few files."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow


def wheel(path: Path, files: Mapping[str, bytes]) -> Path:
    """A wheel."""
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            out.writestr(name, content)
    return path


def tarball(path: Path, files: Mapping[str, bytes]) -> Path:
    """A package of npm."""
    path.write_bytes(_tar(files, "w:gz"))
    return path


def deb(path: Path, files: Mapping[str, bytes], kind: str = "xz") -> Path:
    """A Debian package: three entries of an `ar` archive, each at an even place."""
    listed = {f"./{name}": content for name, content in files.items()}
    data = _tar(listed, "w:xz") if kind == "xz" else pyarrow.Codec("zstd").compress(_tar(listed, "w")).to_pybytes()
    content = b"!<arch>\n"
    for name, part in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (f"data.tar.{kind}", data)):
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    path.write_bytes(content)
    return path


def _tar(files: Mapping[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()
