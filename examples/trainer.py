"""transformers' Trainer with blocks: a small Llama over bytes, saved as a folder for AutoModelForCausalLM.

    deepspeed --num_accelerators 2 examples/trainer.py --out runs/trainer
    torchrun --nproc-per-node 2 examples/trainer.py --out runs/trainer
    accelerate launch --use_deepspeed --num_processes 2 examples/trainer.py --out runs/trainer

Set DS_ACCELERATOR=cpu where there is no GPU. What differs from a script for Trainer: the "mocte" block of the DeepSpeed
config, and MocteTrainer. Started again, it goes on from its last checkpoint. The text is source code of PyTorch.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mocte_ds.integrations.transformers import MocteTrainer

CONTEXT = 64
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "mocte": {
        "modules": "model.layers.*.mlp",
        "num_experts": 4,
        "ep_size": 2,
        # Early and often, for a run of 80 steps.
        "check_every": 0.1,
        "clusters": {"deadline": 0.3, "not_before": 0.1},
        "freeze": {"alpha": 0.95, "beta": 1.0, "checks": 1, "after_checks": 2, "rows": 64},
    },
}


class Narrator(TrainerCallback):
    """Prints what happens to the experts, and stops early where asked."""

    def __init__(self, stop_after: int | None) -> None:
        self.stop_after = stop_after

    def on_mocte_event(self, args: Any, state: Any, control: Any, event: dict[str, Any]) -> None:
        """Called with every event, on rank 0."""
        if "reason" in event:
            print(event["step"], event["event"], event["reason"], flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the training with a checkpoint."""
        if state.global_step == self.stop_after:
            control.should_save = control.should_training_stop = True


def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the model")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps in all (default: %(default)s)")
    parser.add_argument("--stop-after", type=int, help="end after this step; started again it goes on")
    parser.add_argument("--local_rank", type=int, default=0, help="given by DeepSpeed's launcher")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=CONTEXT, **SIZES))
    text = torch.tensor(list(Path(torch.__file__).read_bytes()))
    rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)]
    arguments = TrainingArguments(
        output_dir=str(options.out),
        deepspeed=CONFIG,
        use_cpu=not torch.cuda.is_available(),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = MocteTrainer(
        model=model,
        args=arguments,
        train_dataset=rows[64:],
        eval_dataset=rows[:64],
        callbacks=[Narrator(options.stop_after)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.out) if options.out.is_dir() else None)
    if trainer.state.global_step < options.steps:
        return
    folder = options.out / "model"
    trainer.save_model(str(folder))

    ids = rows[0]["input_ids"][None].to(trainer.engine.device)
    trainer.engine.eval()
    with torch.no_grad():
        trained = trainer.engine(input_ids=ids).logits.cpu()  # on all ranks: each has a part of the experts
    if trainer.is_world_process_zero():
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            difference = (loaded(ids.cpu()).logits - trained).abs().max()
        print([[str(expert.mode) for expert in block.experts] for block in trainer.engine.mocte.blocks])
        print(f"{type(loaded).__name__} from {folder}: logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
