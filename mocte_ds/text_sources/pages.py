"""Plain text of pages: HTML, Perl's POD and manual pages; menus, markup and the translators' notices go."""

import html
import re
from html.parser import HTMLParser

_EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_HIDDEN = {"head", "script", "style", "nav", "svg"}
_BREAKS = {"p", "div", "br", "li", "ul", "ol", "dt", "dd", "dl", "tr", "table", "pre", "blockquote", "hr", "section"}
_BREAKS |= {"h1", "h2", "h3", "h4", "h5", "h6"}
_MENUS = {"navheader", "navfooter", "docnav", "nosearch", "toc", "menu", "searchmenu"}
"""Classes of what stands around the text on every page of SQLite's, PostgreSQL's and Debian's books."""
_MENU_IDS = {"banner", "title"}
_ENGLISH = {"the", "of", "and", "to", "is", "that", "for"}
_FEW_WORDS, _ENGLISH_SHARE = 5, 0.1


class _Page(HTMLParser):
    """Collects text; what a hidden element holds is passed over until its tag is closed as often as it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._hidden, self._depth, self._verbatim = "", 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden:
            self._depth += tag == self._hidden
            return
        values = dict(attrs)
        menu = _MENUS & {*(values.get("class") or "").split()} or values.get("id") in _MENU_IDS
        if (tag in _HIDDEN or menu) and tag not in _EMPTY:
            self._hidden, self._depth = tag, 1
        self._verbatim += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._depth -= tag == self._hidden
            if self._depth == 0:
                self._hidden = ""
            return
        self._verbatim -= tag == "pre" and self._verbatim > 0
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.found.append(data if self._verbatim else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in _BREAKS:
            self.found.append("\n")
        elif tag in ("td", "th"):
            self.found.append(" ")


def html_text(page: str) -> str:
    """Text of a page, a line for each paragraph, preformatted lines as they are."""
    reader = _Page()
    reader.feed(page)
    reader.close()
    return _tidy("".join(reader.found))


def without_english(text: str) -> str:
    """Lines of a translation that are not English; a line of few words stays."""
    return "\n".join(line for line in text.split("\n") if not _is_english(line)).strip("\n")


def _is_english(line: str) -> bool:
    words = re.findall(r"[^\W\d_]+", line.lower())
    return len(words) >= _FEW_WORDS and sum(word in _ENGLISH for word in words) > _ENGLISH_SHARE * len(words)


_POD_CODE = re.compile(r"([A-Z])(?:<([^<>]*)>|<<+\s(.*?)\s>>+)", re.DOTALL)
_POD_BEGIN = re.compile(r"^=begin\b.*?^=end\b[^\n]*$|^=for\b.*?\n\s*\n", re.DOTALL | re.MULTILINE)


def pod_text(page: str) -> str:
    """Text of a page of Perl's documentation (perlpod(1)); formatting codes leave what they show."""
    page = _POD_BEGIN.sub("", page)
    start = page.find("\n=")
    page = page if start < 0 or page.startswith("=") else page[start:]
    lines = []
    for paragraph in re.split(r"\n\s*\n", page):
        paragraph = paragraph.strip("\n")
        if re.match(r"=(?:cut|pod|over|back|encoding)\b", paragraph):
            continue
        if paragraph[:1] in (" ", "\t"):
            lines.append(paragraph)
            continue
        paragraph = re.sub(r"^=(?:head\d|item)\s*", "", paragraph)
        before = ""
        while before != paragraph:
            before, paragraph = paragraph, _POD_CODE.sub(_shown, paragraph)
        lines.append(" ".join(paragraph.replace("\0", "<").replace("\1", ">").split()))
    return _tidy("\n".join(lines))


def _shown(code: re.Match[str]) -> str:
    kind, content = code[1], code[2] if code[2] is not None else code[3]
    if kind in "XZ":
        return ""
    if kind == "L":
        return content.partition("|")[0].lstrip("/")
    if kind == "E":
        # Not yet as characters: they would be taken for the begin and end of codes.
        return {"lt": "\0", "gt": "\1", "sol": "/", "verbar": "|"}.get(content, html.unescape(f"&{content};"))
    return content


