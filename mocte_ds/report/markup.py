"""Text and tables as HTML."""

from collections.abc import Sequence
from html import escape

CLASSES = {"n": "", "w": ' class="text word"', "t": ' class="text"'}


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
