"""Damaged and hostile folders in Hugging Face and megatron-core format: each is refused by a message, or is unharmed.

    python -m tests.convert.hf.fuzz --seed 1 --minutes 10

A case changes one thing in a copy of a folder and hands it to one reader. Accepted is a MocteError; or success,
and of an export of ours only where it is still the same model, which the reader's result shows.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mocte_ds.convert.hf.imported import import_hf
from mocte_ds.convert.hf.shards import Shards
from mocte_ds.data.stored_tokenizer import open_tokenizer
from mocte_ds.errors import MocteError
from mocte_ds.evaluation.network import load_network
from mocte_ds.ownership.checksums import checksum, write_checksums

SECONDS = 40
"""A case that takes longer hangs, also on a machine with other work."""
_NUMBERS = (0, -1, 1, 3, 7, 2**31, 2**63, 10**9, 10**18, 10**400, -(10**12), 0.5, float("nan"), float("inf"), 1e-320)
_VALUES = (*_NUMBERS, None, True, "", "x", "1", "a\0b", "é" * 5000, [], [1, 2], ["x"], {}, {"a": {"b": 1}}, [None])


class Slow(BaseException):
    """A case hangs."""


def write_folders(where: Path) -> dict[str, Path]:
    """Folders as others write them, and two with checksums as our export writes them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, **heads)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=1)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    }
    words = {word: i for i, word in enumerate(["<s>", "</s>", "[UNK]", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folders = {}
    for name, model in made.items():
        for ours in (False, True):
            folder = folders[f"{name}{'-ours' if ours else ''}"] = where / f"{name}{'-ours' if ours else ''}"
            model.save_pretrained(folder, max_shard_size="8KB" if name == "gpt2" else "1GB")
            tokenizer.save(str(folder / "tokenizer.json"))
            config = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            if ours:
                shards = Shards(folder)
                write_checksums(folder, {tensor: checksum(shards.read(tensor)) for tensor in shards.files})
    return folders


def evaluated(folder: Path, _out: Path) -> Any:
    """Logits and ids, which say whether the model is still the same."""
    network, tokenizer = load_network(folder)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = network.eval()(input_ids=ids).logits
    return logits.float(), tokenizer("a b c").input_ids


def imported(folder: Path, out: Path) -> Any:
    """Weights of the start."""
    facts = import_hf(folder, out)
    return facts["parameters"], facts["model"].get("num_hidden_layers", facts["model"].get("n_layer"))


def tokenized(folder: Path, _out: Path) -> Any:
    """Ids of a text."""
    tokenizer = open_tokenizer(folder)
    return tokenizer.encode("a b c d"), tokenizer.eod_id


READERS: dict[str, Callable[[Path, Path], Any]] = {"evaluate": evaluated, "import": imported, "tokenizer": tokenized}


def change(folder: Path, rng: random.Random) -> str:
    """Do one harm to a folder; what it was."""
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.name != "generation_config.json"])
    harms = [_flip, _cut, _remove, _garble]
    if path.suffix == ".json":
        harms += [_value, _value, _value, _deep, _twice, _grow]
    if path.suffix == ".safetensors":
        harms += [_header, _header, _header, _tensor]
    harm = rng.choice(harms)
    return f"{harm.__name__} {path.name}: {harm(path, rng)}"


def _flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit}"


def _cut(path: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"to {size} bytes"


def _remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    how = rng.choice(["gone", "folder", "dangling", "endless"])
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.symlink_to("nowhere" if how == "dangling" else "/dev/zero")
    return how


def _garble(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    length = rng.randrange(1, 40)
    content[start : start + length] = rng.randbytes(rng.randrange(40))
    path.write_bytes(content)
    return f"{length} bytes at {start}"


def _value(path: Path, rng: random.Random) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    place, key = values, None
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    value = rng.choice(_VALUES)
    if isinstance(place, dict) and rng.random() < 0.15:
        del place[key]
        value = "removed"
    else:
        place[key] = value
    sys.set_int_max_str_digits(0)
    path.write_text(json.dumps(values), encoding="utf-8")
    return f"{key} = {str(value)[:30]}"


def _deep(path: Path, rng: random.Random) -> str:
    levels = rng.choice([50, 900, 200_000])
    path.write_text('{"a":' + rng.choice(["[", '{"a":']) * levels)
    return f"{levels} levels"


def _twice(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8").rstrip()
    key = rng.choice(list(json.loads(text)) or ["a"])
    path.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(rng.choice(_VALUES))}}}", encoding="utf-8")
    return key


