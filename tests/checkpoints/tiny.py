"""Tiny models with blocks whose experts and gates all differ, as a long training would leave them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mocte_ds.clusters import balanced_kmeans, linear_gate, subspace_without_mean
from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import set_gate
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.moe.context import Tokens
from tests.moe.random_keys import randomise_key

VOCAB, EXPERTS = 96, 4


def decoder(model_type: str = "llama", **changes: Any) -> Any:
    """A model of transformers with three layers, every weight random, norms far from one.

    Args:
        model_type: of transformers.
        **changes: keys of its config.
    """
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    if model_type == "gpt2":
        sizes |= {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 48}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 48, "pad_token_id": None}
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    config = CONFIG_MAPPING[model_type](**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, 1)
    return model.eval()


def randomise(module: nn.Module, seed: int) -> None:
    """Other weights for every parameter; matrices at a scale that lets experts matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        around = 0.0 if name.endswith("bias") else 1.0
        parameter.data = 0.25 * noise if parameter.dim() > 1 else around + 0.3 * noise


def add_blocks(model: nn.Module, modules: str | list[str], warmup: tuple[int, ...] = (), **changes: Any) -> list[Block]:
    """Blocks with random experts and gates from clusters; those numbered in ``warmup`` stay in warm-up.

    Args:
        model: gets the blocks.
        modules: patterns.
        warmup: numbers of blocks, not of layers.
        **changes: of the "mocte" block, in which `token` routes unless it says something else.
    """
    if "banks" not in changes:
        changes["router"] = {"kind": "token", **changes.get("router", {})}
    config = MocteConfig.from_dict({"modules": modules, "num_experts": EXPERTS, **changes})
    blocks = attach(model, config)
    model.settings = config  # for HeldSource
    for number, block in enumerate(blocks):
        if number in warmup:
            continue
        block.mode = BlockMode.LOCKED if number % 2 else BlockMode.SPECIALISING
        set_gate(block, config, mesh_of_processes())
        for bank_number, bank in enumerate(block.banks):
            for k, expert in enumerate(bank.local_experts):
                randomise(expert, 1000 * bank_number + 100 * number + k + 10)
            router = bank.gate.router
            if router.kind in ("token", "prefix"):
                bank.gate.key.set(*cluster_gate(number + 10 * bank_number, directions=not router.bias))
            if router.kind in ("online", "pair", "document"):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(number + 10 * bank_number)
                    randomise_key(bank.gate.key)
            if router.weight == "sigmoid":
                bank.gate.cluster_correction.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
            if router.learn:
                randomise(bank.gate, 1000 * bank_number + 100 * number)
    return blocks


def cluster_gate(seed: int, directions: bool = True) -> tuple[Tensor, Tensor]:
    """Weight and bias of a gate, from clusters of random features as at an emergence."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(32, generator=generator)
    features = torch.randn(512, 32, generator=generator) + mean
    basis = torch.linalg.qr(torch.randn(32, 6, generator=generator)).Q
    if directions:
        basis = subspace_without_mean(basis, mean)
    clusters = balanced_kmeans((features - mean) @ basis, EXPERTS, seed, directions=directions)
    return linear_gate(clusters, basis, mean)


def ids(seed: int, batch: int = 3, length: int = 40) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """The likeliest continuation, one token at a time, without a cache."""
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


def tokens_of_experts(model: nn.Module, input_ids: Tensor) -> dict[str, list[int]]:
    """Tokens that each expert of each block gets."""
    counts: dict[str, list[int]] = {}

    def look(block: Block, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        index = block.banks[0].gate(rows, Tokens())[0].flatten()
        counts[block.name] = torch.bincount(index, minlength=EXPERTS).tolist()

    emerged = [m for m in model.modules() if isinstance(m, Block) and m.mode is not BlockMode.WARMUP]
    hooks = [block.register_forward_pre_hook(look) for block in emerged]
    with torch.no_grad():
        model(input_ids)
    for hook in hooks:
        hook.remove()
    return counts
