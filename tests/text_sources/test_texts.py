"""Each form of text, from a few lines of it."""

import gzip
import json
import struct
import zlib
from functools import partial

import pytest

from mocte_ds.errors import DataError
from mocte_ds.text_sources import texts
from mocte_ds.text_sources.pages import html_text, manual_text, pod_text, without_english

PAGE = """<html><head><title>no</title></head><body><div class="navheader"><div>menu</div>Next</div>
<h2>8.15. Arrays</h2><p>  Arrays of <b>any</b>
type &amp; more.<br>Second</p><img src=x><pre>a  =  1
 b</pre><div class=nosearch><div>logo</div></div><ul><li>one</li></ul><div class="navfooter">Prev</div></body></html>"""
MANUAL = r""".\" a comment
.de Sp
.if t .sp .5v
..
.ie n \{\
.    ds L" ""
'br\}
.TH LS 1 "2022"
.SH NOM
ls \- Afficher
.SH DESCRIPTION
Afficher les \fIFICHIER\fPs,
\fB\-cft\fP «\ .\ ».
.TP
\fB\-a\fP
inclure
.BR wget (1)
and \[u00E9]\(bu
.nf
  code   \e
.fi
.SH TRADUCTION
Un Nom <nom@example.org>
.SH "VOIR AUSSI"
fin
"""
POD = """Read as is.

=encoding utf8

=head1 NAME
X<operator>

perlop - C<< $x <=> $y >> and B<I<both>> E<lt>here, L<the list|perllist>

=begin html

no

=end html

    verbatim  B<kept>

=over 4

=item C<first>

=cut
"""


def test_html() -> None:
    assert html_text(PAGE).split("\n\n") == [
        "8.15. Arrays",
        " Arrays of any type & more.\nSecond",
        "a  =  1\n b",
        "one",
    ]


def test_english_paragraphs_of_a_translation_go() -> None:
    lines = ["Les paquets sont là.", "Both tools are built on top of the same library and are close.", "apt install x"]
    assert without_english("\n".join(lines)) == f"{lines[0]}\n{lines[2]}"
    assert not without_english("It is the first of the tools that you need.")


def test_manual_pages() -> None:
    assert manual_text(MANUAL).split("\n") == [
        "NOM",
        "ls - Afficher",
        "",
        "DESCRIPTION",
        "Afficher les FICHIERs, -cft « . ».",
        "-a inclure wget(1) and é*",
        "  code   \\",
        "",
        "VOIR AUSSI",
        "fin",
    ]


def test_pod() -> None:
    assert pod_text(POD).split("\n") == [
        "NAME",
        "perlop - $x <=> $y and both <here, the list",
        "    verbatim  B<kept>",
        "first",
    ]


def test_metamath() -> None:
    database = "$( Section $)\n${ $( Addition\n commutes. $)\n addcom $p |- ( A +  B ) $= x y $. $}\n"
    database += "$( An axiom. $) ax $a |- A $."
    assert list(texts.metamath("", database.encode())) == [
        "Addition commutes.\naddcom: |- ( A + B )",
        "An axiom.\nax: |- A",
    ]


def test_wordnet() -> None:
    line = '00001740 00 a 02 able 0 in_a(p) 0 002 = 05200169 n 0000 ! 00002098 a 0101 | having means; "able to swim"  '
    assert list(texts.synsets("", f"  29 the | licence  \n{line}\n".encode())) == [
        'able, in a: having means; "able to swim"'
    ]


def test_questions() -> None:
    rows = [
        {"query": "Question: Why?\nAnswer:", "choices": ["no", "because"], "gold": 1},
        {"query": "Question: Why?\nAnswer:", "choices": ["no", "because"], "gold": 1},
        {"sentence": "Ian ate as _ had to.", "option1": "Ian", "option2": "he", "answer": "2"},
    ]
    content = gzip.compress("\n".join(json.dumps({"doc": row}) for row in rows).encode())
    assert [*dict.fromkeys(texts.answers("", content))] == ["Question: Why?\nAnswer: because", "Ian ate as he had to."]
    row = {"query": "Cars: Then", "choices": [", the man goes."], "gold": 0}
    assert list(texts.continuations("", json.dumps({"doc": row}).encode())) == ["Cars: Then, the man goes."]


def test_books_come_in_parts_of_whole_paragraphs() -> None:
    paragraphs = [f"{number} " + "word " * 500 for number in range(10)]
    found = list(texts.book("", gzip.compress("\r\n\r\n".join(paragraphs).encode())))
    assert "\n\n".join(found) == "\n\n".join(paragraphs) and len(found) == 3
    assert list(texts.bible("", b'x = (\n"""\nIn [the]\n\nbeginning""", {1: 2})')) == ["In the\nbeginning"]
    with pytest.raises(DataError, match="holds no quoted text"):
        list(texts.bible("", b"x = 1"))


def test_books_of_r() -> None:
    """Two objects as R's saveRDS writes them, version 3 and 2; a missing line goes."""
    entry = struct.Struct(">ii")
    lines = [b"EMMA", b"", "é".encode()]
    body = struct.pack(">ii", 16, 4) + b"".join(entry.pack(9, len(line)) + line for line in lines) + entry.pack(9, -1)
    third = b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8" + body
    second = b"X\n" + struct.pack(">iii", 2, 0, 0) + body
    database = b"".join(struct.pack(">i", len(data)) + zlib.compress(data) for data in (third, second))
    assert list(texts.r_strings("", database)) == ["EMMA\n\né"] * 2


def test_the_rest() -> None:
    article = {"a": {"title": "Été", "extract": "Une saison."}}
    assert list(texts.summaries("", json.dumps(article).encode())) == ["Été\nUne saison."]
    assert list(texts.speech("", b'{"text": "Fellow citizens"}')) == ["Fellow citizens"]
    assert list(texts.python("", "# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1")))[0].endswith("'é'\n")
    read = partial(texts.translated_page, "")
    assert list(read(b"<p>Ein Satz.</p><p>This is the text of the book that you read.</p>")) == ["Ein Satz."]