def _grow(path: Path, _rng: random.Random) -> str:
    with open(path, "r+b") as file:
        file.truncate(1 << 33)  # takes no room on the disk
    return "8 GB of zeros"


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(path: Path, header: Any, rest: bytes, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)


def _header(path: Path, rng: random.Random) -> str:
    header, rest = _parts(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, how = header[name], rng.randrange(9)
    if how == 0:
        entry["shape"] = rng.choice([[2**62, 0], [2**63, 2], [2**32, 2**32], [-1], [1] * 5000, [0], [0, 10**15]])
    elif how == 1:
        entry["data_offsets"] = rng.choice([[8, 0], [0, 2**63], [-4, 4], [0, len(rest) + 8], [4, 4], []])
    elif how == 2:
        entry["dtype"] = rng.choice(["F64", "F8_E4M3", "I64", "BOOL", "X", 1, "BF16"])
    elif how == 3:
        header[name + ".x"] = dict(entry)
    elif how == 4:
        header[rng.choice(["", "x", "model.layers.99999999.x.weight", "a\0b", "é" * 3000])] = header.pop(name)
    elif how == 5:
        entry["shape"] = entry["shape"][::-1]
    elif how == 6:
        _write(path, header, rest, rng.choice([2**60, 2**63, 0, 1, len(rest) + 10**6]))
        return "length"
    elif how == 7:
        header["empty"] = {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}
    else:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    _write(path, header, rest)
    return f"{how} {name}"


def _tensor(path: Path, rng: random.Random) -> str:
    header, rest = _parts(path)
    value = rng.choice([float("nan"), float("inf"), 3e38])
    at = 4 * rng.randrange(max(1, len(rest) // 4))
    _write(path, header, rest[:at] + struct.pack("<f", value) + rest[at + 4 :])
    return f"{value} at {at}"


def same(first: Any, second: Any) -> bool:
    """Whether two results are those of one model."""
    if isinstance(first, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, tuple):
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def fuzz(where: Path, seed: int, cases: int | None = None, minutes: float = 60.0) -> tuple[Counter, list[str]]:
    """Run cases.

    Args:
        where: an empty folder to work in.
        seed: of all harms.
        cases: how many; None: until the time is over.
        minutes: for how long at most.

    Returns:
        How often each outcome came, and a text for each failure: a bare error, a hang, or a damaged export of ours that
        is taken for another model.
    """
    warnings.simplefilter("ignore")
    rng, counts, failures = random.Random(seed), Counter(), []
    folders = write_folders(where / "good")
    wanted = {
        (name, reader): READERS[reader](path, where / "o")
        for name, path in folders.items()
        for reader in READERS
        if not shutil.rmtree(where / "o", ignore_errors=True)
    }
    end = time.monotonic() + 60 * minutes
    signal.signal(signal.SIGALRM, _alarm)
    number = 0
    while (cases is None or number < cases) and time.monotonic() < end:
        number += 1
        name, reader = rng.choice(sorted(wanted))
        folder = where / "case"
        for old in (folder, where / "out"):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(folders[name], folder)
        what = f"seed {seed} case {number}: {reader} {name}: {change(folder, rng)}"
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                result = READERS[reader](folder, where / "out")
            outcome = "the same" if same(result, wanted[name, reader]) else "another model"
            if outcome == "another model" and name.endswith("-ours"):
                failures.append(f"{what}: another model was taken for the export")
        except MocteError as error:
            outcome = "refused"
            if len(str(error)) > 3000 or not str(error).strip():
                failures.append(f"{what}: a message of {len(str(error))} characters")
        except BaseException as error:  # panics of libraries are not Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "bare"
            failures.append(
                f"{what}: {type(error).__name__}: {str(error)[:200]} {traceback.format_exc(limit=-3)[-500:]}"
            )
        finally:
            signal.alarm(0)
        counts[f"{reader} {outcome}"] += 1
    return counts, failures


def _alarm(*_: Any) -> None:
    raise Slow(f"more than {SECONDS} s")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        counts, failures = fuzz(Path(where), args.seed, minutes=args.minutes)
    print(dict(sorted(counts.items())), f"{sum(counts.values())} cases, {len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
