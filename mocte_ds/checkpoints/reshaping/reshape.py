"""Writes a checkpoint as another number of ranks, or another spread of the experts, would have written it."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.place import find_tag, resolve_tag
from mocte_ds.checkpoints.reshaping.rank_layout import RankLayout
from mocte_ds.checkpoints.reshaping.reshaped import Reshaped
from mocte_ds.checkpoints.reshaping.saved import SavedCheckpoint
from mocte_ds.checkpoints.save import Saver
from mocte_ds.checkpoints.values import only_plausible
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership import require_apart, require_outside_whole


def reshape(
    checkpoint: str | Path, out: str | Path, world_size: int, ep_size: int, progress: bool = False
) -> dict[str, Any]:
    """Write a checkpoint in another layout, a tensor's piece at a time.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag; only read.
        out: folder of checkpoints, which gets this one under its own name and as `latest`.
        world_size: data-parallel ranks.
        ep_size: ranks that share the experts of a block; 1 for a run without blocks.
        progress: show a bar of the files that are written.

    Returns:
        "path", "step", "before" and "after" (layouts in words), "files", "bytes", "open_check" (whether a check that
        has measured and not decided was left out).

    Raises:
        CheckpointError: before anything is written: a damaged, mixed-up or unsupported checkpoint, a layout that does
            not divide, a name that is taken, too little room.
    """
    folder, root = find_tag(checkpoint), Path(out).absolute()
    target = root / folder.name
    if os.path.lexists(target):
        raise CheckpointError(f"{target} is there already; name another folder to write to.")
    if resolve_tag(root) is not None:
        raise CheckpointError(f"{root} holds other checkpoints already; name another folder to write to.")
    require_apart(target, folder)
    require_outside_whole(root)
    manifest = require_whole(folder)
    with only_plausible(folder):
        written = SavedCheckpoint(folder, manifest)
        layout = RankLayout(world_size, ep_size, written.layout.data_before_expert)
        reshaped = Reshaped(written, layout)
        written.require_supported()
        written.require_batch(world_size)
        files = {name: reshaped.file(name) for name in reshaped.names()}
    count, is_new = len(files), not root.exists()
    saver = Saver(mesh_of_processes().world)
    saver.run = manifest.run
    try:
        # The thread takes each file out of the list when it writes it.
        saver.save(root, folder.name, files, manifest.step, asynchronous=True, ranks=world_size)
        with tqdm(total=count, desc="writing", unit="file", disable=not progress) as bar:
            while saver.busy:
                bar.update(count - len(files) - bar.n)
                time.sleep(0.05)
            bar.update(count - bar.n)
        saver.wait()
    except CheckpointError:
        if is_new:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise
    size = sum(path.stat().st_size for path in target.iterdir())
    facts = {"path": str(target), "step": manifest.step, "files": count, "bytes": size}
    left_out = reshaped.changed and written.has_open_check
    return {**facts, "before": str(written.layout), "after": str(layout), "open_check": left_out}
