"""A page of the report taken apart: what it loads, its tables and what stands in its figures."""

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """The elements of a page; refuses elements that are closed in the wrong order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        """Rows of every table by its id, the head first."""
        self.captions: dict[str, str] = {}
        """Caption of every figure by its id."""
        self.text = ""
        self._open: list[str] = []
        self._table: list[list[str]] | None = None
        self._figure = ""
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        attrs = dict(attributes)
        self.elements.append((tag, attrs))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(str(attrs["id"]), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        elif tag == "figure":
            self._figure = str(attrs["id"])
            self.captions[self._figure] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        data = data.replace("\xa0", " ")
        if "style" not in self._open:
            self.text += data
        if self._open and self._open[-1] in ("td", "th") and self._table is not None:
            self._table[-1][-1] += data
        if "figcaption" in self._open:
            self.captions[self._figure] += data

    def attributes(self, name: str) -> list[str]:
        """Values of one attribute of all elements that have it."""
        return [attrs[name] for _, attrs in self.elements if attrs.get(name) is not None]

    def rows(self, table: str) -> list[list[str]]:
        """Rows of a table without its head."""
        return self.tables[table][1:]
