"""Builds a corpus folder, a file for each domain, with a page that says whose the texts are."""

import dataclasses
import functools
import gzip
import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mocte_ds.errors import DataError
from mocte_ds.json_files import read_object
from mocte_ds.ownership import hash_file, put, require_ours
from mocte_ds.ownership.workshop import workshop
from mocte_ds.packages import Package, file_of, read_members
from mocte_ds.text_sources.catalogue import BOOLQ, DOMAINS, RECIPE, Domain, Source
from mocte_ds.text_sources.licences import FACTS_FILE, LICENCES_FILE, licences

TOOL = "get_corpus"
"""Named by the marker of such a folder."""


def build(
    folder: Path,
    names: Sequence[str] | None = None,
    source: Path | None = None,
    with_boolq: bool = False,
    tell: Callable[[str], None] = lambda _text: None,
) -> dict[str, dict[str, Any]]:
    """Build the domains that are not there yet, one after another; each file appears when it is complete.

    Args:
        folder: new, or one of this tool; domains in it stay as they are if they were built from the same packages.
        names: of domains; None: all.
        source: folder with packages that were downloaded before; None: pip, npm and apt-get download them.
        with_boolq: whether `qa_en` has the training set of BoolQ.
        tell: called with a line for each stage.

    Returns:
        Facts of each domain: documents, bytes of text, its sha256, sources.

    Raises:
        DataError: an unknown domain; or packages could not be had, after all other domains have been built.
        NotOurs: a file of somebody else has one of the names.
        OSError: a file cannot be written.
    """
    domains = _chosen(names, with_boolq)
    require_ours(folder, [*map(_file, domains), FACTS_FILE, LICENCES_FILE], TOOL)
    known, failed = _known(folder), {}
    with workshop(folder) as work:
        # One download serves several domains.
        find = functools.cache(lambda package: _file_or_error(package, work, source))
        for name, domain in domains.items():
            recipe = _recipe(domain)
            if _is_there(folder, name, known.get(name), recipe):
                tell(f"{name}: is there")
                continue
            tell(f"{name}: from {', '.join(_titles(domain))}")
            try:
                content, facts = _built(domain, find)
            except DataError as error:
                failed[name] = str(error)
                tell(f"{name}: not built: {error}")
                continue
            known[name] = {"recipe": recipe, **facts}
            notes = {
                LICENCES_FILE: licences(known).encode(),
                FACTS_FILE: (json.dumps(known, indent=1, sort_keys=True) + "\n").encode(),
            }
            # The licence is there before the text.
            put(folder, {LICENCES_FILE: notes[LICENCES_FILE], _file(name): content}, TOOL)
            put(folder, {FACTS_FILE: notes[FACTS_FILE]}, TOOL)
    if failed:
        told = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise DataError(
            f"{len(failed)} of {len(domains)} domains could not be built; the others are in {folder}. The same command "
            f"goes on with these:\n{told}"
        )
    return {name: known[name] for name in domains}


def _chosen(names: Sequence[str] | None, with_boolq: bool) -> dict[str, Domain]:
    unknown = sorted({*(names or ())} - DOMAINS.keys())
    if unknown:
        raise DataError(f"there is no domain {', '.join(unknown)}; there are {', '.join(DOMAINS)}.")
    found = {name: domain for name, domain in DOMAINS.items() if names is None or name in names}
    if with_boolq and "qa_en" in found:
        found["qa_en"] = dataclasses.replace(found["qa_en"], sources=(*found["qa_en"].sources, BOOLQ))
    return found


def _file(name: str) -> str:
    return f"{name}.jsonl.gz"


def _titles(domain: Domain) -> list[str]:
    return list(dict.fromkeys(source.package.title if source.package else "Python" for source in domain.sources))


def _recipe(domain: Domain) -> str:
    """What a domain is built by; Debian's versions move and are not part of it."""
    parts = [[s.package.title if s.package else platform.python_version(), s.members, s.least] for s in domain.sources]
    return hashlib.sha256(json.dumps([RECIPE, parts]).encode()).hexdigest()


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FACTS_FILE
    return read_object(path, DataError) if path.is_file() else {}


def _is_there(folder: Path, name: str, facts: dict[str, Any] | None, recipe: str) -> bool:
    path = folder / _file(name)
    if facts is None or facts["recipe"] != recipe or not path.is_file():
        return False
    return hash_file(path).sha256 == facts["file_sha256"]


def _file_or_error(package: Package, work: Path, source: Path | None) -> Path | DataError:
    """An error is kept too: it is not tried again for the next domain."""
    try:
        return file_of(package, work, source)
    except DataError as error:
        return error


def _built(domain: Domain, find: Callable[[Package], Path | DataError]) -> tuple[bytes, dict[str, Any]]:
    """A domain's file and facts; documents are ordered by a hash of their text, copies are left out."""
    found: dict[bytes, str] = {}
    sources = []
    for source in domain.sources:
        path = Path(sysconfig.get_path("stdlib")) if source.package is None else find(source.package)
        if isinstance(path, DataError):
            raise path
        before = len(found)
        unreadable = _add(found, source, path)
        if len(found) == before:
            raise DataError(
                f"{path} holds no text that matches {source.members}; it is another version of the package."
            )
        sources.append({**_origin(source, path), "documents": len(found) - before, "not_utf8": unreadable})
    lines = [json.dumps({"text": found[key]}, ensure_ascii=False) + "\n" for key in sorted(found)]
    text = "".join(lines).encode("utf-8")
    content = gzip.compress(text, mtime=0)
    return content, {
        "documents": len(found),
        "bytes": sum(len(document.encode("utf-8")) for document in found.values()),
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "sources": sources,
    }


def _add(found: dict[bytes, str], source: Source, path: Path) -> int:
    """Take a source's documents; how many files are not text in the encoding that they should have."""
    unreadable = 0
    for name, content in read_members(path, source.members):
        try:
            documents = [document.strip("\n") for document in source.read(name, content)]
            keyed = {hashlib.sha1(document.encode("utf-8")).digest(): document for document in documents}
        except (UnicodeError, SyntaxError):  # of a Python file: it names no encoding that there is
            unreadable += 1
            continue
        found |= {key: document for key, document in keyed.items() if len(document) >= source.least}
    return unreadable


def _origin(source: Source, path: Path) -> dict[str, str]:
    if source.package is None:
        origin = {"package": "Python", "version": platform.python_version(), "package_licence": "PSF-2.0"}
    else:
        version = source.package.version or path.stem.split("_")[1].replace("%3a", ":")
        origin = {"package": source.package.name, "version": version, "package_licence": source.package.licence}
    return {**origin, "licence": source.licence, "whose": source.whose}
