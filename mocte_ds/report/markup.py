"""Text, tables and figures as HTML, in a page of their own."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mocte_ds.report.style import CSS

CLASSES = {"n": "", "w": ' class="text word"', "t": ' class="text"'}


@dataclass(frozen=True)
class Table:
    """A table with a title and a legend, for pages and for files in Markdown."""

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    legend: str

    def markdown(self) -> str:
        """For Markdown."""
        lines = ["| " + " | ".join(row) + " |" for row in [self.head, *self.rows]]
        return "\n".join([f"## {self.title}", "", lines[0], "|" + "---|" * len(self.head), *lines[1:], "", self.legend])

    def html(self, kinds: str | None = None) -> str:
        """For a page.

        Args:
            kinds: see :func:`table`; None: words and then numbers.
        """
        legend = self.legend.replace("**", "").replace("*", "")
        lines = legend.replace("\n  ", " ").split("\n")
        words = "".join(paragraph(line.removeprefix("- "), "soft") for line in lines if line)
        kinds = kinds or "w" + "n" * (len(self.head) - 1)
        return f"<h3>{text(self.title)}</h3>{table(f'table-{self.name}', self.head, self.rows, kinds)}{words}"


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page that needs neither a network nor JavaScript.

    Args:
        title: plain text.
        parts: HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{CSS}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def figure(name: str, title: str, caption: str, reading: str, wide: bytes, narrow: bytes | None = None) -> str:
    """A picture with its caption.

    Args:
        name: of the figure.
        title: plain text.
        caption: what is shown; empty: the reading says it.
        reading: how to read it.
        wide: PNG file.
        narrow: the same for phones; None: the wide one.
    """
    first, *other = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (wide, narrow) if data)
    image = f'<img src="{first}" alt="{escape(title)}. {escape(caption)}">'
    if other:
        image = f'<picture><source media="(max-width:700px)" srcset="{other[0]}">{image}</picture>'
    how = f'<span class="read">How to read it: {text(reading)}</span>' if caption else text(reading)
    return f'<figure id="figure-{name}">{image}<figcaption>{text(caption)} {how}</figcaption></figure>'


def text(value: str) -> str:
    """Plain text as HTML; a number stays on one line with its per cent sign."""
    return escape(value).replace(" %", "&nbsp;%")


def paragraph(value: str, kind: str = "") -> str:
    """A paragraph of plain text; empty for no text."""
    opening = f'<p class="{kind}">' if kind else "<p>"
    return f"{opening}{text(value)}</p>" if value else ""


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], kinds: str) -> str:
    """An HTML table that turns into cards on a narrow screen.

    Args:
        name: its id.
        head: names of the columns.
        rows: cells as plain text.
        kinds: a letter a column: ``n`` a number, ``w`` a few words that stay on one line, ``t`` text.
    """
    cell = [CLASSES[kind] for kind in kinds]
    lines = [f'<table id="{name}"><thead><tr>']
    lines += [f'<th scope="col"{cell[i]}>{text(title)}</th>' for i, title in enumerate(head)]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = [f'<td{cell[i]} data-label="{escape(head[i])}">{text(value)}</td>' for i, value in enumerate(row)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])
