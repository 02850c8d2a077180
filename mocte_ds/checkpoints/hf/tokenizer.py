"""A sentencepiece model as a tokenizer that AutoTokenizer loads, with the same ids."""

from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mocte_ds.errors import CheckpointError

_SPACE = "\u2581"
# Spaces, tabs, newlines, digits, code, accents, scripts without pieces of their own, emoji.
_PROBES = (
    "The  river\n\n\tlight 1234 (x += 1)\r\n",
    " leading and trailing ",
    "größe ἀρχή 日本語 🙂 \u00a0",
    "def f(a_b):\n    return {'k': a_b[0]}  # ok\n",
    "l'été où ¿qué?",
)


def export_tokenizer(model_path: Path, out: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the sentencepiece model itself.

    Args:
        model_path: sentencepiece model (BPE or unigram).
        out: the exported folder.
        max_length: longest context.

    Raises:
        CheckpointError: no such model, or ids or texts differ between the two.
    """
    if not model_path.is_file():
        raise CheckpointError(f"the tokenizer {model_path} is not there; name it with --tokenizer.")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_convert(pieces, model_path),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if pieces.pad_id() >= 0 else "</s>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    tokenizer.save_pretrained(out)
    (out / "tokenizer.model").write_bytes(model_path.read_bytes())
    _compare(pieces, out)


def _convert(pieces: sentencepiece.SentencePieceProcessor, path: Path) -> Tokenizer:
    count = pieces.vocab_size()
    vocab = {pieces.id_to_piece(i): i for i in range(count)}
    kind = _model_type(path)
    if kind == "unigram":
        scored = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(count)]
        model: Any = models.Unigram(scored, unk_id=pieces.unk_id(), byte_fallback=True)
    else:
        model = models.BPE(vocab, _merges(pieces, vocab), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [pieces.id_to_piece(i) for i in range(count) if pieces.is_control(i) or pieces.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer


def _merges(pieces: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which BPE joins them: by the rank of what they make, which is minus its score."""
    ordered = sorted((i for i in range(len(vocab)) if _is_normal(pieces, i)), key=lambda i: -pieces.get_score(i))
    merges = []
    for number in ordered:
        piece = pieces.id_to_piece(number)
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges.extend(sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))
    return merges


def _is_normal(pieces: sentencepiece.SentencePieceProcessor, number: int) -> bool:
    return not (pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number))


def _model_type(path: Path) -> str:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return "unigram" if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM else "bpe"


def _compare(pieces: sentencepiece.SentencePieceProcessor, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in _PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != pieces.encode(text):
            raise CheckpointError(f"the exported tokenizer gives other ids than sentencepiece for {text!r}.")
        if tokenizer.decode(ids) != text:
            raise CheckpointError(f"the exported tokenizer does not give {text!r} back.")
