"""A sentencepiece model as a tokenizer that AutoTokenizer loads, with the same ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from mocte_ds.errors import CheckpointError
from mocte_ds.shown import one_line

_SPACE = "\u2581"
# Spaces, tabs, newlines, digits, code, accents, scripts without pieces, emoji, text that looks like a byte.
_PROBES = (
    "The  river\n\n\tlight 1234 (x += 1)\r\n",
    " leading and trailing ",
    "größe ἀρχή 日本語 🙂 \u00a0 e\u0301",
    "def f(a_b):\n    return {'k': a_b[0]}  # ok\n",
    "l'été où ¿qué?",
    "<0x41> < s >",
    "        " * 9 + "\n" * 7 + "aaaaaaa",
)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that begin, end and pad a text; None where the tokenizer has none."""

    bos: int | None
    eos: int | None
    pad: int | None

    def fields(self) -> dict[str, int | None]:
        """As a transformers config names them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


class SourceTokenizer:
    """The sentencepiece model that a run was trained with."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            CheckpointError: no such file, or no sentencepiece model of the kinds BPE and unigram.
        """
        self.path = path
        try:
            self.content = path.read_bytes()
            if not self.content:
                raise ValueError("the file is empty")
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.content)
            self.kind = _model_type(self.content)
        except OSError as error:
            raise CheckpointError(f"the tokenizer {path} cannot be read: {error}; name it with --tokenizer.") from error
        except Exception as error:  # sentencepiece and protobuf raise many types
            raise CheckpointError(f"{path} is not a sentencepiece model: {one_line(error)}") from error
        if self.kind not in ("bpe", "unigram"):
            raise CheckpointError(f"{path} is of the kind {self.kind}; only 'bpe' and 'unigram' can be exported.")

    @property
    def special(self) -> SpecialIds:
        """Ids of what begins a text, of </s>, and of the padding, which is </s> where there is no piece for it.

        A text begins with </s>, the end of the document before it, as in training; no document there holds <s>.
        """
        end, pad = self.pieces.eos_id(), self.pieces.pad_id()
        known = [number if number >= 0 else None for number in (end, end, pad if pad >= 0 else end)]
        return SpecialIds(*known)

    def require_fit(self, vocab_size: int) -> None:
        """Raise CheckpointError where the model has no embedding for some piece."""
        if self.pieces.vocab_size() > vocab_size:
            raise CheckpointError(
                f"the tokenizer {self.path} has {self.pieces.vocab_size()} pieces, the model only {vocab_size} "
                "embeddings: it belongs to another run; name the right one with --tokenizer."
            )

    def write(self, out: Path, max_length: int) -> None:
        """Write tokenizer.json, tokenizer_config.json and the sentencepiece model itself.

        As all texts of the training, every text begins with </s>, which this tokenizer puts in front by itself.

        Ids are sentencepiece's, with the exceptions of this format: the text of a special token ("</s>") becomes that
        token; the character U+2581 counts as a space; and a unigram model may cut a very long run of one character
        into the same pieces in another order, because rounding decides between equally likely cuts.

        Args:
            out: the exported folder; its config.json is there already, because it decides what AutoTokenizer makes.
            max_length: longest context.

        Raises:
            CheckpointError: a file cannot be written, or ids or texts differ between the two.
        """
        from transformers import PreTrainedTokenizerFast

        names = {"bos": self.special.bos, "eos": self.special.eos, "pad": self.special.pad}
        special = {f"{name}_token": self.pieces.id_to_piece(i) for name, i in names.items() if i is not None}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=self.convert(),
            unk_token=self.pieces.id_to_piece(self.pieces.unk_id()),
            **special,
            model_max_length=max_length,
            clean_up_tokenization_spaces=False,
            add_prefix_space=False,
            add_bos_token="bos_token" in special,
        )
        try:
            tokenizer.save_pretrained(out)
            (out / "tokenizer.model").write_bytes(self.content)
        except Exception as error:  # tokenizers reports a full disk as a bare Exception
            raise CheckpointError(f"could not write the tokenizer to {out}: {error}.") from error
        self._compare(out)

    def convert(self) -> Tokenizer:
        """The same tokenizer in the `tokenizers` library."""
        pieces, count = self.pieces, self.pieces.vocab_size()
        names = [pieces.id_to_piece(i) for i in range(count)]
        if self.kind == "unigram":
            model: Any = models.Unigram(self._scores(names), unk_id=pieces.unk_id(), byte_fallback=True)
        else:
            vocab = {name: i for i, name in enumerate(names)}
            model = models.BPE(
                vocab, self._merges(vocab), byte_fallback=True, fuse_unk=True, unk_token=names[pieces.unk_id()]
            )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        special = [name for i, name in enumerate(names) if pieces.is_control(i) or pieces.is_unknown(i)]
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
        return tokenizer

    def _scores(self, names: list[str]) -> list[tuple[str, float]]:
        """Log probabilities; bytes stand for unknown characters only, never for a text such as "<0x41>"."""
        scores = {i: self.pieces.get_score(i) for i in range(len(names)) if self._is_normal(i)}
        # Below any way to spell the six characters, where an unknown one costs 10 more than the rarest piece.
        never = 7 * (min(scores.values(), default=0.0) - 10)
        return [(name, scores.get(i, never)) for i, name in enumerate(names)]

    def _merges(self, vocab: dict[str, int]) -> list[tuple[str, str]]:
        """Pairs in the order in which BPE joins them: by the rank of what they make, which is minus its score."""
        ordered = sorted(filter(self._is_normal, vocab.values()), key=lambda i: -self.pieces.get_score(i))
        merges = []
        for number in ordered:
            piece = self.pieces.id_to_piece(number)
            splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            splits = [(a, b) for a, b in splits if a in vocab and b in vocab]
            merges.extend(sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))
        return merges

    def _is_normal(self, number: int) -> bool:
        pieces = self.pieces
        return not (pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number))

    def _compare(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for text in _PROBES:
            ids = tokenizer.encode(text, add_special_tokens=False)
            expected = self.pieces.encode(text)
            if ids != expected and not (self.kind == "unigram" and sorted(ids) == sorted(expected)):
                raise CheckpointError(
                    f"{self.path}: as a transformers tokenizer it gives other ids than sentencepiece for {text!r}; "
                    "only models of tools/train_tokenizer.py (no normalisation, no added space) are known to convert."
                )
            if tokenizer.decode(ids) != text:
                raise CheckpointError(f"{self.path}: as a transformers tokenizer it does not give {text!r} back.")


def _model_type(content: bytes) -> str:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(content)
    kinds = sentencepiece_model_pb2.TrainerSpec.ModelType
    return kinds.Name(proto.trainer_spec.model_type).lower()
