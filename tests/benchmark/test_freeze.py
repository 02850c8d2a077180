"""The benchmark of freezing: counted bytes against arithmetic, the counter against plain collectives, refusals."""

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from mocte_ds.benchmark import load
from mocte_ds.benchmark.measure.block_time import _block, _passes, _weight_gradients, measure_block
from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.freeze_plan import FreezeSizes
from mocte_ds.benchmark.measure.wire import WireCounter
from mocte_ds.dist.processes import run_ranks
from mocte_ds.errors import MocteError
from tests.spawn import spawn
from tools.benchmark import main

D, WIDTH, LAYERS, EXPERTS, BATCH, CONTEXT, VOCAB = 16, 24, 2, 4, 2, 32, 1024
EXPERT, MATRICES, VECTORS = 3 * D * WIDTH, 2 * VOCAB * D + LAYERS * 4 * D * D, (2 * LAYERS + 1) * D
TOKENS = BATCH * CONTEXT
SIZES = {"d": D, "width": WIDTH, "layers": LAYERS, "experts": EXPERTS, "micro-batch": BATCH, "context": CONTEXT}
QUICK = [
    "--device",
    "cpu",
    "--ranks",
    2,
    "--steps",
    1,
    "--repeats",
    1,
    "--gemm-size",
    64,
    "--block-tokens",
    64,
    "--frozen",
    "0,25,100",
]


