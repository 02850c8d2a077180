"""Freezing of the model's front: against plain PyTorch, by schedule, after open blocks, and in a resumed run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mocte_ds.errors import MocteError
from tests.engine import runs
from tests.spawn import spawn
from tests.zero.small_run import HIDDEN, Case, Net, config, global_step

STEPS, FROZEN_AT, RATE = 8, (3, 5), 3e-3


def llama(layers: int = 3) -> torch.nn.Module:
    """A small Llama, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=runs.VOCAB, use_cache=False, **sizes))


def by_hand(stage: int, reentrant: bool | None) -> dict[str, Any]:
    """Freeze one layer of the front, later the next; how often each layer ran with a graph, and the trajectory."""
    import mocte_ds

    settings = runs.config(
        modules="model.layers.2.mlp", auto=False, ep_size=1, total_steps=STEPS, freeze={"prefix": {"layers": 2}}
    )
    settings.update(bf16={"enabled": False}, gradient_accumulation_steps=1, gradient_clipping=0.5)
    settings["zero_optimization"] = {"stage": stage, "reduce_bucket_size": 300}
    settings["optimizer"]["params"]["lr"] = RATE
    del settings["scheduler"]
    model = llama()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    engine, *_ = mocte_ds.initialize(model=model, config=settings)
    graphs: list[list[tuple[int, bool]]] = []
    for layer in engine.module.model.layers:
        attention = layer.self_attn
        attention.register_forward_hook(
            lambda module, _, output: graphs[-1].append((module.layer_idx, output[0].grad_fn is not None))
        )
    losses, sizes = [], []
    for step in range(STEPS):
        if step in FROZEN_AT:
            engine.mocte.freeze_prefix(FROZEN_AT.index(step) + 1)
        graphs.append([])
        ids, _ = runs.batch(step, torch.distributed.get_rank())
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        sizes.append(engine.mocte.optimizer_bytes())
    weights = {name.replace("mlp.dense", "mlp"): p.detach() for name, p in engine.module.named_parameters()}
    problems = []
    for layers in (2, 3, 0):
        with pytest.raises(MocteError) as caught:
            engine.mocte.freeze_prefix(layers)
        problems.append(str(caught.value))
    return {"losses": losses, "bytes": sizes, "weights": weights, "graphs": graphs, "problems": problems}


def plain() -> dict[str, Any]:
    """The same with torch.optim.AdamW in one process."""
    model = llama()
    options = [{"params": [p], "weight_decay": 0.1 if p.dim() >= 2 else 0.0} for p in model.parameters()]
    optimizer, losses = torch.optim.AdamW(options, lr=RATE), []
    for step in range(STEPS):
        if step in FROZEN_AT:
            for module in (model.model.embed_tokens, model.model.layers[FROZEN_AT.index(step)]):
                for parameter in module.parameters():
                    parameter.requires_grad_(False).grad = None
        parts = [runs.batch(step, part)[0] for part in range(2)]
        loss = torch.stack([model(input_ids=ids, labels=ids).loss for ids in parts]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": {name: p.detach() for name, p in model.named_parameters()}}


@pytest.mark.parametrize(("stage", "reentrant"), [(1, None), (2, False), (2, True)])
def test_front_is_frozen_as_in_plain_pytorch(stage: int, reentrant: bool | None) -> None:
    results, expected = spawn(by_hand, 2, stage, reentrant, timeout=120, deepspeed=True), plain()
    losses = torch.tensor([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=0, atol=1e-5)
    for result in results:
        found = {name: weight for name, weight in result["weights"].items() if ".banks." not in name}
        assert set(found) == set(expected["weights"])
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected["weights"][name], rtol=0, atol=1e-5, msg=name)
        for step, graph in enumerate(result["graphs"]):
            frozen = sum(step >= start for start in FROZEN_AT)
            assert {layer for layer, has_graph in graph if has_graph} == set(range(frozen, 3))
        model = llama()
        gone = [
            sum(p.numel() for p in module.parameters()) for module in [model.model.embed_tokens] + [*model.model.layers]
        ]
        # 12 bytes per parameter over two ranks, and the fp32 step of every group that has gone.
        assert result["bytes"][2] - result["bytes"][3] == 12 * (gone[0] + gone[1]) // 2 + 4 * 3
        assert result["bytes"][4] - result["bytes"][5] == 12 * gone[2] // 2 + 4 * 2
        assert "2 layers of the front are frozen" in result["problems"][0]
        assert "layers allows 2" in result["problems"][1]


def after_an_open_block() -> list[str]:
    """What freeze_prefix and thaw say while the first layer's block has experts to train, and once it is locked."""
    import mocte_ds

    settings = runs.config(auto=False, ep_size=2, total_steps=10, freeze={"prefix": {"layers": 1}})
    engine, *_ = mocte_ds.initialize(model=llama(), config=settings)
    said = []

    def attempt(action: Any, *args: int) -> None:
        try:
            action(*args)
            said.append("done")
        except MocteError as error:
            said.append(str(error))

    attempt(engine.mocte.freeze_prefix, 1)
    engine.mocte.emerge(0)
    attempt(engine.mocte.freeze_prefix, 1)
    for k in range(4):
        engine.mocte.freeze(0, k)
    attempt(engine.mocte.freeze_prefix, 1)
    attempt(engine.mocte.thaw, 0, 1)
    return said


def test_a_layer_waits_for_its_block() -> None:
    for said in spawn(after_an_open_block, 2, timeout=90, deepspeed=True):
        assert ["still trains" in said[0], "still trains" in said[1], said[2]] == [True, True, "done"]
        assert "lies in a layer of the frozen front" in said[3]


class Raised(torch.nn.Module):
    """A model with something that trains below its layers and is not an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.below = torch.nn.Linear(HIDDEN, HIDDEN)
        self.net = Net()

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.net(self.below(features), target)


def with_something_below() -> str:
    import mocte_ds

    case = Case(1)
    settings = config(case)
    settings["mocte"].update(modules="net.layers.1", freeze={"prefix": {"layers": 1}})
    engine, *_ = mocte_ds.initialize(model=Raised(), config=settings)
    global_step(engine, 0)
    engine.mocte.freeze_prefix(1)
    with pytest.raises(MocteError) as caught:
        global_step(engine, 1)
    return str(caught.value)


def test_nothing_may_train_below_the_front() -> None:
    (said,) = spawn(with_something_below, 1, timeout=60, deepspeed=True)
    assert re.match(r"(below|net\.inlet)\.(weight|bias) trains, and its output goes into the frozen front", said)


def test_by_schedule_and_resumed(tmp_path: Path) -> None:
    """Behind 30 % of the budget; the block of the second layer is in nobody's way."""
    settings = runs.config(modules="model.layers.1.mlp", freeze={"policy": "off", "prefix": {"layers": 1, "end": 0.3}})
    whole = spawn(runs.run, 2, settings, 0, 24, None, None, timeout=150, deepspeed=True)
    first = spawn(runs.run, 2, settings, 0, 16, None, str(tmp_path), timeout=150, deepspeed=True)
    second = spawn(runs.run, 2, settings, 16, 24, str(tmp_path), None, timeout=150, deepspeed=True)
    (event,) = [event for event in whole[0]["events"] if event["event"] == "prefix"]
    assert event["step"] == 13 and event["layers"] == 1 and event["reason"].startswith("30.0% of the budget")
    assert event["optimizer_bytes_after"] < event["optimizer_bytes_before"]
    for rank in range(2):
        assert first[rank]["losses"] + second[rank]["losses"] == whole[rank]["losses"]
        assert second[rank]["bytes"] == whole[rank]["bytes"]
