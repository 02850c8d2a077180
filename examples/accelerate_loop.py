"""A training loop of accelerate with blocks: a small Llama over bytes, saved as a folder for AutoModelForCausalLM.

    accelerate launch --use_deepspeed --num_processes 2 examples/accelerate_loop.py --out runs/accelerate
    deepspeed --num_accelerators 2 examples/accelerate_loop.py --out runs/accelerate

Set DS_ACCELERATOR=cpu where there is no GPU. What differs from a script for accelerate: `mocte_ds.install()`, the
"mocte" block of the DeepSpeed config, and `engine.mocte.export` in the place of `accelerator.save_model`. Started
again, it goes on from its last state. The text is source code of PyTorch.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DummyOptim
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mocte_ds

CONTEXT, MICRO, TURNS, STEPS = 64, 4, 2, 40
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "mocte": {
        "modules": "model.layers.*.mlp",
        "num_experts": 4,
        "ep_size": 2,
        "total_steps": STEPS,
        # Early and often, for a run of 40 steps.
        "check_every": 0.1,
        "clusters": {"deadline": 0.3, "not_before": 0.1},
        "freeze": {"alpha": 0.95, "beta": 1.0, "checks": 1, "after_checks": 2, "rows": 64},
    },
}


def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, the state and the model")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps to do by now (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, default=0, help="given by DeepSpeed's launcher")
    options = parser.parse_args()

    mocte_ds.install()
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # without it accelerate sees one process on a CPU
    plugin = DeepSpeedPlugin(hf_ds_config=CONFIG, gradient_accumulation_steps=TURNS)
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=TURNS)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=CONTEXT, **SIZES))
    text = torch.tensor(list(Path(torch.__file__).read_bytes()))
    rows = list(text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT))
    loader = torch.utils.data.DataLoader(rows, batch_size=MICRO)
    engine, optimizer, loader = accelerator.prepare(model, DummyOptim(model.parameters(), lr=3e-3), loader)
    engine.mocte.log_to(options.out)
    engine.mocte.on_event(lambda event: "reason" in event and print(event["step"], event["event"], event["reason"]))
    state = options.out / "state"
    if state.is_dir():
        accelerator.load_state(state)
    for ids in accelerator.skip_first_batches(loader, engine.global_steps * TURNS):
        if engine.global_steps >= options.steps:
            break
        with accelerator.accumulate(engine):
            loss = engine(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and engine.global_steps % 20 == 0:
            accelerator.print(f"step {engine.global_steps}: loss {loss.item():.2f}")
    accelerator.save_state(state)
    if engine.global_steps < STEPS:
        return

    folder = options.out / "model"
    engine.mocte.export(folder)
    ids = torch.stack(rows[:1]).to(engine.device)
    engine.eval()
    with torch.no_grad():
        trained = engine(input_ids=ids).logits.cpu()  # on all ranks: each has a part of the experts
    if accelerator.is_main_process:
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            difference = (loaded(ids.cpu()).logits - trained).abs().max()
        print([[str(expert.mode) for expert in block.experts] for block in engine.mocte.blocks])
        print(f"{type(loaded).__name__} from {folder}: logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
