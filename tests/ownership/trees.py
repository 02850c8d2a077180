"""Everything below a folder, to be compared before and after."""

import hashlib
import os
from pathlib import Path


def tree(folder: Path) -> dict[str, str]:
    """Hashes of all files, targets of all links and names of all folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
