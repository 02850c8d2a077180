"""A plain DeepSpeed training loop, with a model in plain PyTorch: nothing but `pip install mocte-ds` is needed.

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/deepspeed_loop.py --out runs/loop

What differs from a script for DeepSpeed alone: the "mocte" block of the config, and `mocte_ds.initialize`. Started
again, it goes on from its last checkpoint. `mocte-ds report runs/loop` shows what happened. The text is source code of
PyTorch; each byte is a token.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mocte_ds

CONTEXT, WIDTH, HEADS = 64, 64, 4


class Layer(nn.Module):
    """Causal attention and an FFN; any module with two or three linear layers will do as an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, T, d) to features."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norms[1](x))


class Model(nn.Module):
    """A small decoder over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) to logits (B, T, 256)."""
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "mocte": {"modules": "layers.*.ffn", "num_experts": 4, "ep_size": 2, "total_steps": 400},
}


def main(config: dict = CONFIG) -> None:
    """Command line; see --help. ``config`` is DeepSpeed's, with the "mocte" block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and checkpoints")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps in all (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, default=0, help="given by DeepSpeed's launcher")
    args = parser.parse_args()

    torch.manual_seed(0)
    engine, *_ = mocte_ds.initialize(model=Model(), config=config)
    engine.mocte.log_to(args.out)
    engine.mocte.on_event(lambda event: "reason" in event and print(event["step"], event["event"], event["reason"]))
    if (args.out / "latest").exists():
        engine.load_checkpoint(args.out)
    text = torch.tensor(list(Path(torch.__file__).read_bytes()))
    while engine.global_steps < args.steps:
        draw = torch.Generator().manual_seed(engine.global_steps * engine.world_size + engine.global_rank)
        starts = torch.randint(len(text) - CONTEXT - 1, (8,), generator=draw)
        rows = torch.stack([text[start : start + CONTEXT + 1] for start in starts]).to(engine.device)
        logits = engine(input_ids=rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0 and engine.global_steps % 20 == 0:
            print(f"step {engine.global_steps}: loss {loss.item():.2f}")
    engine.save_checkpoint(args.out)
    if engine.global_rank == 0:
        print([[str(expert.mode) for expert in block.experts] for block in engine.mocte.blocks])


if __name__ == "__main__":
    main()
