"""The tokenizer of a Hugging Face folder, for data that an imported model is trained on."""

import hashlib
from pathlib import Path
from typing import Any

from mocte_ds.errors import DataError
from mocte_ds.json_files import read_object, require_small
from mocte_ds.shown import one_line

MAIN_FILE = "tokenizer.json"
FILES = (
    MAIN_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)
"""What a tokenizer may consist of; the model's configs name special tokens where the tokenizer's own do not."""


class HFTokenizer:
    """A `tokenizer.json` with what lies beside it; the same interface as :class:`mocte_ds.data.tokenizer.Tokenizer`."""

    def __init__(self, path: str | Path) -> None:
        """Load it.

        Args:
            path: folder with a tokenizer.json.

        Raises:
            DataError: no such file, a damaged one, or no token that ends a text.
        """
        from tokenizers import Tokenizer

        self.path = Path(path)
        file = self.path / MAIN_FILE
        if not file.is_file():
            raise DataError(
                f"{self.path} has no {MAIN_FILE}; AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes "
                "it of the older files."
            )
        require_small(self.path, DataError)
        try:
            content = file.read_bytes()
            self._model = Tokenizer.from_str(content.decode("utf-8"))
            self._model.no_truncation()
            self._model.no_padding()
            # A text that spells a special token must not end a document.
            self._model.encode_special_tokens = True
            self._require_unchanged()
        except (KeyboardInterrupt, SystemExit, DataError):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and panics, which are none
            raise DataError(f"{file} cannot be read: {one_line(error)}.") from error
        self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """Largest id + 1."""
        self.special = {name: self._special(name) for name in ("bos", "eos", "pad")}
        """Ids of the tokens that begin, end and pad a text; None where there is none."""
        eod = self.special["eos"]
        if eod is None or not 0 <= eod < self.vocab_size:
            raise DataError(
                f"{self.path} names no token that ends a text: neither eos_token in tokenizer_config.json or "
                "special_tokens_map.json nor eos_token_id in config.json; add one, since it has to end every document."
            )
        self.eod_id: int = eod
        """Id of the token that ends every document."""
        self.begin = self._begin()
        """Ids that the tokenizer itself puts in front of every text, such as <s>; the model has learned texts so."""
        ends = " ".join(map(str, [self.eod_id, *self.begin]))
        self.sha256 = hashlib.sha256(content + ends.encode()).hexdigest()
        """Hash of tokenizer.json and the ids above."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text as a document: what the tokenizer puts in front of it, and no other special tokens."""
        return self.begin + self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text again, as far as the tokenizer keeps it."""
        return self._model.decode(ids, skip_special_tokens=False)

    def files(self) -> list[Path]:
        """The files that it consists of."""
        return [self.path / name for name in FILES if (self.path / name).is_file()]

    def _special(self, name: str) -> int | None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = self._json(file).get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                return self._model.token_to_id(text)
        found = self._json("config.json").get(f"{name}_token_id")
        found = found[0] if isinstance(found, list) and found else found
        return found if isinstance(found, int) else None

    def _begin(self) -> list[int]:
        """As AutoTokenizer has it; nothing where it is the end of the document before."""
        encoding = self._model.encode("a", add_special_tokens=True)
        added = encoding.special_tokens_mask
        begin = encoding.ids[: added.index(0)] if 0 in added else []
        return [] if begin == [self.eod_id] else begin

    def _require_unchanged(self) -> None:
        """Hold the files against what an export says of them, if they lie in one."""
        from mocte_ds.ownership.checksums import Checksums

        if sums := Checksums.read(self.path, DataError):
            sums.require_files(DataError, FILES)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_object(path, DataError, foreign=True) if path.exists() else {}
