"""Models without experts as transformers' Llama, Mistral, Qwen2, Qwen3 and GPT-2; what all exported classes share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.source import NARROW, Source
from mocte_ds.errors import CheckpointError
from mocte_ds.models import DecoderConfig
from mocte_ds.moe.block import Block


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that begin, end and pad a text; None where the tokenizer has none."""

    bos: int | None
    eos: int | None
    pad: int | None

    def fields(self) -> dict[str, int | None]:
        """As a transformers config names them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


@dataclass(frozen=True)
class Stored:
    """One tensor of an export and how it comes from ours."""

    name: str
    """In the files of the class."""
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Our tensors that it is made of."""
    make: Callable[..., Tensor] = lambda tensor: tensor
    """From those, in fp32; a number of them may be none."""
    exact: bool = False
    """Stored in fp32 always, or as the integers that it holds: a rounded boundary sends tokens elsewhere."""
    integer: bool = False
    """Holds integers."""
    buffer: bool = False
    """No parameter of the class."""

    def kind(self, dtype: str) -> torch.dtype:
        """In the file, of an export as `fp32`, `bf16` or `fp16`."""
        if self.integer:
            return torch.int64
        return torch.float32 if self.exact else NARROW.get(dtype, torch.float32)

    def tensor(self, source: Source) -> Tensor:
        """As it is to be stored."""
        return self.make(*(source.read(name) for name in self.sources)).to(self.kind(source.dtype))


@dataclass(frozen=True)
class Layout:
    """A transformers class, its config and its tensors."""

    name: str
    """Name of the class."""
    model_class: Callable[[], Any]
    """The class; transformers are imported no earlier than they are needed."""
    config: Any
    """Config of the class."""
    stored: list[Stored]
    """Every tensor of its files, in the order of the layers."""
    layers: str
    """Path of the layers in the class."""
    step: Callable[[nn.Module, Tensor, Tensor], Tensor]
    """Model, features (B, T, d) and ids (B, T) to the output of the model's first layer."""
    one_layer: Callable[[int], dict[str, Any]] = lambda _layer: {}
    """What the config of a model of one layer has beside its sizes."""
    least_vocabulary: int = 1
    """Tokens that a model of one layer needs at least."""
    blocks: dict[int, Block] = field(default_factory=dict)
    """Blocks whose experts the class holds, by layer."""
    files: tuple[str, ...] = ()
    """Files of code that go with the weights."""
    reason: str | None = None
    """Why it is not a stock class."""


def llama_fields(config: DecoderConfig, special: SpecialIds) -> dict[str, Any]:
    """Fields that all Llama-like configs share."""
    # Some of the configs have no such field, but all models read it.
    head = {} if config.query_size == config.hidden_size else {"head_dim": config.head_size}
    return {
        **head,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})},
        **special.fields(),
    }


def same(source: Source, name: str, as_name: str | None = None) -> Stored:
    """A tensor of ours as it is, under the same or another name."""
    return Stored(as_name or name, source.shapes[name], (name,))


def llama_stored(source: Source, ffn: Callable[[int], list[Stored]]) -> list[Stored]:
    """All tensors of a Llama-like class, of which only the FFNs differ.

    Args:
        source: what is exported.
        ffn: the FFN's tensors of a layer.
    """
    stored = [same(source, "model.embed_tokens.weight")]
    for i in range(source.config.num_layers):
        prefix = f"model.layers.{i}."
        stored += [same(source, name) for name in source.shapes if name.startswith(prefix) and ".mlp." not in name]
        stored += ffn(i)
    stored += [same(source, name) for name in source.shapes if name.startswith(("model.norm.", "lm_head."))]
    return stored


def dense_ffn(source: Source, layer: int) -> list[Stored]:
    """The FFN of a layer, or the dense one that a block in warm-up runs."""
    prefix = f"model.layers.{layer}.mlp."
    inner = f"{prefix}dense." if layer in source.blocks else prefix
    return [same(source, n, prefix + n.removeprefix(inner)) for n in source.shapes if n.startswith(inner)]


def llama_step(model: nn.Module, features: Tensor, _ids: Tensor) -> Tensor:
    """The first layer of a Llama-like model."""
    length, window = features.shape[1], getattr(model.config, "sliding_window", None)  # Qwen2Moe has 0 for none
    rotation = model.model.rotary_emb(features, position_ids=torch.arange(length)[None])
    mask = None
    if window and window < length:
        mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)[None, None]
    return model.model.layers[0](features, position_embeddings=rotation, attention_mask=mask)


