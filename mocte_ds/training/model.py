"""The model of a run: any causal language model of transformers, fresh, from a folder, or from a checkpoint."""

import contextlib
import copy
import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.base_model import base_facts, changes_context, config_values, make_config, make_dense, with_floats
from mocte_ds.bigrams import Bigram, bigram_facts, bigram_of, put_bigrams
from mocte_ds.cpu_attention import use_cpu_attention
from mocte_ds.errors import ConfigError
from mocte_ds.flops.model_sizes import ModelSizes, model_sizes
from mocte_ds.sections import Plain, section
from mocte_ds.shown import one_line, shown
from mocte_ds.training.model_config import config_from, config_of
from mocte_ds.training.narrow_weights import cast_parameters, computed_in_fp32, narrow_weights
from mocte_ds.training.residual_scale import scale_residual_outputs

NO_LIMIT = 1 << 30
"""Longest context of models that have none, as with ALiBi or a recurrent state."""


class _OfTransformers:
    """What runs ask of a config of transformers."""

    config: Any
    """As transformers have it."""
    bigram: Bigram | None
    """Its table of hashed pairs of tokens."""

    @property
    def max_positions(self) -> int:
        """Longest context, in tokens."""
        text = self.config.get_text_config()
        found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        return next((number for number in found if isinstance(number, int) and number > 0), NO_LIMIT)

    @property
    def vocab_size(self) -> int:
        """Entries of the token embedding."""
        return self.config.get_text_config().vocab_size

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return self.config.get_text_config().num_attention_heads

    def num_params(self) -> int:
        """Parameters of the dense model, tied ones once."""
        with torch.device("meta"):
            model = make_model(cast("ModelConfig", self), weights=False)
        return sum(parameter.numel() for parameter in model.parameters())

    def fresh(self) -> Any:
        """A model of the config with random weights.

        Raises:
            ConfigError: transformers have no such causal language model.
        """
        return _fresh(self.config)


@section("model")
class TransformersModel(_OfTransformers):
    """A causal language model of transformers."""

    hf: dict[str, Plain] | None = None
    """`model_type`, a name of transformers' such as `qwen3`, and any keys of its config; the others have its defaults.
    The ids of special tokens are the data's tokenizer's unless they are given."""
    pretrained: str | None = None
    """Folder in Hugging Face format that the config and the first weights come from."""
    activation_checkpointing: bool = False
    """Whether the backward pass computes each layer again from its input: less memory, more time."""
    bigram: Bigram | None = None
    """Adds a row of a hashed-bigram embedding to what each layer reads."""

    def __post_init__(self) -> None:
        if (self.hf is None) == (self.pretrained is None):
            raise ConfigError("hf = a config of transformers and pretrained = a folder exclude each other; give one.")
        self.config  # noqa: B018  made here, so that a wrong value is refused with the run file

    @functools.cached_property
    def config(self) -> Any:  # type: ignore[override]
        """The config as transformers have it."""
        if self.pretrained is not None:
            return config_of(Path(self.pretrained))
        return config_from(self.hf or {})


@section("model")
class CheckpointModel(_OfTransformers):
    """The causal language model of transformers that a checkpoint holds, whose weights the run starts from."""

    base: dict[str, Plain]
    """What the checkpoint says of it."""
    activation_checkpointing: bool = False
    """As of :class:`TransformersModel`."""

    max_position_embeddings: int | None = None
    """Longest context, where no weight depends on it; None: the checkpoint's."""

    def __post_init__(self) -> None:
        if self.max_position_embeddings is not None:
            set_longest_context(self.config, self.max_position_embeddings)

    @functools.cached_property
    def config(self) -> Any:  # type: ignore[override]
        """The config as transformers have it."""
        return make_config(self.base, "model.init")

    @property
    def bigram(self) -> Bigram | None:  # type: ignore[override]
        """As of :class:`TransformersModel`."""
        return bigram_of(self.base.get("bigram"))

    def fresh(self) -> Any:
        """As of :class:`TransformersModel`; where the base model's class has experts of its own, dense FFNs stand."""
        return make_dense(_fresh, self.config, self.base, "model.init")


ModelConfig = TransformersModel | CheckpointModel


def make_model(
    config: ModelConfig, eod_id: int | None = None, weights: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    """A dense model on the CPU, in training mode.

    Args:
        config: which one.
        eod_id: token that ends a document; it ends texts of a model of transformers whose config names no other one.
        weights: False: other weights will follow.
        dtype: of its parameters; other types hold what fp32 would, rounded, and take no more memory than they need.

    Raises:
        CheckpointError: the folder of `pretrained` is damaged or incomplete.
        ConfigError: transformers have no such causal language model.
    """
    folder = Path(config.pretrained) if isinstance(config, TransformersModel) and config.pretrained else None
    if folder and weights:
        from mocte_ds.convert.hf.load import load_model

        model = load_model(folder, dtype)
    else:
        draws = weights and isinstance(config, TransformersModel) and torch.get_default_device().type != "meta"
        scale = scale_residual_outputs if draws else _leave
        with contextlib.nullcontext() if dtype == torch.float32 else narrow_weights(dtype, scale):
            model = config.fresh()
        scale(model, model.config)
        _take_generation(model, folder, config.base.get("generation") if isinstance(config, CheckpointModel) else None)
    if isinstance(config, TransformersModel):  # a stored model has come with its own
        put_bigrams(model, bigram_facts(config.bigram, eod_id))
    cast_parameters(model, dtype)  # what lies in no layer, and what a class keeps in fp32
    for settings in (model.config, model.generation_config):
        if settings is not None and settings.eos_token_id is None:
            settings.eos_token_id = eod_id
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            # Packed data has no padding; its id may be that of a document's end, whose row is to be trained.
            part.padding_idx = None
    if config.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"model.activation_checkpointing: {type(model).__name__} does not support it.")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    use_cpu_attention(model)
    return model.train()  # transformers load models in evaluation mode


