"""Near-duplicates stay together: found as by plain sets of word runs, split without a leak, and reported."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from mocte_ds.data import prepare, read_corpus, signatures
from mocte_ds.data.corpus import embedded_corpus
from mocte_ds.data.grams import gram_hashes
from mocte_ds.data.signatures import Signatures, halvings_for
from mocte_ds.data.split import Splitter
from mocte_ds.errors import DataError
from tests.data.conftest import write_lines


def words(seed: int, count: int) -> list[str]:
    return [f"w{n}" for n in np.random.default_rng(seed).integers(0, 10**6, count)]


def runs(text: str) -> set[tuple[str, ...]]:
    """The runs of 13 words, by regular expressions and tuples."""
    found = re.findall(r"[a-z0-9_]+|[\u3040-\u9fff]|[\u00c0-\u024f]+", text.lower())
    return {tuple(found[i : i + 13]) for i in range(max(1, len(found) - 12))}


def splitter(corpus: dict[str, list[str]], share: float):
    all_signatures = {domain: Signatures.of(texts) for domain, texts in corpus.items()}
    made = Splitter(halvings_for(Signatures.joined(list(all_signatures.values())).levels))
    for domain, of_texts in all_signatures.items():
        made.begin(domain)
        made.add(of_texts)
    return made.split(share, {domain: domain for domain in corpus})


def test_hashes_are_equal_where_runs_are() -> None:
    base = " ".join(words(0, 60))
    texts = [base, base.upper().replace(" ", ",\n"), f"x {base}", " ".join(words(1, 40)), base[:300], "日本語" * 9, "!"]
    hashes = [set(gram_hashes(text).tolist()) for text in texts]
    for (a, one), (b, two) in itertools.combinations(list(zip(texts, hashes, strict=True))[:-1], 2):
        assert len(one & two) == len(runs(a) & runs(b))
    assert [len(h) for h in hashes] == [48, 48, 49, 28, len(runs(base[:300])), 3, 0]
    long = " ".join(words(2, 200_000))  # more than one piece
    assert len(gram_hashes(long)) == pytest.approx(199_988, abs=3)


def test_groups_stay_together_also_between_domains() -> None:
    shared = [" ".join(words(1000 + n, 20)) for n in range(60)]
    corpus = {
        "a": [" ".join(words(n, 40)) + " " + shared[n % 60] for n in range(200)],
        "b": [f"{shared[n]} {' '.join(words(5000 + n, 40))}" for n in range(60)],
    }
    corpus["b"] += [" ".join(words(8000 + n, 50)) for n in range(60, 300)]
    split = splitter(corpus, 0.1)
    sides = [np.append(split.held_out["a"][n::60], split.held_out["b"][n]) for n in range(60)]
    assert all(side.all() or not side.any() for side in sides)
    assert any(side.all() for side in sides)
    assert split.found["a"] == {"documents": 200, "groups": 60, "largest": 5, "common": None}
    assert split.found["b"]["documents"] == 60 and split.facts == {"words": 13, "kept_share": 1.0}
    assert 10 <= split.held_out["a"].sum() <= 40 and 15 <= split.held_out["b"].sum() <= 50
    more = splitter({**corpus, "b": [*corpus["b"], " ".join(words(9, 30))]}, 0.1)
    assert (more.held_out["a"] == split.held_out["a"]).all() and (more.held_out["b"][:-1] == split.held_out["b"]).all()


@pytest.mark.parametrize("order", ["ab", "ba", "abc", "acb", "cab"])
def test_a_limit_of_one_domain_does_not_tear_groups_of_others(order: str) -> None:
    """Boilerplate chains the documents of `a`, which gets a limit; passages of `b` (and `c`) stand in `a` too."""
    shared = [" ".join(words(1000 + n, 20)) for n in range(16)]
    boiler = [" ".join(words(2000 + n, 20)) for n in range(160)]
    drawn = np.random.default_rng(0).integers(0, 160, (400, 2))
    corpus = {"a": [" ".join([*words(3000 + n, 60), boiler[i], boiler[j]]) for n, (i, j) in enumerate(drawn)]}
    corpus["a"][:16] = [f"{text} {passage}" for text, passage in zip(corpus["a"], shared, strict=False)]
    for number, name in enumerate("bc"):
        corpus[name] = [
            " ".join(words(5000 + 1000 * number + n, 60)) + (f" {shared[n // 5]}" if n < 80 else "") for n in range(200)
        ]
    split = splitter({name: corpus[name] for name in order}, 0.1)
    assert split.found["a"]["common"] == 3 and split.found["b"]["common"] is None
    others = [name for name in "bc" if name in order]
    sides = np.concatenate([split.held_out[name][:80].reshape(16, 5) for name in others], axis=1)
    assert (sides.all(axis=1) | ~sides.any(axis=1)).all(), "groups torn over both sides"
    assert split.found["b"]["groups"] == 16 and split.found["b"]["documents"] == 80


def test_boilerplate_of_all_documents_does_not_make_one_group() -> None:
    licence = " ".join(words(7, 40))
    split = splitter({"code": [f"{licence}\n{' '.join(words(n + 50, 40))}" for n in range(200)]}, 0.1)
    assert split.found["code"]["common"] == 100 and split.found["code"]["documents"] == 0
    assert 10 <= split.held_out["code"].sum() <= 40


def test_memory_is_bounded_and_long_overlaps_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "MAX_HASHES", 20_000)
    half = [" ".join(words(n, 400)) for n in range(100)]
    split = splitter({"a": [half[n // 2] + " " + " ".join(words(900 + n, 400)) for n in range(200)]}, 0.1)
    assert split.facts["kept_share"] == 1 / 8  # of some 157,600 hashes
    held_out = split.held_out["a"].reshape(100, 2)
    assert (held_out[:, 0] == held_out[:, 1]).all() and held_out.any()


def test_domains_that_cannot_be_split(tmp_path: Path, tokenizer: Path) -> None:
    copies = ["the same words"] * 3
    with pytest.raises(DataError, match="copies: one document"):
        splitter({"copies": copies, "other": ["a b", "c d"]}, 0.1)
    overlapping = [" ".join(words(1, 30)) + f" end {n}" for n in range(2)]
    split = splitter({"two": overlapping}, 0.1)  # kept apart only as far as that is possible, and said
    assert split.held_out["two"].sum() == 1 and split.found["two"]["common"] == 0
    write_lines(tmp_path / "two.jsonl", overlapping)
    manifest, _ = prepare(tmp_path, tmp_path.parent / "out", tokenizer, 0.1, workers=1, progress=False)
    assert manifest.domains["two"]["near_duplicates"]["common"] == 0


def test_the_embedded_corpus_does_not_leak() -> None:
    """Runs of 13 words of held-out code and documentation that stand in what is trained on."""
    corpus = {
        name: list(texts) for name, texts in read_corpus(embedded_corpus()).items() if name in ("code_py", "docs_en")
    }
    split = splitter(corpus, 0.05)
    for name, texts in corpus.items():
        grams = [set(gram_hashes(text).tolist()) for text in texts]
        held_out = split.held_out[name]
        trained = set().union(*(g for g, held in zip(grams, held_out, strict=True) if not held))
        shared = [len(g & trained) for g, held in zip(grams, held_out, strict=True) if held]
        assert len(shared) >= 3 and sum(shared) == 0
        assert split.found[name]["documents"] > 20
