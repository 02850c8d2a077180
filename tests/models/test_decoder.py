"""Our decoders compute what transformers' Llama and GPT-2 compute from the same weights, gradients included."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mocte_ds.errors import ConfigError
from mocte_ds.models import Decoder, DecoderConfig
from mocte_ds.models.layers import causal_attention

LLAMA = DecoderConfig("llama", 96, 32, 48, 3, 4, 2, max_positions=512)
GPT2 = DecoderConfig("gpt2", 96, 32, 64, 2, 4, max_positions=64)
IDS = torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(0))


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def stock_llama(config: DecoderConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=config.tied,
        )
    ).eval()  # fmt: skip


def stock_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).eval()  # fmt: skip


def as_gpt2(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights or gradients of our gpt2 style under the names and layouts of transformers."""
    theirs = {"wte.weight": ours["model.embed_tokens.weight"], "wpe.weight": ours["model.embed_positions.weight"]}
    for part in ("weight", "bias"):
        theirs[f"ln_f.{part}"] = ours[f"model.norm.{part}"]
        for i in range(2):
            old, new = f"model.layers.{i}", f"h.{i}"
            matrices = {
                f"{new}.attn.c_attn": torch.cat([ours[f"{old}.self_attn.{n}_proj.{part}"] for n in "qkv"]),
                f"{new}.attn.c_proj": ours[f"{old}.self_attn.o_proj.{part}"],
                f"{new}.mlp.c_fc": ours[f"{old}.mlp.c_fc.{part}"],
                f"{new}.mlp.c_proj": ours[f"{old}.mlp.c_proj.{part}"],
            }
            for name, value in matrices.items():
                theirs[f"{name}.{part}"] = value.t() if part == "weight" else value
            theirs[f"{new}.ln_1.{part}"] = ours[f"{old}.input_layernorm.{part}"]
            theirs[f"{new}.ln_2.{part}"] = ours[f"{old}.post_attention_layernorm.{part}"]
    return {f"transformer.{name}": value for name, value in theirs.items()}


def compare(ours: Decoder, theirs: torch.nn.Module, rename) -> None:
    """Logits, loss and the gradient of every parameter."""
    missing, unexpected = theirs.load_state_dict(rename(ours.state_dict()), strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if ours.config.tied else [])
    torch.testing.assert_close(ours(IDS), theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    labels = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss, reference = ours(IDS, labels), theirs(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    loss.backward()
    reference.backward()
    gradients = rename({name: parameter.grad for name, parameter in ours.named_parameters()})
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    ours = Decoder(replace(LLAMA, tie_embeddings=tied))
    randomise(ours)
    compare(ours, stock_llama(ours.config), lambda values: values)


def test_gpt2():
    ours = Decoder(GPT2)
    randomise(ours)
    compare(ours, stock_gpt2(), as_gpt2)


def test_late_positions():
    ours, theirs = Decoder(LLAMA), stock_llama(LLAMA)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(96, (1, 512))
    torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_bf16_is_near_fp32():
    """In bf16 on a CPU short contexts take another attention; both ways stay within bf16's rounding."""
    ours = Decoder(LLAMA)
    exact = ours(IDS)
    rounded = ours.bfloat16()(IDS)
    assert rounded.dtype is torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("heads", [2, 6])
def test_attention_in_bf16(heads):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, n, 40, 8, generator=generator).bfloat16() for n in (6, heads, heads))
    reference = F.scaled_dot_product_attention(
        q.double(),
        k.double().repeat_interleave(6 // heads, 1),
        v.double().repeat_interleave(6 // heads, 1),
        is_causal=True,
    )
    torch.testing.assert_close(causal_attention(q, k, v).double(), reference, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_activation_checkpointing_changes_nothing(config):
    gradients, calls = [], []
    for recompute in (False, True):
        model = Decoder(replace(config, activation_checkpointing=recompute))
        randomise(model)
        count = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model(IDS, IDS).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_labels_of_minus_100_do_not_count():
    model = Decoder(GPT2)
    labels = IDS.clone()
    labels[:, 5:] = -100
    torch.testing.assert_close(model(IDS, labels), model(IDS[:, :5], IDS[:, :5]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"head_dim": 12},
        {"qkv_bias": True},
        {"qk_norm": True, "head_dim": 6},
        {"head_norm": True, "ffn_sizes": [8] * (LLAMA.num_layers - 1) + [24]},
    ],
)
def test_num_params_with_grouped_queries(changes):
    config = replace(LLAMA, **changes)
    assert sum(p.numel() for p in Decoder(config).parameters()) == config.num_params()


def test_errors():
    with pytest.raises(ConfigError, match="num_heads = 5 does not divide"):
        replace(LLAMA, num_heads=5)
    with pytest.raises(ConfigError, match="num_kv_heads = 3 does not divide"):
        replace(LLAMA, num_kv_heads=3)
    with pytest.raises(ConfigError, match="must be even"):
        DecoderConfig("llama", 10, 9, 9, 1, 3)
    with pytest.raises(ConfigError, match="qkv_bias is for the llama style"):
        replace(GPT2, qkv_bias=True)
    with pytest.raises(ConfigError, match="head_dim = 0 must be at least 1"):
        replace(LLAMA, head_dim=0)
    with pytest.raises(ConfigError, match="num_layers = 0"):
        replace(LLAMA, num_layers=0)
    with pytest.raises(ConfigError, match="longer than model.max_positions = 64"):
        Decoder(GPT2)(torch.zeros(1, 65, dtype=torch.int64))
