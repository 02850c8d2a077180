"""The exported tokenizer gives sentencepiece's ids, and texts back, for BPE and unigram models."""

import io
import itertools
import json
import random
import resource

import sentencepiece
from pytest import fixture, mark, param, raises
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig
from transformers.models.glm4_moe import Glm4MoeConfig

from mocte_ds.convert.hf.tokenizer import SourceTokenizer
from mocte_ds.data import Tokenizer, embedded_corpus, read_corpus, train_tokenizer
from mocte_ds.errors import CheckpointError

CLASSES = [MixtralConfig, Qwen2MoeConfig, Glm4MoeConfig, LlamaConfig, GPT2Config]
# Real text in four domains, and runs of equal characters.
TEXTS = {
    name: [text[:3000] for text in itertools.islice(texts, 8)]
    for name, texts in read_corpus(embedded_corpus()).items()
    if name in ("wiki_fr", "code_py", "books_en", "math")
}
TEXTS["runs"] = [character * n for character in (" ", "\n", "a", "=") for n in range(1, 30)]
FIXED = [
    "",
    " ",
    "  two  spaces\n\n\ttab \n",
    " leading and trailing ",
    "x = 1234567890\r\n",
    "日本語 ἀρχή 🙂👩‍👩‍👧 e\u0301 \ufeff \u00a0\u3000\u2028",
    "\0\x07\x0b\x0c\x7f\x85",
    "<0x41><0xE2> < s > <unknown> [PAD]",
    "a" * 40 + " " * 40 + "\n" * 40 + "\t" * 9 + "a" * 7 + "aa" * 3,
    "stone" * 30,
]


@fixture(scope="module", params=["bpe", "unigram"])
def model(request, tmp_path_factory):
    """A sentencepiece model of the kind that the runs use."""
    out = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    return train_tokenizer(TEXTS, out, 1100, request.param)


def exported(model, folder, config: PreTrainedConfig | None = None):
    """As AutoTokenizer finds it beside a model of some class."""
    (config or MixtralConfig()).save_pretrained(folder)
    SourceTokenizer(model).write(folder, 77)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def random_texts(pieces: sentencepiece.SentencePieceProcessor, count: int) -> list[str]:
    """Pieces, runs of whitespace, digits and characters without a piece, in any order."""
    rng = random.Random(0)
    known = [pieces.id_to_piece(i).replace("\u2581", " ") for i in range(260, pieces.vocab_size())]
    strange = ["  ", "\n", "\t", " \n ", "0", "17", "é", "ß", "Ж", "漢", "🙂", "\u200d", "\u0301", "<", "0x41", "x>"]
    parts = [rng.choices(known if rng.random() < 0.7 else strange, k=rng.randint(1, 12)) for _ in range(4 * count)]
    return ["".join(sum(parts[i : i + 4], [])) for i in range(0, len(parts), 4)]


def test_ids_are_those_of_sentencepiece_and_texts_come_back(model, tmp_path):
    tokenizer, mine = exported(model, tmp_path), Tokenizer(model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    longest = 0
    for text in FIXED + sum(TEXTS.values(), []) + random_texts(pieces, 1500):
        first, *ids = tokenizer.encode(text, add_special_tokens=True)
        assert first == mine.eod_id  # as a document follows the end of another
        assert ids == pieces.encode(text) == mine.encode(text), repr(text)
        assert tokenizer.decode(ids) == text, repr(text)
        longest = max(longest, max((len(pieces.id_to_piece(i)) for i in ids), default=0))
    assert longest > 5 and any(pieces.is_byte(i) for i in tokenizer.encode("漢"))


@mark.parametrize("kind", CLASSES)
def test_ids_do_not_depend_on_the_class_of_the_model(model, kind, tmp_path):
    tokenizer = exported(model, tmp_path, kind())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in FIXED + random_texts(pieces, 30):
        assert tokenizer(text).input_ids == [2, *pieces.encode(text)]  # as a document follows the end of another
    assert tokenizer.batch_decode([pieces.encode(text) for text in FIXED]) == FIXED


def test_special_tokens_padding_and_length(model, tmp_path):
    tokenizer = exported(model, tmp_path)
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [
        0,
        2,
        2,
        3,
    ]
    assert tokenizer.model_max_length == 77
    assert tokenizer.decode([1, *tokenizer.encode("stone"), 2, 3], skip_special_tokens=True) == "stone"
    batch = tokenizer(["a stone", "a"], padding=True)
    assert set(batch.input_ids[1]) >= {3} and batch.attention_mask[1][-1] == 0
    assert (tmp_path / "tokenizer.model").read_bytes() == model.read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    text = FIXED[5]
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode(text) == tokenizer.encode(text)
    special = SourceTokenizer(model).special
    assert (special.bos, special.eos, special.pad) == (2, 2, 3)


def trained(**options) -> bytes:
    """A sentencepiece model with other options than ours."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sum(TEXTS.values(), [])), model_writer=out, minloglevel=2, num_threads=1, **options
    )
    return out.getvalue()


def test_without_a_piece_for_padding(tmp_path):
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    path = tmp_path / "own.model"
    path.write_bytes(
        trained(vocab_size=420, model_type="bpe", byte_fallback=True, allow_whitespace_only_pieces=True, **options)
    )
    assert SourceTokenizer(path).special.pad == 2
    tokenizer = exported(path, tmp_path)
    assert tokenizer.pad_token_id == 2 and tokenizer.encode("a  stone") == [2, *Tokenizer(path).encode("a  stone")]


@mark.parametrize(
    ("make", "message"),
    [
        param(
            lambda: trained(vocab_size=420, model_type="bpe", byte_fallback=True), "other ids than", id="normalising"
        ),
        param(lambda: trained(vocab_size=200, model_type="unigram"), "other ids than", id="no bytes"),
        param(lambda: trained(vocab_size=200, model_type="word"), "kind word; only 'bpe' and 'unigram'", id="words"),
        param(lambda: b"", "is not a sentencepiece model", id="empty"),
        param(lambda: b"\x0a\x05 no model at all", "is not a sentencepiece model", id="garbage"),
    ],
)
def test_other_models_are_refused(make, message, tmp_path):
    path = tmp_path / "other.model"
    path.write_bytes(make())
    with raises(CheckpointError, match=message):
        exported(path, tmp_path)


def test_missing_or_too_large(model, tmp_path):
    with raises(CheckpointError, match="missing.model cannot be read.*--tokenizer"):
        SourceTokenizer(tmp_path / "missing.model")
    source = SourceTokenizer(model)
    size = source.pieces.vocab_size()
    source.require_fit(size)
    with raises(CheckpointError, match=f"has {size} pieces, the model only {size - 1}"):
        source.require_fit(size - 1)


def test_a_full_disk(model, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with raises(CheckpointError, match="could not write the tokenizer"):
            SourceTokenizer(model).write(tmp_path, 77)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_export_whose_ids_changed_is_noticed(model, tmp_path, monkeypatch):
    convert = SourceTokenizer.convert

    def wrong(self):
        changed = json.loads(convert(self).to_str())
        changed["normalizer"] = {"type": "Lowercase"}
        from tokenizers import Tokenizer as Fast

        return Fast.from_str(json.dumps(changed))

    monkeypatch.setattr(SourceTokenizer, "convert", wrong)
    with raises(CheckpointError, match="other ids than sentencepiece"):
        exported(model, tmp_path)
