"""Loads folders with megatron-core alone, as a training script of it would, on several ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.convert.megatron.cpu import on_cpu

PADDED = 128  # rows of a vocabulary that is filled up


def look(folders: dict[str, str], ids: Tensor, doubled: str) -> dict[str, dict[str, Any]]:
    """Logits of every folder with one expert group a rank and with all experts on each rank, and more.

    Args:
        folders: by name.
        ids: (B, T).
        doubled: folder to write: the model `softmax` with all weights times two, saved by two expert-parallel ranks.
    """
    from megatron.core import parallel_state

    found: dict[str, dict[str, Any]] = {}
    with on_cpu():
        for ep_size in (1, 2):
            layout = {"expert_model_parallel_size": ep_size}
            parallel_state.initialize_model_parallel(**layout)
            for name, folder in folders.items():
                if name == "dense" and ep_size == 2:
                    continue
                model = load(folder, layout)
                found.setdefault(name, {})[f"ep {ep_size}"] = logits_of(model, ids)
                if ep_size == 2 and name == "softmax":
                    found[name]["experts per rank"] = len(model.decoder.layers[0].mlp.experts.local_experts)
                    _save_doubled(model, doubled)
            if ep_size == 1:
                found["dense"]["padded"] = logits_of(load(folders["dense"], layout, vocab_size=PADDED), ids)
                found["softmax"]["engine"] = logits_of(load(folders["softmax"], layout, engine_names=True), ids)
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        found["dense"]["half of the vocabulary"] = logits_of(
            load(folders["dense"], {"tensor_model_parallel_size": 2}), ids
        )
        parallel_state.destroy_model_parallel()
    return found


def load(folder: str, layout: dict[str, int], engine_names: bool = False, **changes: Any) -> nn.Module:
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    state = json.loads((Path(folder) / "mocte_ds" / "state.json").read_text())
    config = TransformerConfig(
        **state["transformer_config"],
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        moe_token_dispatcher_type="allgather",
        **layout,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if engine_names:
        # The layers share one map.
        assert spec.layer_specs[0].submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    model = GPTModel(config, spec, **{**state["gpt_model"], **changes}).eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan") if parameter.shape[0] != PADDED else 7.0)
    weights = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)["model"]
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Any:
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return model(ids, torch.arange(length)[None].expand_as(ids), mask).numpy()


def _save_doubled(model: nn.Module, folder: str) -> None:
    from megatron.core import dist_checkpointing

    for parameter in model.parameters():
        parameter.data *= 2
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 9}, folder)


def save_surplus(folder: str, out: str) -> None:
    """Save a folder's model and an optimizer's state again, with one weight more."""
    from megatron.core import dist_checkpointing, parallel_state

    with on_cpu():
        parallel_state.initialize_model_parallel()
        model = load(folder, {})
        weights = model.sharded_state_dict()
        like = weights["decoder.final_layernorm.weight"]
        surplus = {name: replace(like, key=name) for name in ("decoder.layers.mlp.surplus", "optimizer.state.exp_avg")}
        Path(out).mkdir()
        dist_checkpointing.save({"model": weights, **surplus, "iteration": 9}, out)
        parallel_state.destroy_model_parallel()
