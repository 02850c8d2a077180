"""Router kind `random`: Switch's router, learned from directions that know nothing of the features."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import copy_dense_weights, set_gate
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.moe import BlockMode, attach

MESH = mesh_of_processes()

V, E = 64, 4


def test_a_learned_one_trains_its_residual_and_keeps_its_directions() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, use_cache=False, **sizes)).train()
    router = {"kind": "random", "weight": "softmax", "learn": True}
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": E, "router": router})
    blocks = attach(model, config)
    for block in blocks:
        set_gate(block, config, MESH)
        copy_dense_weights(block)
        block.mode = BlockMode.SPECIALISING
        block.banks.requires_grad_(True)  # as at an emergence
    priors = [block.banks[0].gate.key.cluster_weight.clone() for block in blocks]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = torch.randint(V, (4, 12))
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        (loss + sum(block.auxiliary_loss() for block in blocks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1
    for block, prior in zip(blocks, priors, strict=True):
        gate = block.banks[0].gate
        assert torch.equal(gate.key.cluster_weight, prior) and not gate.key.cluster_bias.any()
        assert (gate.cluster_residual.abs().amax(1) > 0.01).all(), "every expert's row moved"
        weight, bias = gate.linear()
        assert torch.equal(weight, prior + gate.cluster_residual) and not bias.any()


def test_an_untrained_one_keeps_its_directions_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes))
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "router": {"kind": "random"}})
    (block,) = attach(model, config)
    set_gate(block, config, MESH)
    gate = block.banks[0].gate
    assert not list(gate.parameters()) and torch.equal(gate.linear()[0], gate.key.cluster_weight)
