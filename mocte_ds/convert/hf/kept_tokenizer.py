"""The tokenizer of an imported model, handed on unchanged, and whichever tokenizer a run was trained with."""

import shutil
from pathlib import Path

from mocte_ds.convert.hf.tokenizer import SourceTokenizer, SpecialIds
from mocte_ds.data.hf_tokenizer import FILES, HFTokenizer
from mocte_ds.data.stored_tokenizer import FOLDER, tokenizer_in
from mocte_ds.errors import CheckpointError
from mocte_ds.json_files import read_object

CONFIG_FILE = "config.json"
_TOKENIZERS = [name for name in FILES if name not in (CONFIG_FILE, "generation_config.json")]


class KeptTokenizer:
    """The files of a Hugging Face tokenizer; the same interface as :class:`SourceTokenizer`.

    A folder without any has the ids of special tokens in the model's config, and nothing else.
    """

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            DataError: it is damaged or incomplete.
        """
        self.path = path
        self.tokenizer = HFTokenizer(path) if any((path / name).is_file() for name in _TOKENIZERS) else None
        """None: there is none."""

    @property
    def special(self) -> SpecialIds:
        """Ids as the model's config has them, else as the tokenizer's.

        Raises:
            CheckpointError: the config is damaged, or names something else than ids.
        """
        file, found = self.path / CONFIG_FILE, self.tokenizer.special if self.tokenizer else {}
        values = read_object(file, CheckpointError, foreign=True) if file.exists() else {}
        ids = {name: values.get(f"{name}_token_id", found.get(name)) for name in ("bos", "eos", "pad")}
        for name, value in ids.items():
            for number in value if isinstance(value, list) else [value]:  # some models end by one of several
                if number is not None and type(number) is not int:
                    raise CheckpointError(f"{file}: {name}_token_id = {str(value)[:80]!r} is not the id of a token.")
        return SpecialIds(**ids)

    def require_fit(self, vocab_size: int) -> None:
        """Raise CheckpointError where the model has no embedding for some token."""
        if self.tokenizer and self.tokenizer.vocab_size > vocab_size:
            raise CheckpointError(
                f"the tokenizer {self.path} has {self.tokenizer.vocab_size} tokens, the model only {vocab_size} "
                "embeddings: it belongs to another model."
            )

    def write(self, out: Path, _max_length: int) -> None:
        """Copy its files, but for the model's config.

        Args:
            out: the exported folder.

        Raises:
            CheckpointError: a file cannot be written.
        """
        try:
            for path in self._files():
                if path.name != CONFIG_FILE:
                    shutil.copyfile(path, out / path.name)
        except OSError as error:
            raise CheckpointError(f"could not write the tokenizer to {out}: {error}.") from error

    def keep(self, start: Path) -> Path:
        """Copy its files into an imported model.

        Returns:
            Their folder.

        Raises:
            OSError: they cannot be written.
        """
        folder = start / FOLDER
        folder.mkdir()
        for path in self._files():
            shutil.copyfile(path, folder / path.name)
        return folder

    def _files(self) -> list[Path]:
        if self.tokenizer:
            return self.tokenizer.files()
        return [self.path / name for name in (CONFIG_FILE, "generation_config.json") if (self.path / name).is_file()]


def run_tokenizer(named: str | Path | None, trained: str | None, folder: Path) -> SourceTokenizer | KeptTokenizer:
    """The tokenizer of a run, wherever the run's folder lies by now.

    Args:
        named: a sentencepiece model, or a folder with a tokenizer.json; None: look for it.
        trained: where the checkpoint says that it is.
        folder: of the checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
        DataError: likewise, for a folder.
    """
    # Beside the checkpoints of a run, or in an imported model.
    beside = [tokenizer_in(place) for place in (folder.parent.parent, folder.parent)]
    places = [Path(named)] if named else [Path(trained), *beside] if trained else beside
    for path in places:
        if path.is_dir():
            return KeptTokenizer(path)
        if path.is_file() or named:
            return SourceTokenizer(path)
    raise CheckpointError(
        f"no tokenizer: the checkpoint names {trained or 'none'} and {beside[0]} is not there either; name the "
        "sentencepiece model, or the folder of a tokenizer.json, with --tokenizer."
    )
