"""Texts of one file in a package: a small function for each form, from a file's name and content to its documents."""

import gzip
import html
import io
import json
import re
import struct
import tokenize
import zlib
from collections.abc import Iterator
from functools import partial

from mocte_ds.errors import DataError
from mocte_ds.text_sources.pages import html_text, manual_text, pod_text, without_english

_PART = 8000
"""Characters after which a book's next paragraph begins a new document."""


def summaries(_name: str, content: bytes) -> Iterator[str]:
    """Title and lead section of each article (JSON)."""
    for article in json.loads(content).values():
        yield f"{article['title']}\n{article['extract']}"


def book(_name: str, content: bytes) -> Iterator[str]:
    """A plain book in parts of about 8,000 characters, which begin and end with a paragraph."""
    text = _unpacked(content).decode("utf-8-sig").replace("\r\n", "\n")
    return parts(re.split(r"\n\s*\n", text), "\n\n")


def bible(_name: str, content: bytes) -> Iterator[str]:
    """The text between the first three quotes of a Python file; brackets around what translators added go."""
    quoted = content.decode("utf-8").split('"""')
    if len(quoted) < 3:
        raise DataError("the Bible's file holds no quoted text; the package is another one.")
    return parts(quoted[1].replace("[", "").replace("]", "").split("\n"), "\n")


def speech(_name: str, content: bytes) -> Iterator[str]:
    """`text` of a JSON file, a speech."""
    yield json.loads(content)["text"]


def r_strings(_name: str, content: bytes) -> Iterator[str]:
    """Books in a database of R objects (.rdb), each a vector of lines, in parts.

    Each object is its unpacked size (4 bytes) and a zlib stream; inside is R's serialisation in XDR (R Internals, 1.8).
    """
    while content:
        stream = zlib.decompressobj()
        lines = _r_lines(stream.decompress(content[4:]))
        content = stream.unused_data
        if lines:
            yield from parts(re.split(r"\n\s*\n", "\n".join(lines)), "\n\n")


_R_STRINGS, _R_MISSING = 16, -1


def _r_lines(data: bytes) -> list[str]:
    if not data.startswith(b"X\n"):
        raise DataError("an object of R is not stored in XDR; the package is another one.")
    (version,) = struct.unpack_from(">i", data, 2)
    place = 14
    if version == 3:  # the name of the encoding
        place += 4 + struct.unpack_from(">i", data, place)[0]
    flags, count = struct.unpack_from(">ii", data, place)
    if flags & 0xFF != _R_STRINGS:
        return []
    place, lines = place + 8, []
    for _ in range(count):
        _flags, size = struct.unpack_from(">ii", data, place)
        place += 8
        if size != _R_MISSING:
            lines.append(data[place : place + size].decode("utf-8"))
            place += size
    return lines


def python(_name: str, content: bytes) -> Iterator[str]:
    """A module as it is, decoded as its first lines say."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    yield content.decode(encoding)


def page(_name: str, content: bytes) -> Iterator[str]:
    """A page of HTML."""
    yield html_text(content.decode("utf-8"))


def translated_page(_name: str, content: bytes) -> Iterator[str]:
    """A page of HTML in another language, without the paragraphs that are still English."""
    yield without_english(html_text(content.decode("utf-8")))


def pod(_name: str, content: bytes) -> Iterator[str]:
    """A page of Perl's documentation."""
    yield pod_text(content.decode("utf-8"))


def manual(_name: str, content: bytes) -> Iterator[str]:
    """A translated manual page, without the paragraphs that are still English."""
    yield without_english(manual_text(_unpacked(content).decode("utf-8")))


def metamath(_name: str, content: bytes) -> Iterator[str]:
    """Comment and statement of each axiom and theorem of a Metamath database; proofs are left out."""
    for piece in content.decode("utf-8").split("$(")[1:]:
        comment, _, rest = piece.partition("$)")
        found = re.match(r"\s*(\S+)\s+\$[ap]\s+(.*?)\s\$[=.]", rest, re.DOTALL)
        if found:
            yield f"{' '.join(comment.split())}\n{found[1]}: {' '.join(found[2].split())}"


def synsets(_name: str, content: bytes) -> Iterator[str]:
    """Words and gloss of each set of synonyms of WordNet (wndb(5))."""
    for line in content.decode("utf-8").split("\n"):
        fields, bar, gloss = line.partition(" | ")
        if not bar or line.startswith("  "):  # the licence in front
            continue
        values = fields.split(" ")
        words = values[4 : 4 + 2 * int(values[3], 16) : 2]
        yield f"{', '.join(re.sub(r'[(].*[)]$', '', word).replace('_', ' ') for word in words)}: {gloss.strip()}"


def _answers(name: str, content: bytes, like_sentences: bool) -> Iterator[str]:
    """Question and right answer; several requests are of one question, which gives the same text again."""
    for line in _unpacked(content).decode("utf-8").splitlines():
        document = json.loads(line)["doc"]
        if "sentence" in document:  # a blank, and two options for it
            yield document["sentence"].replace("_", document[f"option{document['answer']}"])
            continue
        gold = document["gold"]
        answer = document["choices"][gold].strip() if isinstance(gold, int) else str(gold)
        joint = "" if like_sentences and answer[:1] in ",.;:!?'" else " "
        yield html.unescape(f"{document['query'].rstrip()}{joint}{answer}")


answers = partial(_answers, like_sentences=False)
"""A question and its right answer."""
continuations = partial(_answers, like_sentences=True)
"""A beginning and its right end, as one sentence."""


def parts(paragraphs: list[str], joint: str) -> Iterator[str]:
    """Paragraphs in documents of about equal size.

    Args:
        paragraphs: in order; empty ones are left out.
        joint: between two of them.
    """
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        paragraph = paragraph.strip("\n")
        if paragraph.strip():
            held.append(paragraph)
            size += len(paragraph)
        if size >= _PART:
            yield joint.join(held)
            held, size = [], 0
    if held:
        yield joint.join(held)


def _unpacked(content: bytes) -> bytes:
    """A file that may be gzipped."""
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
