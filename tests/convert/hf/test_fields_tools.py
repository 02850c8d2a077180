"""Exports in tools of the field: fine-tuning, PEFT, assisted generation, int8, a static cache, router logits."""

from pathlib import Path
from typing import Any

import torch
from pytest import importorskip, mark
from transformers import AutoModelForCausalLM, TorchAoConfig

import mocte_ds.convert.hf.register  # noqa: F401  the class around a base, without remote code
from tests.checkpoints import tiny
from tests.checkpoints.held import write

ALL = "model.layers.*.mlp"
SOFT = {"bias": False, "weight": "softmax"}
LEARNED = {"kind": "prefix", "weight": "softmax", "learn": True}
# Name: class, decoder, "mocte" block.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("Mixtral", {}, {"router": {"bias": False}}),
    "qwen2moe": ("Qwen2Moe", {}, {"router": SOFT}),
    "qwen3moe": ("Qwen3Moe", {"model_type": "qwen3"}, {"router": SOFT}),
    "own": ("MocteBlocks", {}, {"router": {"kind": "prefix"}}),
    "own, learned": ("MocteBlocks", {}, {"router": LEARNED}),
}
OWN_EXPERTS = r".*\.experts\.\d+\.(gate|up|down)_proj"


def exported(name: str, folder: Path) -> Any:
    """The trained model of a case, written to ``folder``."""
    architecture, decoder, blocks = CASES[name]
    model = tiny.decoder(**decoder)
    tiny.add_blocks(model, ALL, **blocks)
    assert write(model, folder)["architecture"] == f"{architecture}ForCausalLM"
    return model


def loaded(folder: Path, **how: Any) -> Any:
    """The export, for evaluation."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def ten_steps(model: Any, rate: float) -> list[float]:
    """Losses of ten steps on one batch."""
    ids = tiny.ids(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) < 10:
            optimizer.zero_grad()
    model.eval()
    return losses


@mark.parametrize("name", CASES)
def test_ten_steps_of_fine_tuning(name, tmp_path):
    exported(name, tmp_path / "export")
    model = loaded(tmp_path / "export")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    buffers = [key for key in before if key not in dict(model.named_parameters())]
    losses = ten_steps(model, 1e-2)
    assert losses[-1] < 0.8 * losses[0]
    # A parameter without a gradient would stay as it was without a word.
    assert not [key for key, p in model.named_parameters() if p.grad is None and ".experts." not in key]
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert not moved & set(buffers)
    gates = {key for key in before if ".gate." in key}
    fixed = {key for key in gates if "cluster_residual" not in key}
    if name.startswith("own"):
        # The prior of a router is a buffer and stays; what it learns beside it is a parameter.
        assert fixed and fixed <= set(buffers)
        assert moved & gates == ({key for key in gates if "cluster_residual" in key} if "learned" in name else set())
        assert sum(".experts." in key for key in moved) > 9
    else:
        # Stock routers are parameters. Hard weights are 1 whatever the logits: these move by weight decay alone.
        assert gates <= moved
    model.save_pretrained(tmp_path / "tuned")
    again = loaded(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.equal(again(tiny.ids(5)).logits, model(tiny.ids(5)).logits)


@mark.parametrize("name", CASES)
def test_lora_on_experts(name, tmp_path):
    peft = importorskip("peft", reason="peft is not installed: pip install -e .[dev]")
    exported(name, tmp_path / "export")
    model = loaded(tmp_path / "export")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    # Stock classes keep all experts of a layer in one parameter; the class around a base has linear layers.
    stock = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}
    where = {"target_modules": OWN_EXPERTS} if name.startswith("own") else stock
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **where))
    assert all("lora_" in key and ".experts." in key for key, p in adapted.named_parameters() if p.requires_grad)
    losses = ten_steps(adapted, 2e-2)
    assert losses[-1] < 0.8 * losses[0]
    ids = tiny.ids(5)
    with torch.no_grad():
        tuned = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            bare = adapted(input_ids=ids).logits
        expected = loaded(tmp_path / "export")(ids).logits
        assert torch.equal(bare, expected) and (tuned - bare).abs().max() > 0.1
        adapted.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(loaded(tmp_path / "export"), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, tuned)
        # Without the layers of the adapter every tensor of the export is there, bit by bit.
        bare_state = again.unload().state_dict()
        assert bare_state.keys() == before.keys()
        assert all(torch.equal(bare_state[key], tensor) for key, tensor in before.items())
        merged = adapted.merge_and_unload()
        close = {"atol": 1e-5 * tuned.abs().max().item(), "rtol": 0}
        torch.testing.assert_close(merged(ids).logits, tuned, **close)


@mark.parametrize("name", ["mixtral", "own"])
def test_assisted_generation_with_a_dense_draft_and_as_the_draft(name, tmp_path):
    ours = exported(name, tmp_path)
    export, draft, prompt = loaded(tmp_path), tiny.decoder(num_hidden_layers=1), tiny.ids(6, batch=1, length=6)
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(export.generate(prompt, assistant_model=draft, **how), tiny.greedy(ours, prompt, 20))
    assert torch.equal(draft.generate(prompt, assistant_model=export, **how), tiny.greedy(draft, prompt, 20))


@mark.parametrize("name", CASES)
@torch.no_grad()
def test_int8_weights(name, tmp_path):
    torchao = importorskip("torchao.quantization", reason="torchao, which is not small, is not installed")
    exported(name, tmp_path)
    model = loaded(tmp_path)
    quantised = loaded(tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()))
    kinds = {key: type(p).__name__ for key, p in quantised.named_parameters() if type(p).__name__ != "Parameter"}
    # torchao takes linear layers: every expert of the class around a base, attention alone in stock classes.
    assert any("q_proj" in key for key in kinds)
    assert any(".experts." in key for key in kinds) == name.startswith("own")
    assert not any(".gate." in key for key in kinds)
    expected, found = model(tiny.ids(5)).logits, quantised(tiny.ids(5)).logits
    apart = (found - expected).abs().amax(dim=-1) / expected.abs().max()
    assert 0 < apart.max() and apart.median() < 0.05


@torch.no_grad()
def test_a_static_cache(tmp_path):
    """Routers that read the token alone generate with one; the others refuse it (test_class_around_base.py)."""
    for kind in ("type", "token"):
        model = tiny.decoder()
        tiny.add_blocks(model, ALL, router={"kind": kind})
        write(model, tmp_path / kind, choice="own")
        export, prompt = loaded(tmp_path / kind), tiny.ids(6, batch=2, length=6)
        how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
        found = export.generate(prompt, cache_implementation="static", **how)
        assert torch.equal(found, tiny.greedy(model, prompt, 20))


@mark.parametrize("name", CASES)
@torch.no_grad()
def test_router_logits(name, tmp_path):
    exported(name, tmp_path)
    model = loaded(tmp_path)
    ids = tiny.ids(5)
    output = model(ids, output_router_logits=True)
    assert torch.equal(output.logits, model(ids).logits) and "router_logits" not in model(ids)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(ids.numel(), tiny.EXPERTS)] * 3
    if not name.startswith("own"):
        return
    chosen: list[torch.Tensor] = []
    gates = [module for module in model.modules() if type(module).__name__ == "Gate"]
    for gate in gates:
        choose = gate.choose
        gate.choose = lambda *args, choose=choose: [chosen.append(choose(*args)[0]), choose(*args)][1]
    model(ids)
    for logits, index in zip(output.router_logits, chosen, strict=True):
        assert torch.equal(logits.argmax(dim=-1), index[:, 0]) and len(index.unique()) > 1
