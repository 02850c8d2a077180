"""Our decoders compute what transformers' Llama and GPT-2 compute from the same weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mocte_ds.errors import ConfigError
from mocte_ds.models import PRESETS, Decoder, DecoderConfig, preset
from mocte_ds.models.decoder import causal_attention

IDS = torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(0))


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    ours = Decoder(DecoderConfig("llama", 96, 32, 48, 3, 4, 2, max_positions=64, tie_embeddings=tied))
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config)
    randomise(ours)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if tied else [])
    compare(ours, theirs, lambda name: name)


def test_gpt2():
    ours = Decoder(DecoderConfig("gpt2", 96, 32, 64, 2, 4, max_positions=64))
    config = GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config)
    randomise(ours)
    weights, state = ours.state_dict(), theirs.state_dict()
    state["transformer.wte.weight"] = weights["model.embed_tokens.weight"]
    state["transformer.wpe.weight"] = weights["model.embed_positions.weight"]
    for part in ("weight", "bias"):
        state[f"transformer.ln_f.{part}"] = weights[f"model.norm.{part}"]
        for i in range(2):
            old, new = f"model.layers.{i}", f"transformer.h.{i}"
            qkv = [weights[f"{old}.self_attn.{n}_proj.{part}"] for n in "qkv"]
            state[f"{new}.attn.c_attn.{part}"] = torch.cat(qkv).T if part == "weight" else torch.cat(qkv)
            state[f"{new}.attn.c_proj.{part}"] = weights[f"{old}.self_attn.o_proj.{part}"].T
            state[f"{new}.mlp.c_fc.{part}"] = weights[f"{old}.mlp.c_fc.{part}"].T
            state[f"{new}.mlp.c_proj.{part}"] = weights[f"{old}.mlp.c_proj.{part}"].T
            state[f"{new}.ln_1.{part}"] = weights[f"{old}.input_layernorm.{part}"]
            state[f"{new}.ln_2.{part}"] = weights[f"{old}.post_attention_layernorm.{part}"]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state)
    compare(ours, theirs, lambda name: {"model.embed_tokens.weight": "transformer.wte.weight"}.get(name))


def compare(ours, theirs, their_name):
    """Logits, loss and gradients."""
    theirs.eval()
    torch.testing.assert_close(ours(IDS), theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    labels = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss, reference = ours(IDS, labels), theirs(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    loss.backward()
    reference.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if their_name(name) in gradients:
            torch.testing.assert_close(parameter.grad, gradients[their_name(name)], rtol=1e-4, atol=1e-5, msg=name)
            compared += 1
    assert compared >= 1


def test_short_and_long_attention_agree():
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, 520, 8, generator=generator) for heads in (4, 2, 2))
    torch.testing.assert_close(
        causal_attention(q, k, v)[:, :, :500],
        causal_attention(q[:, :, :500], k[:, :, :500], v[:, :, :500]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "millions"), [("quickstart", 1.263), ("gpt-140m", 138.7), ("gpt-750m", 758.8), ("llama-1b", 1100.0), ("llama-7b", 6738.4)]
)
def test_presets_have_the_size_they_say(name, millions):
    with torch.device("meta"):
        model = Decoder(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].num_params()
    assert PRESETS[name].num_params() / 1e6 == pytest.approx(millions, rel=0.01)


def test_errors():
    with pytest.raises(ConfigError, match="Did you mean 'llama-7b'"):
        preset("llama7b")
    with pytest.raises(ConfigError, match="num_heads = 5 does not divide"):
        preset("quickstart", num_heads=5)
    with pytest.raises(ConfigError, match="longer than model.max_positions = 256"):
        Decoder(preset("quickstart"))(torch.zeros(1, 257, dtype=torch.int64))
