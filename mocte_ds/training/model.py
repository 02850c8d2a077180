"""The model of a run: a decoder of ours, or any causal language model of transformers."""

import copy
import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocte_ds.base_model import base_facts
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.models import Decoder, DecoderConfig
from mocte_ds.models.decoder import documents
from mocte_ds.sections import Plain, section
from mocte_ds.shown import nearest, shown

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_OLD_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Keys that configs of transformers take and store under other names."""
_OWN_CLASSES = ("mocte", "mocte_blocks")


@section("model")
class TransformersModel:
    """A causal language model of transformers."""

    hf: dict[str, Plain] | None = None
    """`model_type`, a name of transformers' such as `qwen3`, and any keys of its config; the others have its defaults.
    The ids of special tokens are the data's tokenizer's unless they are given."""
    pretrained: str | None = None
    """Folder in Hugging Face format that the config and the first weights come from."""
    activation_checkpointing: bool = False
    """Whether the backward pass computes each layer again from its input: less memory, more time."""

    def __post_init__(self) -> None:
        if (self.hf is None) == (self.pretrained is None):
            raise ConfigError("hf = a config of transformers and pretrained = a folder exclude each other; give one.")
        self.config  # noqa: B018  made here, so that a wrong value is refused with the run file

    @functools.cached_property
    def config(self) -> Any:
        """The config as transformers have it."""
        if self.pretrained is not None:
            return _config_of(Path(self.pretrained))
        return _config_from(self.hf or {})

    @property
    def max_positions(self) -> int:
        """Longest context, in tokens."""
        # Models without a limit, as with ALiBi or a recurrent state, have no such key.
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

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
            return sum(parameter.numel() for parameter in _fresh(self.config).parameters())


ModelConfig = DecoderConfig | TransformersModel


def make_model(config: ModelConfig, eod_id: int | None = None, weights: bool = True) -> Any:
    """A dense model on the CPU, in fp32.

    Args:
        config: which one.
        eod_id: token that ends a document; it ends texts of a model of transformers whose config names no other one.
        weights: False: a folder's config is enough, because other weights will follow.

    Raises:
        CheckpointError: the folder of `pretrained` is damaged or incomplete.
        ConfigError: transformers have no such causal language model.
    """
    if isinstance(config, DecoderConfig):
        return Decoder(config)
    if config.pretrained is not None and weights:
        from mocte_ds.convert.hf.load import load_model

        model = load_model(Path(config.pretrained), torch.float32)
    else:
        model = _fresh(config.config)
    if model.config.eos_token_id is None:
        model.config.eos_token_id = eod_id
        if model.generation_config is not None:
            model.generation_config.eos_token_id = eod_id
    if config.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"model.activation_checkpointing: {type(model).__name__} does not support it.")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class Forward:
    """How the model of a run is called on packed documents."""

    def __init__(self, model: nn.Module, document_end: int | None) -> None:
        """Prepare calls.

        Args:
            model: from :func:`make_model`.
            document_end: id of the token that ends a document: then tokens see only their own document, and positions
                count from its start. None: attention goes over the borders of packed documents.

        Raises:
            ConfigError: the model cannot be called, or its attention does go over the borders.
        """
        self._own, self._end = isinstance(model, Decoder), document_end
        if isinstance(model, Decoder):
            model.document_end = document_end
        else:
            self._require_callable(model)

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments of the model, for (B, T) token ids."""
        if self._own:
            return {"input_ids": input_ids}
        given: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if self._end is not None:
            # Without a mask, transformers tell documents apart where positions start again.
            given["position_ids"] = documents(input_ids, self._end)[1]
        return given

    @torch.no_grad()
    def _require_callable(self, model: nn.Module) -> None:
        """Call it once; where documents are kept apart, change one and look whether the logits of the next one stay."""
        end = 0 if self._end is None else self._end
        a, b, c = [token for token in range(4) if token != end][:3]
        ids = torch.tensor([[a, a, end, a, b, c, b], [b, c, end, a, b, c, b]])
        training = model.training
        try:
            first, second = logits_of(model.eval()(**self.inputs(ids)))[:, 3:]
        except Exception as error:  # sizes of a config that its class does not hold against each other
            raise ConfigError(
                f"model: {type(model).__name__} of this config cannot be called: {_line(error)}"
            ) from error
        model.train(training)
        if self._end is not None and not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
            raise ConfigError(
                f"data.document_mask: in {type(model).__name__} tokens of a document see the one before it also where "
                "positions start again; set it to false."
            )


def logits_of(output: Any) -> Tensor:
    """(B, T, V) of what a model returns."""
    return output if isinstance(output, Tensor) else output.logits


def next_token_loss(output: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token.

    Args:
        output: what the model returns.
        labels: (B, T) int64: the token after each position, -100 where there is none.
    """
    logits = logits_of(output)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device), ignore_index=-100)


def model_record(config: ModelConfig, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps, from which its model can be made again."""
    return {"model": asdict(config)} if isinstance(config, DecoderConfig) else {"base": base_facts(model)}


def model_facts(config: ModelConfig) -> dict[str, Any]:
    """What identifies a model, flat: sizes of a decoder, or every value of a config of transformers."""
    values = asdict(config)
    del values["activation_checkpointing"]
    if isinstance(config, TransformersModel):
        values = {"pretrained": config.pretrained, **_values(config.config)}
    return values


def _values(config: Any) -> dict[str, Any]:
    values = {f"hf.{key}": value for key, value in config.to_dict().items()}
    return {key: value for key, value in values.items() if key not in ("hf.transformers_version", "hf._name_or_path")}


def _fresh(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        # A copy, because models write into their configs.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # transformers raise many types for values that they do not take
        raise ConfigError(f"model: transformers make no model of this config: {_line(error)}") from error


def _config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    from mocte_ds.convert.hf.load import ONLY_LOCAL, refusing

    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"pretrained = {shown(str(folder))} is not a folder in Hugging Face format: it has no config.json."
        )
    try:
        with refusing(folder):
            config = AutoConfig.from_pretrained(folder, **ONLY_LOCAL)
    except CheckpointError as error:
        raise ConfigError(f"pretrained: {error}") from error
    if config.model_type in _OWN_CLASSES:
        raise ConfigError(
            f"pretrained = {shown(str(folder))} is an export with experts; start from the checkpoints of its run "
            "with model.init."
        )
    return config


def _config_from(values: dict[str, Any]) -> Any:
    """A config of transformers from a run file; keys that its class does not know are refused."""
    from transformers import CONFIG_MAPPING, PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = values.get("model_type")
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _OWN_CLASSES]
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(
            f"hf.model_type = {shown(kind)} is not a causal language model of transformers.{nearest(kind, known)}"
        )
    cls = CONFIG_MAPPING[kind]
    given = {key: value for key, value in values.items() if key != "model_type"}
    try:
        allowed = {*cls().to_dict(), *(getattr(cls, "attribute_map", None) or {}), *_OLD_KEYS}
        for key in given:
            if key not in allowed:
                own = sorted(cls().to_dict().keys() - PretrainedConfig().to_dict().keys())
                raise ConfigError(
                    f"hf: unknown key {shown(key)} of a {cls.__name__}.{nearest(key, sorted(allowed))} Its own keys: "
                    f"{', '.join(own)}."
                )
        return cls(**{**dict.fromkeys(_SPECIAL), **given})
    except ConfigError:
        raise
    except Exception as error:  # transformers raise many types for values that they do not take
        raise ConfigError(f"hf: {cls.__name__} refuses it: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