def benchmark(capsys: pytest.CaptureFixture[str], *options: Any) -> dict[str, Any]:
    capsys.readouterr()
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", size)]
    assert main([str(word) for word in ("freeze", *sizes, *QUICK, *options, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def require_no_difference(numbers: dict[str, Any]) -> None:
    for stop in numbers["stops"]:
        for beside in [*stop["bytes"].values(), *stop["wire"].values(), stop["freed"]]:
            assert beside["difference"] == 0 and beside["measured"] == beside["by_formula"]
        assert stop["freezing"].get("tensor_bytes", 0) == 0
        assert (
            stop["experts_wire"]["measured"] == stop["experts_wire"]["by_formula"] == 1 - stop["frozen_percent"] / 100
        )


def test_bytes_where_every_rank_holds_every_expert(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = benchmark(capsys, "--ep", 1, "--stage", 2, "--dtype", "bf16")
    require_no_difference(numbers)
    for stop, training in zip(numbers["stops"], (8, 6, 0), strict=True):
        trunk, experts = MATRICES + VECTORS, training * EXPERT
        size, wire = stop["bytes"], stop["wire"]
        assert size["optimizer"]["measured"] == 12 * (trunk + experts) / 2 + 4 * (2 + training)
        assert size["gradients"]["measured"] == 2 * (trunk + experts) / 2
        assert size["gradients_in_backward"]["measured"] == 2 * (trunk + experts)
        # Half of an expert's three equal matrices reaches into two of them.
        assert size["gradients_held"]["measured"] >= 2 * (trunk / 2 + experts * 2 / 3)
        for what, ring in (("gradients", 1.0), ("weights", 0.5)):  # of two ranks: 2 x 1/2 and 1/2
            assert wire[f"expert {what}"]["measured"] == 2 * experts == wire[f"expert {what}"]["ring"] / ring
            assert wire[f"all {what}"]["measured"] == 2 * trunk
        assert wire["token rows"]["measured"] == 0
    first, quarter, last = numbers["stops"]
    assert first["freed"]["measured"] == 0 and quarter["frozen_experts"] == [0]
    assert quarter["freed"]["measured"] == 12 * 2 * EXPERT / 2 + 4 * 2
    assert last["freezing"]["calls"] == 6 and last["freezing"]["control_bytes"] > 0
    assert last["flops"]["wgrad_saved"] == 2 * EXPERT * LAYERS * 2 * TOKENS
    assert last["flops"]["wgrad"] == first["flops"]["wgrad"] - last["flops"]["wgrad_saved"]
    backward = (first["flops"]["dgrad"] + last["flops"]["wgrad"]) / (first["flops"]["dgrad"] + first["flops"]["wgrad"])
    assert last["step"]["backward"]["by_formula"] == pytest.approx(first["step"]["backward"]["measured"] * backward)
    text = load("freeze").text(numbers)
    assert "2 ranks, ep_size 1, ZeRO-2, bf16" in text and "gives back: 55,328; by formula 55,296 + 32 + 0" in text


@pytest.mark.parametrize("batch", [BATCH, 65])
def test_bytes_where_the_ranks_share_the_experts(batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    """With over 1,024 rows of an expert tokens of a rank's own experts do not travel."""
    numbers = benchmark(capsys, "--ep", 2, "--stage", 1, "--dtype", "fp32", "--micro-batch", batch)
    require_no_difference(numbers)
    # A quarter is one of four: the first rank's. Means over both ranks, of which each holds two experts per block.
    for stop, training in zip(numbers["stops"], (4, 3, 0), strict=True):
        trunk, experts = MATRICES + VECTORS, training * EXPERT
        wire = stop["wire"]
        assert stop["bytes"]["optimizer"]["measured"] == 12 * (trunk / 2 + experts) + 4 * (2 + training)
        assert stop["bytes"]["gradients"]["measured"] == 4 * (trunk / 2 + experts)
        assert wire["expert gradients"]["measured"] == 4 * experts
        assert wire["expert gradients"]["ring"] == 0 == wire["expert weights"]["measured"]
        rows = 4 * 4 * batch * CONTEXT * D * LAYERS
        travelling = rows if batch == BATCH else wire["token rows"]["ring"]
        assert wire["token rows"]["measured"] == pytest.approx(travelling)
        # About half of the tokens have an expert on the other rank.
        assert 0.3 < wire["token rows"]["ring"] / rows < 0.7


def counted_collectives() -> dict[str, list[float]]:
    """Some collectives of two ranks, and what was counted: calls, payload and ring bytes by kind."""
    original = dist.all_reduce
    with WireCounter() as wire:
        pair = dist.new_group([0, 1])
        wire.name_group(pair, "pair")
        wire.take()
        dist.all_reduce(torch.ones(10), group=pair)
        dist.all_reduce(torch.ones(()))
        dist.all_gather([torch.empty(3), torch.empty(3)], torch.ones(3))
        dist.all_gather_into_tensor(torch.empty(8, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16))
        received = torch.empty(5, 2) if dist.get_rank() == 0 else torch.empty(3, 2)
        mine = [4, 2] if dist.get_rank() == 0 else [1, 1]
        theirs = [4, 1] if dist.get_rank() == 0 else [2, 1]
        dist.all_to_all_single(received, torch.ones(sum(mine), 2), theirs, mine, group=pair)
        dist.all_to_all_single(torch.empty(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), group=pair)
        dist.all_gather_object([None, None], "x", group=pair)
        found = {kind: [t.calls, t.payload_bytes, t.ring_bytes] for kind, t in wire.take().items()}
        assert wire.take() == {}
    assert dist.all_reduce is original
    dist.all_reduce(torch.ones(10))
    assert wire.take() == {}
    return found


def test_counter_against_plain_collectives() -> None:
    for rank, found in enumerate(spawn(counted_collectives, 2, timeout=60)):
        rows, away = 8 * (6, 2)[rank], 8 * (2, 1)[rank]
        assert found["pair gradients"] == [1, 40, 40.0]
        assert found["all weights"] == [2, 2 * 12 + 2 * 8, 20.0]
        assert found["pair rows"] == [1, rows, pytest.approx(away)]
        assert found["control"][0] == 3 and found["control"][1] > 4 + 16
        assert set(found) == {"pair gradients", "all weights", "pair rows", "control"}


def test_frozen_experts_spend_no_weight_gradients() -> None:
    sizes = FreezeSizes(D, WIDTH, 1, EXPERTS, 1, 2, 1, 256, "fp32", 1, 1, (0,))
    block, hidden = _block(sizes, Clock("cpu")), torch.randn(1, 256, D)

    def flops(work: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    gate = 2 * 256 * D * EXPERTS
    training, frozen = (flops(_passes(block, hidden, train)) - gate for train in (True, False))
    assert training * 2 == frozen * 3 and training >= 3 * 2 * EXPERT * 256
    rows = block.banks[0].deepspeed_moe.exp_counts.tolist()
    assert sum(rows) == 256 and flops(_weight_gradients(rows, D, WIDTH, hidden)) == 2 * EXPERT * 256
    numbers = measure_block(sizes, 256, Clock("cpu"), 1)
    seconds = numbers["seconds"]
    assert numbers["rows"] == rows and min(seconds.values()) > 0
    saved = seconds["training"] - seconds["frozen"]
    assert numbers["recovered"] == pytest.approx(saved / seconds["weight_gradients"])


def one_rank_stops() -> dict[str, Any]:
    if dist.get_rank() == 1:
        raise MocteError("the second rank has a message")
    dist.barrier()
    return {}


def test_message_of_one_rank_ends_all() -> None:
    with pytest.raises(MocteError, match="^the second rank has a message$"):
        run_ranks(one_rank_stops, 2, timeout=60.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frozen", "0,30"], r"--frozen 0,30: 30 % of --experts 4 is not a whole number"),
        (["--frozen", "25,50"], "must be whole percents that ascend from 0"),
        (["--frozen", "0,half"], "must be whole percents"),
        (["--frozen", "0,50,150"], "to at most 100"),
        (["--width", "0"], "--width 0 must be at least 1"),
        (["--ep", "3", "--ranks", "3"], "ep_size = 3 does not divide mocte.num_experts = 4"),
        (["--ep", "2", "--ranks", "3"], "does not divide the 3 ranks of the run"),
        (["--d", "65536", "--width", "1000000"], r"a run of 2 x 4 experts .* needs about .* GB on cpu"),
        (["--block-tokens", "1000000000"], r"a block of 4 experts .* Give fewer --block-tokens"),
    ],
)
def test_options_that_make_no_sense(options: list[str], message: str) -> None:
    with pytest.raises(MocteError, match=message):
        main(["freeze", "--device", "cpu", *options])
