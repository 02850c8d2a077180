"""tools/benchmark.py layer: every layer sends the same tokens to the same experts, in one process and in two."""

import json

import pytest
import torch
import torch.distributed as dist

from mocte_ds.benchmark.layer import WORDS
from mocte_ds.benchmark.measure.layer_arms import LayerSizes, make_arms, tokens_and_gate
from tests.spawn import spawn
from tools.benchmark import main

SIZES = LayerSizes(d=32, width=48, experts=4, tokens=40, ep=1, dtype="fp32", loads="zipf")


@pytest.mark.parametrize(
    ("loads", "rows"), [("even", [10, 10, 10, 10]), ("zipf", [19, 10, 6, 5]), ("one-empty", [13, 14, 13, 0])]
)
def test_loads(loads: str, rows: list[int]) -> None:
    sizes = LayerSizes(**{**SIZES.to_dict(), "loads": loads})
    assert sizes.rows() == rows
    hidden, gate = tokens_and_gate(sizes, 0, torch.device("cpu"))
    best = (hidden[0] @ gate.T).topk(2, dim=1)
    assert torch.bincount(best.indices[:, 0], minlength=4).tolist() == rows
    assert (best.values[:, 0] - best.values[:, 1]).min() > 10


def same_function() -> dict[str, float]:
    """Largest difference of each mixture's output from its expert's, token by token."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    hidden, gate = tokens_and_gate(SIZES, 0, torch.device("cpu"))
    arms, found = make_arms(SIZES, gate, torch.device("cpu")), {}
    expert, scores = (hidden[0] @ gate.T).argmax(dim=1), (hidden[0] @ gate.T).softmax(dim=1)
    weights = {
        "block": arms["block"].layer.banks[0].local_experts,
        "block_learned": arms["block_learned"].layer.banks[0].local_experts,
        "deepspeed_no_drop": arms["deepspeed_no_drop"].layer.deepspeed_moe.experts.deepspeed_experts,
    }
    for name, experts in weights.items():
        rows = torch.stack([experts[int(k)](x) for k, x in zip(expert, hidden[0], strict=True)])
        if name != "block":
            rows = rows * scores.amax(dim=1, keepdim=True)
        found[name] = float((arms[name](hidden)[0] - rows).abs().max() / rows.abs().max())
    grouped = arms["grouped"]
    rows = torch.stack(
        [
            (torch.nn.functional.silu(x @ grouped.into[k]) * (x @ grouped.up[k])) @ grouped.down[k]
            for k, x in zip(expert.tolist(), hidden[0], strict=True)
        ]
    )
    found["grouped"] = float((grouped(hidden)[0] - rows).abs().max() / rows.abs().max())
    return found


def test_the_layers_compute_what_they_say() -> None:
    (found,) = spawn(same_function, 1, timeout=60, deepspeed=True)
    assert found.keys() == {"block", "block_learned", "deepspeed_no_drop", "grouped"}
    assert max(found.values()) < 1e-5, found


def autoep_beside_mixtral(ep: int, loads: str) -> dict[str, float]:
    """Largest differences of AutoEP's output and gradient from transformers' block and from a loop over all experts."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    sizes, cpu = LayerSizes(**{**SIZES.to_dict(), "ep": ep, "loads": loads}), torch.device("cpu")
    hidden, gate = tokens_and_gate(sizes, dist.get_rank(), cpu)
    autoep = make_arms(sizes, gate, cpu)["autoep"]
    mixtral = make_arms(LayerSizes(**{**sizes.to_dict(), "ep": 1}), gate, cpu)["mixtral"]
    weights = mixtral.layer.experts

    def loop(hidden: torch.Tensor) -> torch.Tensor:
        rows, expert = torch.zeros_like(hidden[0]), (hidden[0] @ gate.T).argmax(dim=1, keepdim=True)
        for k, (both, down) in enumerate(zip(weights.gate_up_proj, weights.down_proj, strict=True)):
            into, up = (hidden[0] @ both.T).chunk(2, dim=1)
            rows = torch.where(expert == k, torch.nn.functional.silu(into) * up @ down.T, rows)
        return rows[None]

    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for layer in (autoep, mixtral, loop):
        inputs = hidden.clone().requires_grad_()
        output = layer(inputs)
        results.append((output, *torch.autograd.grad(output, inputs, gradient)))
    assert len(autoep.layer.experts.w1) == sizes.experts // ep
    assert autoep.layer.tokens_per_expert.tolist() == sizes.rows()
    return {
        f"{what} of {name}": float((ours - theirs).abs().max() / theirs.abs().max())
        for name, other in zip(("mixtral", "loop"), results[1:], strict=True)
        for what, ours, theirs in zip(("output", "gradient"), results[0], other, strict=True)
    }


@pytest.mark.parametrize("loads", ["zipf", "one-empty"])
@pytest.mark.parametrize("ep", [1, 2])
def test_autoep_computes_what_mixtral_does(ep: int, loads: str) -> None:
    for found in spawn(autoep_beside_mixtral, ep, ep, loads, timeout=60, deepspeed=True):
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("ep", [1, 2])
def test_command_line(ep: int, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--d 32 --width 48 --experts 4 --tokens 64 --dtype fp32 --loads one-empty --repeats 2 --device cpu --json"
    assert main(["layer", *options.split(), "--ep", str(ep)]) == 0
    numbers = json.loads(capsys.readouterr().out)
    alone = {"given_loads", "grouped", "mixtral"}
    assert numbers["arms"].keys() == WORDS.keys() - (alone if ep == 2 else set())
    assert numbers["arms"]["slices"]["over_slices"] == numbers["arms"]["dense"]["over_dense"] == 1.0
    assert numbers["rows"] == [21, 22, 21, 0] and sum(numbers["rows"]) == 64


def test_experts_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(Exception, match="--experts 4 must be a multiple of --ep 3"):
        main(["layer", "--experts", "4", "--ep", "3"])
