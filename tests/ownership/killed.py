"""Kills a process that writes and removes files before each of its calls of the system.

Run as a script: to fork a process that has imported torch takes far longer than what the child does.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from mocte_ds.ownership import put, remove, replace_folder, require_new_or_ours
from mocte_ds.ownership.marker import MARKER

TOOL = "some_tool"


def in_a_process_that_dies(moment: int, work: Callable[[], None]) -> int:
    """Do something in a process of its own, killed before a call of the system; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [moment]

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def or_die(*arguments: object, **options: object) -> object:
            if not left[0]:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            return call(*arguments, **options)

        return or_die

    for name in ("replace", "rename", "unlink", "fsync", "open", "mkdir", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    try:
        work()
    finally:
        os._exit(0)


def write_all(out: Path, content: bytes) -> None:
    put(out, {"a": content, "b/c": content, "m": content}, TOOL, drop=["old"], withdraw="m")
    with replace_folder(out / "whole", TOOL) as pending:
        (pending / "w").write_bytes(content)


def kill_at_any_moment(folder: Path) -> None:
    """Whatever call is the last one: files are old or new, the manifest goes first, and the next start works."""
    code = -9
    for moment in range(200):
        out = folder / str(moment)
        write_all(out, b"old")
        put(out, {"old": b"old"}, TOOL)
        (out / "notes").write_bytes(b"of the user")
        code = in_a_process_that_dies(moment, lambda: write_all(out, b"new"))  # noqa: B023  called at once
        found = {name: (out / name).read_bytes() for name in ("a", "b/c", "m") if (out / name).exists()}
        assert set(found.values()) <= {b"old", b"new"}, moment
        assert "m" not in found or len(set(found.values())) == 1, moment
        whole = require_new_or_ours(out / "whole", TOOL)
        assert (whole / "w").read_bytes() in (b"old", b"new"), moment
        if moment % 2:
            write_all(out, b"next")
            left = {path.name for path in out.iterdir() if any(path.iterdir() if path.is_dir() else [1])}
            bare = {name for name in left if name.startswith(".mocte-work-")}  # made, and the next moment killed
            assert not [path for name in bare for path in (out / name).iterdir() if path.stat().st_size], moment
            assert left - bare == {MARKER, "a", "b", "m", "notes", "whole"}, moment
        assert (out / "notes").read_bytes() == b"of the user"
        (out / "notes").unlink()
        in_a_process_that_dies(moment // 3, lambda: remove(out))  # noqa: B023
        remove(out)
        assert not out.exists(), moment
        if code == 0:
            break
    assert code == 0 and moment > 20


if __name__ == "__main__":
    kill_at_any_moment(Path(sys.argv[1]))
