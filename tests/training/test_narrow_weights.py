"""A model made in bf16 has the weights of one that is made in fp32 and rounded, and never takes the memory of both."""

import ctypes
from pathlib import Path

import pytest
import torch

from mocte_ds.benchmark.measure.memory import Peak
from mocte_ds.errors import ConfigError
from mocte_ds.training.model import Forward, TransformersModel, make_model
from tests.spawn import spawn

SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = (
    "bloom",
    "falcon",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gptj",
    "llama",
    "mamba",
    "mixtral",
    "mpt",
    "nanochat",
    "olmoe",
    "opt",
    "phi3",
    "qwen2_moe",
    "qwen3",
)
MB = 1 << 20
MMAP_THRESHOLD = -3  # of malloc.h


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_numbers_are_those_of_fp32(kind: str, dtype: torch.dtype) -> None:
    values = {**SIZES, **(SPECIAL if kind == "phi3" else {})}
    if kind == "mamba":
        del values["num_attention_heads"]
    config = TransformersModel(hf={"model_type": kind, **values})
    torch.manual_seed(3)
    expected = make_model(config)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    found = make_model(config, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), after)
    assert any(p.std() > 0 for p in found.parameters())
    for (name, wide), (other, narrow) in zip(expected.named_parameters(), found.named_parameters(), strict=True):
        assert name == other and narrow.dtype == dtype and torch.equal(wide.to(dtype), narrow), name
    for (name, wide), (other, narrow) in zip(expected.named_buffers(), found.named_buffers(), strict=True):
        assert name == other and wide.dtype == narrow.dtype and torch.equal(wide, narrow), name


def test_a_folder_is_loaded_in_the_type_of_the_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = make_model(TransformersModel(hf={"model_type": "llama", **SIZES}))
    theirs.save_pretrained(tmp_path)
    narrow = make_model(TransformersModel(pretrained=str(tmp_path)), dtype=torch.bfloat16)
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, theirs.get_parameter(name).to(torch.bfloat16))


def test_a_model_whose_tokens_see_later_ones_is_refused_in_bf16_too() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        Forward(make_model(TransformersModel(hf={"model_type": "llama", **SIZES}), dtype=torch.bfloat16), 5)
        with pytest.raises(ConfigError, match="tokens see later ones"):
            Forward(make_model(TransformersModel(hf={"model_type": "bert", **SIZES}), dtype=torch.bfloat16), None)


def peaks() -> list[int]:
    """Bytes that making a model adds to a process at most, in bf16 and in fp32, and how many weights it has."""
    sizes = {**SIZES, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16}
    config, found = TransformersModel(hf={"model_type": "llama", **sizes}), []
    # As for the matrices of a large model: what is freed goes back at once.
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, MB)
    make_model(TransformersModel(hf={"model_type": "llama", **SIZES}), dtype=torch.bfloat16)  # imports
    for dtype in (torch.bfloat16, torch.float32):
        peak = Peak()
        model = make_model(config, dtype=dtype)
        found.append(peak.to_dict()["added_bytes"])
        numbers = sum(parameter.numel() for parameter in model.parameters())
        del model
    return [*found, numbers]


def test_memory() -> None:
    """At most the narrow model and a layer, a sixteenth of the model, in fp32; some MB for what else happens."""
    (narrow, wide, numbers) = spawn(peaks, 1, timeout=100)[0]
    assert narrow < 2 * numbers + 4 * numbers / 16 + 30 * MB, (narrow / MB, numbers)
    assert wide > 4 * numbers - 10 * MB
