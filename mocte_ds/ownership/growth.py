"""Whether a file that grows while a run goes on is still what we wrote: its first bytes, and the kind of the rest."""

import json
import struct
from pathlib import Path

from mocte_ds.ownership.facts import FileFacts, hash_file

_HEAD, _TAIL = 12, 4  # bytes around a record of TensorFlow: length and its checksum, checksum
_LONGEST = 1 << 26  # bytes of a record; text that is read as a length gives far more


def has_grown(path: Path, known: FileFacts) -> bool:
    """Whether a file begins with what we know of it and goes on with our lines or records.

    A last line or record may be cut off, as a killed process leaves it.

    Args:
        path: a log of JSON lines, an event file of TensorBoard, or the output of a program (only its start counts).
        known: size and hash of its first bytes.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size < known.bytes or hash_file(path, known.bytes) != known:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, known.bytes - 1))
        whole = not known.bytes or file.read(1) == b"\n"
        rest = file.read() if known.bytes < path.stat().st_size else b""
    if path.suffix == ".jsonl":
        *lines, last = rest.split(b"\n")
        begun = last[:2] == b'{"'[: len(last)] or (not lines and not whole)
        return begun and all(map(_is_line, lines))
    return _are_records(rest) if "tfevents" in path.name else True


def _is_line(line: bytes) -> bool:
    try:
        return "step" in json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return False


def _are_records(content: bytes) -> bool:
    """Whether bytes are records as TensorFlow writes them, one after the other; the last may be cut off."""
    place = 0
    while place + _HEAD <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        if length > _LONGEST:
            return False
        place += _HEAD + length + _TAIL
    return True
