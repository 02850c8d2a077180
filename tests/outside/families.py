"""Trains six classes of transformers by `mocte_ds.initialize` alone, exports each and loads it again.

    DS_ACCELERATOR=cpu python families.py FOLDER

Nothing but the installed package is used; `tests/outside/run.sh` starts it in a clean environment.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mocte_ds

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": ("transformer.h.*.mlp", {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "qwen3": ("model.layers.*.mlp", {**SIZES, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma3_text": ("model.layers.*.mlp", {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}),
    "phi3": ("model.layers.*.mlp", {**SIZES, "pad_token_id": 0}),
    "gpt_neox": ("gpt_neox.layers.*.mlp", SIZES),
    "opt": ("auto", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}
STEPS, BORN, LENGTH = 12, 4, 32


def train(kind: str, folder: Path) -> str:
    """Some steps with experts in all blocks and one of them frozen; what the export's logits differ by."""
    torch.manual_seed(0)
    modules, values = MODELS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, **values))
    block = {"modules": modules, "num_experts": 2, "total_steps": STEPS, "auto": False}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "mocte": {**block, "spectrum": {"rank": 4, "rows": 128, "documents": 16}},
    }
    engine, *_ = mocte_ds.initialize(model=model, config=config)
    losses = []
    for step in range(STEPS):
        if step == BORN:
            for number in range(2):
                engine.mocte.emerge(number)
            engine.mocte.freeze(0, 1)
        ids = torch.randint(1, 4, (4, LENGTH)).cumsum(1) % 64
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.mocte.export(folder)
    engine.eval()
    with torch.no_grad():
        trained = engine(input_ids=ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        difference = (loaded(ids).logits - trained).abs().max().item()
    modes = [[str(expert.mode) for expert in handle.experts] for handle in engine.mocte.blocks]
    assert losses[-1] < losses[0] and difference < 1e-4, (kind, losses, difference)
    assert modes == [["training", "frozen"], ["training", "training"]], (kind, modes)
    engine.destroy()
    return (
        f"{kind}: {type(loaded).__name__}, loss {losses[0]:.2f} to {losses[-1]:.2f}, logits differ by {difference:.1e}"
    )


def main() -> None:
    """All of them."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29533")
    for kind in MODELS:
        print(train(kind, Path(sys.argv[1]) / kind), flush=True)


if __name__ == "__main__":
    main()
