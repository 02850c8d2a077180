"""The page in a corpus folder that says whose its texts are, and the list of what is there."""

from collections.abc import Mapping
from typing import Any

LICENCES_FILE = "LICENSES.md"
FACTS_FILE = ".domains.json"
"""Hidden: it is not a domain."""


def licences(domains: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        domains: facts of each, as mocte_ds.text_sources.build gathers them.
    """
    lines = [
        "# Whose these texts are",
        "",
        "Taken from packages by mocte-ds, to train on. Each text keeps its own licence; where it says `as reported`, "
        "read the authors' own terms before you pass a text on. Some licences want changes to be named: these are "
        "plain texts of parts of the works, without markup, in documents that are ordered by a hash of their text.",
    ]
    for name, facts in sorted(domains.items()):
        lines += ["", f"## {name}.jsonl.gz", ""]
        lines += [
            f"{facts['documents']:,} documents, {facts['bytes']:,} bytes; sha256 of the lines: {facts['text_sha256']}"
        ]
        for source in facts["sources"]:
            own = f", package under {source['package_licence']}" if source["package_licence"] else ""
            left = f"; {source['not_utf8']} files in another encoding left out" if source["not_utf8"] else ""
            lines += [
                "",
                f"- From: {source['package']} {source['version']}{own}",
                f"- Whose: {source['whose']}",
                f"- Licence: {source['licence']}",
                f"- Documents: {source['documents']:,}{left}",
            ]
    return "\n".join(lines) + "\n"