class Forward:
    """How the model of a run is called, and its loss."""

    def __init__(self, model: nn.Module, document_end: int | None, compiled: bool = False) -> None:
        """Prepare calls.

        Args:
            model: from :func:`make_model`.
            document_end: id of the token that ends a document: then tokens see only their own document, and positions
                count from its start. None: attention goes over the borders of packed documents.
            compiled: whether torch.compile makes a kernel of the loss, which then holds no logits in fp32.

        Raises:
            ConfigError: the model cannot be called, tokens see later ones, or attention does go over the borders.
        """
        self._end = document_end
        self._even_loads = float(getattr(model.config, "router_aux_loss_coef", None) or 0.0)
        self._cross_entropy = torch.compile(_cross_entropy) if compiled else _cross_entropy
        self._require_causal(model)

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments of the model, for (B, T) token ids."""
        given: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if self._end is not None:
            # Without a mask, transformers tell documents apart where positions start again.
            given["position_ids"] = places_in_documents(input_ids, self._end)
        return given

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, and what a mixture of transformers adds for even loads.

        Args:
            output: what the model returns.
            labels: (B, T) int64: the token after each position, -100 where there is none.
        """
        logits = logits_of(output)
        loss = self._cross_entropy(logits, labels.to(logits.device))
        extra = getattr(output, "aux_loss", None)  # there with output_router_logits
        return loss if extra is None else loss + self._even_loads * extra.to(loss.device)

    @torch.no_grad()
    def _require_causal(self, model: nn.Module) -> None:
        """Call it once: change a document and the last token, and look which logits stay."""
        end, training = 0 if self._end is None else self._end, model.training
        a, b, c = [token for token in range(4) if token != end][:3]
        ids = torch.tensor([[a, a, end, a, b, c, b], [b, c, end, a, b, c, b], [a, a, end, a, b, c, a]])
        name = type(model).__name__
        try:
            with computed_in_fp32(model):
                output = model.eval()(**self.inputs(ids.to(next(model.parameters()).device)))
            plain, other_document, other_token = logits_of(output)
        except Exception as error:  # sizes of a config that its class does not hold against each other
            raise ConfigError(f"model: {name} of this config cannot be called: {one_line(error)}") from error
        finally:
            model.train(training)
        if not torch.allclose(plain[:-1], other_token[:-1], rtol=1e-4, atol=1e-5):
            raise ConfigError(
                f"model: in {name} of this config tokens see later ones, so that it cannot learn to predict them; "
                "give hf.is_decoder: true if it has that key, or take another model_type."
            )
        if self._end is not None and not torch.allclose(plain[3:], other_document[3:], rtol=1e-4, atol=1e-5):
            raise ConfigError(
                f"data.document_mask: in {name} tokens of a document see the one before it also where positions start "
                "again; set it to false."
            )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def logits_of(output: Any) -> Tensor:
    """(B, T, V) of what a model returns."""
    return output if isinstance(output, Tensor) else output.logits


def places_in_documents(input_ids: Tensor, end: int) -> Tensor:
    """Position of each token of packed sequences in its document.

    Args:
        input_ids: (B, T) int64.
        end: id of the token that ends a document, and belongs to it.

    Returns:
        (B, T) int64.
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = torch.ones_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == end
    return place - torch.where(begins, place, 0).cummax(dim=1).values


def model_record(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps, from which its model can be made again."""
    return {"base": base_facts(model)}


def model_facts(config: ModelConfig) -> dict[str, Any]:
    """A model in plain values, flat: every value of a config of transformers."""
    values = {f"hf.{key}": value for key, value in config_values(config.config, "the config").items()}
    values.pop("hf.dtype", None)  # of a folder's files; runs train as their DeepSpeed config says
    start = {"pretrained": config.pretrained} if isinstance(config, TransformersModel) else {}
    bigram = None if config.bigram is None else asdict(config.bigram)
    return {**start, **values, "activation_checkpointing": config.activation_checkpointing, "bigram": bigram}


def set_longest_context(config: Any, positions: int) -> None:
    """Change the longest context of a config of transformers, where positions are computed and not learned.

    Args:
        config: changed in place.
        positions: in tokens.

    Raises:
        ConfigError: the model has a weight for each position, or another rule for longer contexts.
    """
    if not changes_context(config) or positions < 1:
        raise ConfigError(
            f"max_position_embeddings = {shown(positions)}: the longest context of a {config.model_type} cannot be "
            "changed; only rotary positions of the types default, linear and llama3 reach any whole number from 1 on."
        )
    config.get_text_config().max_position_embeddings = positions


def _take_generation(model: Any, folder: Path | None, stored: dict[str, Any] | None) -> None:
    """How texts are generated, as a folder or a checkpoint has it."""
    from transformers import GenerationConfig

    if folder and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    elif stored is not None:
        model.generation_config = GenerationConfig.from_dict(with_floats(stored))


def _leave(_module: nn.Module, _config: Any) -> None:
    """In place of a scale, for weights that others will replace."""


def _fresh(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        # A copy, because models write into their configs.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # transformers raise many types for values that they do not take
        raise ConfigError(f"model: transformers make no model of this config: {one_line(error)}") from error


def config_sizes(config: ModelConfig) -> ModelSizes:
    """What the FLOPs ledger needs to know of a model, which need not be made for it."""
    with torch.device("meta"):
        return model_sizes(make_model(config, weights=False))