def stock_class(name: str) -> Callable[[], Any]:
    """A class of transformers."""

    def find() -> type:
        import transformers

        return getattr(transformers, name)

    return find


def llama(source: Source, special: SpecialIds) -> Layout:
    """A dense model of the llama style.

    Mistral with a window, or where it came from one; Qwen2 with biases of queries, keys and values; Qwen3 with norms of
    heads; else Llama.

    Raises:
        CheckpointError: none of them has all of its settings.
    """
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    ours, fields = source.config, llama_fields(source.config, special)
    for setting, usual in (("qk_norm", False), ("rotary_share", 1.0), ("ffn_sizes", None)):
        if getattr(ours, setting) != usual:
            raise CheckpointError(f"no dense stock class has model.{setting}; export with --class own.")
    windowed = ours.sliding_window is not None
    if windowed + ours.qkv_bias + ours.head_norm > 1:
        raise CheckpointError(
            "no dense stock class has more than one of model.sliding_window, qkv_bias and head_norm; export with "
            "--class own."
        )
    if ours.head_norm:
        fields["head_dim"] = ours.head_size
        name, config = "Qwen3ForCausalLM", Qwen3Config(**fields, attention_bias=False, use_sliding_window=False)
    elif ours.qkv_bias:
        name, config = "Qwen2ForCausalLM", Qwen2Config(**fields, use_sliding_window=False)
    elif windowed or ours.origin == "MistralForCausalLM":
        name, config = "MistralForCausalLM", MistralConfig(**fields, sliding_window=ours.sliding_window)
    else:
        name, config = "LlamaForCausalLM", LlamaConfig(**fields, attention_bias=False, mlp_bias=False)
    stored = llama_stored(source, lambda layer: dense_ffn(source, layer))
    return Layout(name, stock_class(name), config, stored, "model.layers", llama_step)


def gpt2(source: Source, special: SpecialIds) -> Layout:
    """A dense model of the gpt2 style; GPT-2 joins q, k and v and stores its matrices transposed."""
    from transformers import GPT2Config

    config = source.config
    stored = [
        same(source, "model.embed_tokens.weight", "transformer.wte.weight"),
        same(source, "model.embed_positions.weight", "transformer.wpe.weight"),
    ]
    for i in range(config.num_layers):
        for part in ("weight", "bias"):
            stored += _gpt2_layer(source, i, part)
    stored += [same(source, f"model.norm.{part}", f"transformer.ln_f.{part}") for part in ("weight", "bias")]
    target = GPT2Config(
        vocab_size=config.vocab_size,
        n_embd=config.hidden_size,
        n_inner=None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_positions=config.max_positions,
        layer_norm_epsilon=config.norm_eps,
        initializer_range=config.initializer_range,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **special.fields(),
    )
    return Layout(
        "GPT2LMHeadModel",
        stock_class("GPT2LMHeadModel"),
        target,
        stored,
        "transformer.h",
        lambda model, features, _ids: model.transformer.h[0](features),
    )


def _gpt2_layer(source: Source, layer: int, part: str) -> list[Stored]:
    """The weights or the biases of a layer."""
    old, new = f"model.layers.{layer}", f"transformer.h.{layer}"
    ffn = f"{old}.mlp.dense" if layer in source.blocks else f"{old}.mlp"
    matrices = {
        "attn.c_attn": tuple(f"{old}.self_attn.{name}_proj.{part}" for name in "qkv"),
        "attn.c_proj": (f"{old}.self_attn.o_proj.{part}",),
        "mlp.c_fc": (f"{ffn}.c_fc.{part}",),
        "mlp.c_proj": (f"{ffn}.c_proj.{part}",),
    }

    def joined(*parts: Tensor) -> Tensor:
        matrix = torch.cat(parts)
        return matrix.t().contiguous() if part == "weight" else matrix

    stored = []
    for name, sources in matrices.items():
        shapes = [source.shapes[n] for n in sources]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        stored.append(Stored(f"{new}.{name}.{part}", shape[::-1], sources, joined))
    norms = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    return stored + [same(source, f"{old}.{ours}.{part}", f"{new}.{name}.{part}") for name, ours in norms.items()]