_ROFF_SIGNS = {"em": "-", "en": "-", "hy": "-", "aq": "'", "cq": "'", "oq": "'", "dq": '"', "lq": '"', "rq": '"'}
_ROFF_SIGNS |= {"bu": "*", "co": "(c)", "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "mi": "-", "pl": "+", "Fo": "«"}
_ROFF_SIGNS |= {"Fc": "»"}
_ROFF = re.compile(
    r"\\(?:f(?:\[[^\]]*\]|\(..|.)|s[-+]?\d+|\*(?:\[[^\]]*\]|\(..|.)|\[(?P<long>[^\]]*)\]|\((?P<two>..)"
    r"|[hvwlLm]'[^']*'|m\[[^\]]*\]|(?P<one>.))"
)
_BREAKING = {"PP", "P", "LP", "br", "sp", "Pp", "TP", "TQ", "IP", "RS", "RE", "nf", "fi", "EX", "EE", "HP", "It", "Bl"}
_BREAKING |= {"El", "Bd", "Ed"}
_HEADINGS = {"SH", "SS", "Sh", "Ss"}
_FONTS = {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB"}
_NOTICES = ("ÜBERSETZUNG", "TRADUCTION", "TRADUCCIÓN", "ПЕРЕВОД", "翻訳", "翻译", "中文版", "跋")
"""Headings of who translated a page: names and addresses of people, the same on hundreds of pages."""


def manual_text(page: str) -> str:
    """Text of a manual page (man(7), mdoc(7)): filled paragraphs on one line each, headings, no macros.

    Definitions of macros, conditions, tables' layout and the section about the translators are left out.
    """
    lines: list[str] = []
    filled: list[str] = []
    ends, verbatim, hidden, mdoc = "", False, False, ".Dd" in page

    def flush() -> None:
        if filled:
            lines.append(" ".join(filled))
            filled.clear()

    for line in page.split("\n"):
        if ends:
            ends = "" if line.strip() == ends or (ends == "\\}" and "\\}" in line) else ends
            continue
        if not line.startswith((".", "'")):
            if hidden or not line.strip():
                flush()
            elif verbatim:
                lines.append(_plain_roff(line))
            else:
                filled.append(_plain_roff(line).strip())
            continue
        name, _, rest = line[1:].lstrip().partition(" ")
        if name in ("de", "ig", "am"):
            ends = ".."
        elif name in ("if", "ie", "el"):
            ends = "\\}" if "\\{" in line and "\\}" not in line else ""
        elif name in _HEADINGS:
            flush()
            title = _plain_roff(rest).replace('"', "").strip()
            hidden = hidden if name in ("SS", "Ss") else title.upper().startswith(_NOTICES)
            lines += [] if hidden else ["", title]
        elif name in _BREAKING:
            flush()
            verbatim = name in ("nf", "EX") or (verbatim and name not in ("fi", "EE"))
            if name in ("IP", "It") and not hidden:
                filled.append(_plain_roff(rest.split(" ")[0] if name == "IP" and '"' not in rest else rest.strip('" ')))
        elif not hidden and (name in _FONTS or (mdoc and name[:1].isupper() and name not in ("Dd", "Dt", "Os"))):
            joined = (
                "" if len(name) == 2 and name.isupper() and name[0] != name[1] and name not in ("SM", "SB") else " "
            )
            filled.append(joined.join(_plain_roff(word) for word in _words(rest)))
    flush()
    return _tidy("\n".join(lines))


def _words(rest: str) -> list[str]:
    """Arguments of a macro."""
    return [quoted or bare for quoted, bare in re.findall(r'"((?:[^"]|"")*)"|((?:\\ |\S)+)', rest)]


def _plain_roff(text: str) -> str:
    text = re.sub(r'\\["#].*', "", text)
    return _ROFF.sub(_roff_sign, text)


def _roff_sign(code: re.Match[str]) -> str:
    name = code["long"] or code["two"]
    if name:
        return chr(int(name[1:], 16)) if re.fullmatch(r"u[0-9A-F]{4,6}", name) else _ROFF_SIGNS.get(name, "")
    return {"e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "-": "-", "'": "'", "`": "`", ".": "."}.get(
        code["one"] or "", ""
    )


def _tidy(text: str) -> str:
    """No space at the ends of lines, at most one empty line in a row."""
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")
