"""Checks in a run: emergence, events, freezing by policy, and a resume that nobody can tell from no interruption."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mocte_ds.controller.checks import Checks
from mocte_ds.moe import BlockMode
from tests.engine import runs
from tests.spawn import spawn

FREEZING = {"policy": "random", "checks": 1, "after_checks": 2, "rows": 32, "iterations": 4}


def test_emergence_is_decided_and_reported():
    result = spawn(runs.run, 2, runs.config(conflict_every=4), 0, 16, None, None, timeout=150, deepspeed=True)
    events = result[0]["events"]
    assert result[1]["events"] == []
    checks = [event for event in events if event["event"] == "check"]
    # Clusters are looked for beside the next step; what was found is acted on after it.
    assert [event["measured_at"] for event in checks] == list(range(2, 16, 2))
    assert [event["step"] for event in checks] == list(range(3, 17, 2))
    # After its birth a block is read at the check before conflict is measured.
    searched = [[block["clusters"] is not None for block in event["blocks"]] for event in checks]
    waits = [[block["mode"] == "warmup" for block in event["blocks"]] for event in checks]
    assert searched == [[mode or number in (3, 7) for mode in modes] for number, modes in enumerate(waits, 1)]
    assert not all(map(all, waits)) and any(map(any, searched))
    assert [event["beside"]["clusters"] > 0 for event in checks] == [any(blocks) for blocks in searched]
    assert [[block["rows"] > 0 for block in event["blocks"]] for event in checks] == searched
    assert all(event["seconds"]["waiting"] >= 0 for event in checks)
    emerged = [event for event in events if event["event"] == "emergence"]
    assert sorted(event["block"] for event in emerged) == [0, 1]
    for event in emerged:
        assert event["step"] <= 9 and event["reason"].split(":")[0] in ("detected", "deadline")
        assert event["output_change"] < 0.02
        assert event["optimizer_bytes_after"] > event["optimizer_bytes_before"]
    block = checks[-1]["blocks"][0]
    assert block["rows"] == 512 and block["documents"] == 64 and len(block["singular_values"]) == 4
    assert 0 < sum(block["explained"]) <= 1 and block["purity"] > 0.9
    assert set(block["domain_load"]) == {"low", "high"} and sum(block["domain_load"]["low"]) == pytest.approx(1)
    # Tokens routed since emergence: all of them, once.
    steps_after = 16 - emerged[0]["step"]
    assert sum(result[0]["load"][emerged[0]["block"]]) == steps_after * 4 * runs.MICRO * runs.LENGTH


def test_seldom_read_blocks_show_what_they_show_when_always_read() -> None:
    often, seldom = (
        spawn(runs.run, 2, runs.config(conflict_every=every), 0, 16, None, None, timeout=150, deepspeed=True)[0]
        for every in (1, 4)
    )
    assert often["losses"] == seldom["losses"]
    last = [[event for event in found["events"] if event["event"] == "check"][-1] for found in (often, seldom)]
    for one, other in zip(*[event["blocks"] for event in last], strict=True):
        for name in ("rows", "documents", "load", "domain_load", "probe_load", "mode"):
            assert one[name] == other[name], name
        # The last basis, which the iteration begins with, is an older one.
        assert one["singular_values"] == pytest.approx(other["singular_values"], rel=1e-2)


def test_what_a_check_looks_at() -> None:
    """By number of the check: emerged blocks that are read and rolled back, and conflict; the last check reads all."""

    def looks(every: int, at_every_check: bool = False) -> list[tuple[list[int], list[int], bool]]:
        modes = [BlockMode.SPECIALISING, BlockMode.WARMUP, BlockMode.SPECIALISING]
        blocks = [SimpleNamespace(index=i, mode=mode) for i, mode in enumerate(modes)]
        run: Any = SimpleNamespace(total_steps=90, blocks=blocks, config=SimpleNamespace(conflict_every=every))
        checks = object.__new__(Checks)
        checks._run, checks.interval = run, 4
        checks._progress = cast(Any, SimpleNamespace(active=True, at_every_check=at_every_check))
        made = [checks._looks(number) for number in range(1, 23)]
        return [([h.index for h in m.read], [h.index for h in m.rolled_back], m.conflict) for m in made]

    for number, (read, rolled_back, conflict) in enumerate(looks(5), 1):
        assert read == ([0, 1, 2] if number % 5 == 4 or number == 22 else [1])
        assert rolled_back == {3: [0, 1], 2: [2]}.get(number % 5, [])
        assert conflict is (number % 5 == 0)
    for number, (read, rolled_back, conflict) in enumerate(looks(0), 1):
        assert read == ([0, 1, 2] if number in (9, 19, 22) else [1])
        assert rolled_back == [] and not conflict
    assert looks(1) == [([0, 1, 2], [0, 1, 2], True)] * 22
    assert {tuple(found[1]) for found in looks(5, at_every_check=True)} == {(0, 1, 2)}


# Decided by the experts of the check before, which a resumed run has from the checkpoint.
PROGRESS = {**FREEZING, "policy": "progress", "gamma": 1.0, "beta": 1.0, "anneal": 0.05}
# What two runs never have in common.
CLOCKS = ("seconds", "bytes", "beside")
BANKS = [{"kind": "token", "weight": "softmax", "learn": True}, {"kind": "prefix"}]


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({"router": {"kind": "token", "bias": False}}, 16),
        ({"expert": {"kind": "lora"}, "router": {"kind": "token", "bias": False}}, 16),
        ({"banks": BANKS}, 16),
        ({"freeze": PROGRESS}, 24),  # freezes later
    ],
    ids=["ffn", "lora", "banks", "progress"],
)
def test_resume_is_bitwise(tmp_path, changes, stop):
    """The last step has measured; what follows from it is decided after the next one, by another process."""
    settings = runs.config(**{"freeze": FREEZING, **changes})
    whole = spawn(runs.run, 2, settings, 0, stop + 8, None, None, timeout=200, deepspeed=True)
    first = spawn(runs.run, 2, settings, 0, stop, None, str(tmp_path), timeout=150, deepspeed=True)
    second = spawn(runs.run, 2, settings, stop, stop + 8, str(tmp_path), None, timeout=150, deepspeed=True)
    frozen = [event for event in whole[0]["events"] if event["event"] == "freeze"]
    assert any(event["step"] < stop for event in frozen), "the run must have frozen an expert before it was interrupted"
    event = frozen[0]
    assert (
        event["optimizer_bytes_after"] < event["optimizer_bytes_before"] == sum(event["optimizer_bytes_by_rank_before"])
    )
    for rank in range(2):
        assert first[rank]["losses"] + second[rank]["losses"] == whole[rank]["losses"]
        for key in ("modes", "load", "bytes", "random"):
            assert second[rank][key] == whole[rank][key], key
        assert second[rank]["client"]["note"] == "kept"
    timeless = [{k: v for k, v in event.items() if k not in CLOCKS} for event in whole[0]["events"]]
    again = [{k: v for k, v in e.items() if k not in CLOCKS} for e in second[0]["events"]]
    assert again == timeless[-len(again) :]


def test_checkpoint_of_another_config_or_torn(tmp_path):
    spawn(runs.run, 2, runs.config(), 0, 10, None, str(tmp_path), timeout=150, deepspeed=True)
    (message, _) = spawn(runs.refuse, 2, runs.config(num_experts=8), str(tmp_path), timeout=100, deepspeed=True)
    assert "CheckpointError" in message and "mocte.num_experts: checkpoint 4, run 8" in message
    state = next(Path(tmp_path).glob("*/mocte_state.pt"))
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    (message, _) = spawn(runs.refuse, 2, runs.config(), str(tmp_path), timeout=100, deepspeed=True)
    assert "CheckpointError" in message and "mocte_state.pt is truncated to" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {}}, "stage = 0: use stage 1, 2 or 3"),
        ({"optimizer": None}, 'no "optimizer"'),
        ({"mocte": None}, 'no "mocte" block'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype = 'bf16': only 'fp32' is supported"),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}},
            "'fp32' with bf16 is not supported at ZeRO stage 1",
        ),
    ],
)
def test_wrong_deepspeed_config_is_refused_before_any_work(change, message):
    import mocte_ds
    from mocte_ds.errors import ConfigError

    settings = {k: v for k, v in {**runs.config(), **change}.items() if v is not None}
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=message):
        mocte_ds.initialize(model=model, config=settings)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("save_at", [4, 6, 8])
def test_resume_between_two_checks_and_before_emergence(tmp_path, save_at):
    """Checks measure after steps 4, 8, ... and decide a step later; the sample of step 8 was begun after step 4.

    Experts emerge after step 9: from rows that the checkpoint of step 6 holds a half of, that of step 8 all.
    """
    settings = runs.config(check_every=0.1, clusters={"deadline": 0.2, "not_before": 0.05}, apply_after=1)
    whole = spawn(runs.run, 2, settings, 0, 14, None, None, timeout=150, deepspeed=True)
    first = spawn(runs.run, 2, settings, 0, save_at, None, str(tmp_path), timeout=150, deepspeed=True)
    second = spawn(runs.run, 2, settings, save_at, 14, str(tmp_path), None, timeout=150, deepspeed=True)
    born = [event["step"] for event in whole[0]["events"] if event["event"] == "emergence"]
    assert len(born) == 2 and max(born) > 8
    for rank in range(2):
        assert first[rank]["losses"] + second[rank]["losses"] == whole[rank]["losses"]
    timeless = [{k: v for k, v in event.items() if k not in CLOCKS} for event in whole[0]["events"]]
    again = [{k: v for k, v in e.items() if k not in CLOCKS} for e in second[0]["events"]]
    assert again == timeless[-len(again) :]
