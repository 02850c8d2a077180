"""Attention of short contexts in bf16 on a CPU: what transformers compute, where it is faster, and nowhere else."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from mocte_ds import cpu_attention
from mocte_ds.base_model import base_facts
from mocte_ds.training.model import Forward, TransformersModel, make_model

SIZES = {"vocab_size": 40, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
END = 2
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 3, "sliding_window": 5},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 20},
    "phi3": {},
}


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(1)
    sizes = {key: value for key, value in SIZES.items() if kind != "gpt2" or key != "intermediate_size"}
    values = {"model_type": kind, **sizes, "initializer_range": 0.2, **MODELS[kind], **more}
    return make_model(TransformersModel(hf=values), END)


def called(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Logits, and how many layers have taken the plain way."""
    with patch.object(cpu_attention, "plain_attention", wraps=cpu_attention.plain_attention) as plain:
        return model(**inputs).logits, plain.call_count


@pytest.mark.parametrize("end", [None, END], ids=["", "documents"])
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_attention_of_transformers(kind: str, end: int | None) -> None:
    """Logits and gradients in bf16 are as near to fp32 as those of scaled_dot_product_attention."""
    ids = torch.randint(3, 40, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 7] = ids[1, 20] = END
    found: dict[str, torch.Tensor] = {}
    for name, dtype in (("exact", torch.float32), ("sdpa", torch.bfloat16), ("plain", torch.bfloat16)):
        model = made(kind)
        if name != "plain":
            model.set_attn_implementation("sdpa")
        model = model.to(dtype)
        logits, calls = called(model, Forward(model, end).inputs(ids))
        assert calls == (2 if name == "plain" else 0)
        logits.float().square().mean().backward()
        gradients = torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])
        found[name] = torch.cat([logits.detach().float().flatten(), gradients / gradients.norm()])
    off = {name: (found[name] - found["exact"]).norm() / found["exact"].norm() for name in ("sdpa", "plain")}
    assert off["plain"] < 1.3 * off["sdpa"] + 1e-3 and off["plain"] < 0.05, off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [512, 513])
def test_only_short_contexts_in_bf16(dtype: torch.dtype, length: int) -> None:
    model = made("llama").to(dtype)
    _, calls = called(model, {"input_ids": torch.zeros(1, length, dtype=torch.int64)})
    assert calls == (2 if dtype is torch.bfloat16 and length == 512 else 0)


def test_dropout_of_attention_stays() -> None:
    model = made("gpt2", attn_pdrop=0.5).to(torch.bfloat16)
    ids = torch.randint(3, 40, (1, 24))
    (first, calls), (second, _) = (called(model, {"input_ids": ids}) for _ in range(2))
    assert not calls and not torch.equal(first, second)
    assert called(model.eval(), {"input_ids": ids, "use_cache": False})[1] == 2


def test_generation_with_a_cache() -> None:
    """A step of one query on many keys goes to transformers' own attention."""
    model = made("llama").to(torch.bfloat16).eval()
    ids = torch.randint(3, 40, (1, 9))
    whole = model(input_ids=ids).logits
    start = model(input_ids=ids[:, :5], use_cache=True)
    _, calls = called(model, {"input_ids": ids[:, 5:6], "past_key_values": start.past_key_values})
    rest = model(input_ids=ids[:, 5:], past_key_values=model(input_ids=ids[:, :5], use_cache=True).past_key_values)
    assert not calls
    torch.testing.assert_close(rest.logits, whole[:, 5:], rtol=0.05, atol=0.05)


def test_nothing_of_it_is_stored(tmp_path: Any) -> None:
    model = made("llama")
    model.save_pretrained(tmp_path)
    assert cpu_attention.NAME not in (tmp_path / "config.json").read_text()
    assert cpu_attention.NAME not in repr(base_facts(model))
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa" and model.config._attn_implementation == cpu_attention.NAME


def test_another_choice_of_the_user_stays() -> None:
    model = made("llama")
    model.set_attn_implementation("eager")
    cpu_attention.use_cpu_attention(model)
    assert model.config._attn_implementation == "eager"


def test_a_class_that_asks_for_the_name_keeps_its_attention() -> None:
    """Sparse attention of DeepSeek-V3.2 is a mask under the name `sdpa`, and an argument under any other."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_v32"](num_hidden_layers=1))
    cpu_attention.use_cpu_attention(model)
    assert model.config._attn_implementation == "sdpa"
