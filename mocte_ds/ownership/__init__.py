"""What the tools may remove or replace: only what a marker shows to be ours and unchanged; docs/files.md."""

from mocte_ds.ownership.facts import FileFacts, hash_file
from mocte_ds.ownership.folders import mark, replace_folder, require_new_or_ours
from mocte_ds.ownership.overlap import require_apart, require_outside_whole
from mocte_ds.ownership.put import append, keep_aside, note_built, note_coming, note_growing, put, require_ours
from mocte_ds.ownership.remove import remove

__all__ = [
    "FileFacts",
    "append",
    "hash_file",
    "keep_aside",
    "mark",
    "note_built",
    "note_coming",
    "note_growing",
    "put",
    "remove",
    "replace_folder",
    "require_apart",
    "require_new_or_ours",
    "require_ours",
    "require_outside_whole",
]
