"""An exported model of any architecture with MO-CTE blocks; needs torch and transformers alone."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin

from .blocks_mocte import put_blocks
from .calls_mocte import Call, cache_in
from .configuration_blocks_mocte import MocteBlocksConfig
from .document_key_mocte import DocumentKey
from .experts_mocte import put_dense_ffns
from .gates_mocte import Gate
from .keys_mocte import Key
from .known_keys_mocte import KEYS
from .online_key_mocte import OnlineKey
from .pair_keys_mocte import PairKey
from .tokens_mocte import Tokens
from .user_keys_mocte import KEYS as WITH_USER_KEYS

_GO_ALONG = (DocumentKey, Gate, Key, KEYS, OnlineKey, WITH_USER_KEYS, PairKey, Tokens)
"""transformers 5.0 copies the files that this one imports, and not what these import."""


class MocteBlocksForCausalLM(PreTrainedModel, GenerationMixin):
    """The base model, in which some FFNs are blocks of experts."""

    config_class = MocteBlocksConfig
    base_model_prefix = "base"
    # What the base model does not support, it refuses itself.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = [
        "cluster_weight",
        "cluster_bias",
        "cluster_correction",
        "cluster_mean",
        "cluster_residual",
        "cluster_prior",
        "cluster_whitening",
        "cluster_offset",
        "cluster_centroids",
        "cluster_start",
        "cluster_scores",
    ]  # noqa: RUF012
    supports_gradient_checkpointing = False

    def __init__(self, config: MocteBlocksConfig) -> None:
        super().__init__(config)
        how = {"dtype": torch.get_default_dtype(), "trust_remote_code": False}
        self.base = AutoModelForCausalLM.from_config(config.text_config, **how)
        put_dense_ffns(self.base, config.dense_ffns, config.hidden_size)
        self._running = put_blocks(self.base, config.blocks)
        accepted = inspect.signature(self.base.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        return_dict: bool | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> Any:
        """What the base model returns; arguments are the base model's (``cache`` is ``past_key_values``).

        Routing starts over at each new document: after ``document_end_id``, where position_ids begin at 0 again, and
        as transformers' `cu_seq_lens_q` or `seq_idx` say. With ``output_router_logits`` the output has
        `router_logits`: (tokens, experts) fp32 of every bank of every block, in order, as mixtures of transformers.

        Raises:
            ValueError: something that a router needs is missing, or a cache that it cannot use.
        """
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            self._cache_name: past_key_values if cache is None else cache,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            **kwargs,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            given["logits_to_keep"] = logits_to_keep
        call = Call.of_call(given, None, self.config.document_end_id)
        call.router_logits = [] if output_router_logits else None
        before, self._running.call = self._running.call, call
        try:
            output = self.base(**given, return_dict=True)
        finally:
            self._running.call = before
        call.leave(cache_in(output))
        if call.router_logits is not None:
            output["router_logits"] = tuple(call.router_logits)
        as_tuple = (self.config.return_dict if return_dict is None else return_dict) is False
        return output.to_tuple() if as_tuple else output

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As of transformers; the code goes along.

        Raises:
            ValueError: the file of a routing key does not lie beside this one, and would be left out.
        """
        here = Path(__file__).parent
        absent = [file for file in self.config.user_keys.values() if not (here / file).is_file()]
        if absent:
            raise ValueError(f"{absent[0]} would be left out: load the model with trust_remote_code=True to save it.")
        super().save_pretrained(save_directory, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The base model's."""
        return self.base.prepare_inputs_for_generation(input_ids, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The base model's."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The base model's."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The base model's."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """The base model's."""
        self.base.set_output_embeddings(value)
