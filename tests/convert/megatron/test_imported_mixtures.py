"""A run that starts from a mixture of transformers becomes a GPTModel that computes what the mixture computes."""

from pathlib import Path

import numpy as np
import torch
from pytest import mark, raises
from transformers import AutoModelForCausalLM

from mocte_ds.checkpoints.source import CheckpointSource
from mocte_ds.convert.megatron.convert import from_megatron, to_megatron
from mocte_ds.convert.megatron.cpu import one_process
from mocte_ds.errors import CheckpointError
from tests.convert.hf.test_import import VOCAB, write_folder
from tests.convert.hf.test_mixtures import CASES, empty_shared_experts
from tests.convert.megatron.in_megatron import load, logits_of
from tools import import_hf


def start(name: str, folder: Path) -> Path:
    """A start of a run from a mixture with random weights."""
    write_folder(folder / "theirs", CASES[name][0], change=empty_shared_experts)
    assert import_hf.main([str(folder / "theirs"), str(folder / "start")]) == 0
    return folder / "start"


@mark.parametrize("name", ["mixtral, a window", "qwen2moe, other widths", "qwen3moe, 2"])
def test_megatron_computes_what_the_mixture_computes(name: str, tmp_path: Path) -> None:
    checkpoint = start(name, tmp_path)
    to_megatron(checkpoint, tmp_path / "megatron")
    ids = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with one_process():
        found = logits_of(load(str(tmp_path / "megatron"), {}), ids)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
        expected = theirs(input_ids=ids).logits.numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    from_megatron(tmp_path / "megatron", tmp_path / "back")
    old, new = CheckpointSource(checkpoint), CheckpointSource(tmp_path / "back")
    assert old.shapes == new.shapes and old.state == new.state
    assert all(torch.equal(old.read(tensor), new.read(tensor)) for tensor in old.shapes)


def test_other_mixtures_are_refused(tmp_path: Path) -> None:
    with raises(CheckpointError, match="it holds a OlmoeForCausalLM; these can be converted: LlamaForCausalLM"):
        to_megatron(start("olmoe, 1", tmp_path), tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start", "theirs"]
