"""Steps whose loss or gradient is not finite are skipped: the run is the one that never had their batches."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mocte_ds.errors import CheckpointError, NonFiniteLoss
from tests.engine.runs import batch, config
from tests.spawn import spawn

BAD = {0: "embedding", 4: "gradient", 6: "embedding", 7: "loss"}
"""By number of the batch, on the last rank that reads data of its own: where a number becomes NaN."""
BATCHES = 9
BANKS = [
    {"kind": "online", "directions": 8, "balance_rate": 0.1},
    {"kind": "random", "weight": "softmax", "learn": True, "aux": 0.5},
]
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
STAGES: dict[str, dict[str, Any]] = {
    "zero 1, fp32": {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}},
    "zero 1, tensor parallel": {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}},
    "zero 2, fp32": {"bf16": {"enabled": False}, "zero_optimization": {"stage": 2}},
    "zero 2, bf16": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 3000}},
    "zero 2, offload": {"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False},
    "zero 3, bf16": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}},
}


class Run:
    """A tiny run of this rank, of which some batches are bad."""

    def __init__(self, changes: dict[str, Any], bad: dict[int, str], dropout: float = 0.1, **block: Any) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        import mocte_ds

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        llama = LlamaConfig(vocab_size=64, use_cache=False, attention_dropout=dropout, **sizes)
        own = {"freeze": {"rows": 16, "iterations": 4}, "conflict_every": 0, "apply_after": 0}
        own |= {"skip_nonfinite": 2, "banks": BANKS, "clusters": {"deadline": 0.05, "not_before": 0.05}}
        settings = {**config(**own, **block), **changes}
        self.engine, *_ = mocte_ds.initialize(model=LlamaForCausalLM(llama), config=settings)
        torch.manual_seed(self.engine.mesh.data.rank)
        self.bad, self.losses, self.events, self.applied = bad, list[float](), list[dict](), list[bool]()
        self.engine.mocte.on_event(self.events.append)
        self.now: str | None = None
        self.engine.module.get_input_embeddings().register_forward_hook(self._spoil)

    def _spoil(self, _module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if self.now == "embedding":
            return output * math.nan
        if self.now == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    def train(self, numbers: list[int]) -> None:
        for number in numbers:
            for turn in range(2):
                loss = self.backward(number, turn)
                self.engine.step()
            self.losses.append(loss.item())
            self.applied.append(self.engine.was_step_applied())

    def backward(self, number: int, turn: int) -> torch.Tensor:
        """Both passes over a micro-batch of a batch; its loss."""
        rank, world = self.engine.mesh.data.rank, self.engine.mesh.data.size
        ids, domain = batch(number, turn * world + rank)
        self.engine.mocte.annotate(domain, ["low", "high"])
        spoiled = self.bad.get(number) if rank == world - 1 and turn == number % 2 else None
        self.now = spoiled
        loss = self.engine(input_ids=ids, labels=ids).loss
        self.now = None
        if spoiled == "loss":
            loss = loss + math.nan  # its gradient is finite
        self.engine.backward(loss)
        return loss

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, on this rank."""
        engine, optimizer = self.engine, self.engine.optimizer
        masters = {unit: [m.clone() for m in parts] for unit, parts in optimizer.masters().items()}
        moments = [
            {name: value.clone() if torch.is_tensor(value) else value for name, value in values.items()}
            for values in optimizer.optimizer.state.values()
        ]
        return {
            "masters": masters,
            "moments": moments,
            "weights": [p.detach().clone() for p in engine.module.parameters() if not hasattr(p, "ds_tensor")],
            "controller": engine.mocte.state_dict(),
            "of the rank": engine.mocte.rank_state_dict(),
            "gates": [bank.gate.state_dict() for handle in engine.mocte.blocks for bank in handle.block.banks],
            "samples": engine.mocte.run.samples.state_dict(),
            "rates": [group["lr"] for group in optimizer.param_groups],
            "scheduler": engine.lr_scheduler.state_dict(),
            "counts": (engine.global_steps, engine.global_samples, engine.tokens_seen, engine.mocte.passes.sequences),
            "random": torch.get_rng_state(),
            "norms": optimizer.unit_square_norms,
        }


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    """Places where two nested values are not the same to the bit; seconds are passed over."""
    if "seconds" in place:
        return []
    if torch.is_tensor(one):
        return [] if torch.equal(one, other) else [place]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        return [found for key in one for found in differing(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), place
        pairs = zip(one, other, strict=True)
        return [found for i, (a, b) in enumerate(pairs) for found in differing(a, b, f"{place}.{i}")]
    if isinstance(one, float) and math.isnan(one):
        return [] if math.isnan(other) else [place]
    return [] if one == other or not isinstance(one, int | float | str | bool | None) else [place]


def compare(changes: dict[str, Any], folder: str) -> dict[str, Any]:
    """A run with bad batches beside the run that is never given them, and one that is resumed between two bad ones."""
    with_bad = Run(changes, BAD)
    with_bad.train(list(range(BATCHES)))
    without = Run(changes, {})
    without.train([number for number in range(BATCHES) if number not in BAD])
    apart = differing(with_bad.state(), without.state())
    first = Run(changes, BAD)
    first.train(list(range(7)))
    first.engine.save_checkpoint(folder)
    streak = list(first.engine.skips.streak)
    resumed = Run(changes, BAD)
    resumed.engine.load_checkpoint(folder)
    again = list(resumed.engine.skips.streak)
    resumed.train(list(range(7, BATCHES)))
    facts = {
        "apart": apart,
        "moments": with_bad.state()["moments"],
        "losses": [loss for number, loss in enumerate(with_bad.losses) if number not in BAD] == without.losses,
        "applied": [number for number, done in enumerate(with_bad.applied) if not done],
        "events": [event for event in with_bad.events if event["event"] == "skipped_step"],
        "emerged": [event["step"] for event in with_bad.events if event["event"] == "emergence"],
        "resumed": differing(resumed.state(), without.state()),
        "streak": (streak, again),
        "resumed events": [event["in_a_row"] for event in resumed.events if event["event"] == "skipped_step"],
    }
    return facts


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_leaves_no_trace(tmp_path: Path, stage: str) -> None:
    for rank, facts in enumerate(spawn(compare, 2, STAGES[stage], str(tmp_path), timeout=280, deepspeed=True)):
        assert facts["apart"] == [] and facts["resumed"] == []
        assert facts["losses"] and facts["applied"] == list(BAD)
        assert any(float(moment["exp_avg"].abs().sum()) > 0 for moment in facts["moments"]), "the runs have trained"
        assert facts["streak"][0] == facts["streak"][1] and len(facts["streak"][0]) == 1
        if rank:
            continue
        assert facts["emerged"], "experts were there when steps were skipped"
        bad = [0, 1] if "tensor" in stage else [1]
        told = [(event["step"], event["what"], event["ranks"], event["in_a_row"]) for event in facts["events"]]
        assert told == [(1, "loss", bad, 1), (4, "gradient norm", [], 1), (5, "loss", bad, 1), (5, "loss", bad, 2)]
        assert all(event["domains"] == ["high", "low"] for event in facts["events"])
        assert facts["events"][0]["reason"].endswith("(high, low) was not finite; 1 in a row, of at most 2")
        assert facts["resumed events"] == [2]


def at_every_step(auto: bool) -> list[tuple[int, list[str]]]:
    """After each batch: its number, and where the run differs from the one without bad batches after as many steps."""
    stage = STAGES["zero 2, bf16"]
    without, states = Run(stage, {}, dropout=0.0, auto=auto), list[dict[str, Any]]()
    for number in range(BATCHES):
        if number not in BAD:
            without.train([number])
            states.append(copy.deepcopy(without.state()))
    with_bad, found = Run(stage, BAD, dropout=0.0, auto=auto), []
    for number in range(BATCHES):
        with_bad.train([number])
        if with_bad.engine.global_steps:
            found.append((number, differing(with_bad.state(), states[with_bad.engine.global_steps - 1])))
    return found


@pytest.mark.parametrize("auto", [True, False])
def test_after_a_skipped_step_all_is_as_before_it(auto: bool) -> None:
    """Also without dropout, and where every step, or some, begin a new sample."""
    for found in spawn(at_every_step, 2, auto, timeout=280, deepspeed=True):
        assert found == [(number, []) for number in range(1, BATCHES)]


def interrupted(stage: str, folder: str) -> dict[str, Any]:
    """A script goes back to a checkpoint within a step that is bad, once before and once after an `engine.step()`."""
    run = Run(STAGES[stage], {2: "loss", 5: "embedding"}, auto=False)
    run.train([0, 1])
    run.engine.save_checkpoint(folder)
    run.backward(2, 0)
    run.engine.load_checkpoint(folder)
    run.train([3])
    after_first = copy.deepcopy(run.state())
    run.engine.load_checkpoint(folder)
    run.backward(5, 0)
    run.engine.step()
    run.backward(5, 1)
    run.engine.load_checkpoint(folder)
    mid_step = run.engine.mocte.mid_step
    run.train([3, 4])
    without = Run(STAGES[stage], {}, auto=False)
    without.train([0, 1, 3])
    apart = differing(after_first, without.state())
    without.train([4])
    apart += differing(run.state(), without.state())
    return {"apart": apart, "applied": run.applied, "mid_step": mid_step}


@pytest.mark.parametrize("stage", STAGES)
def test_going_back_within_a_step(tmp_path: Path, stage: str) -> None:
    for facts in spawn(interrupted, 2, stage, str(tmp_path), timeout=280, deepspeed=True):
        assert facts == {"apart": [], "applied": [True] * 5, "mid_step": False}


def sampled(dropout: float) -> tuple[list[list[int]], list[bool]]:
    """A script draws its batches from torch's generator, as nanoGPT does; the second micro-batch of step 2 is bad."""
    engine = Run(STAGES["zero 2, bf16"], {}, dropout=dropout, auto=False).engine
    torch.manual_seed(7 + engine.mesh.data.rank)
    drawn, applied, bad = list[list[int]](), list[bool](), None
    for step in range(4):
        drawn.append([])
        for turn in range(2):
            number = int(torch.randint(10**6, (1,)))
            drawn[-1].append(number)
            bad = number if (step, turn) == (1, 1) else bad
            ids, _ = batch(number, 0)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss * math.nan if number == bad else loss)
            engine.step()
        applied.append(engine.was_step_applied())
    return drawn, applied


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_batches_that_a_script_draws_do_not_come_again(dropout: float) -> None:
    for rank, (drawn, applied) in enumerate(spawn(sampled, 2, dropout, timeout=280, deepspeed=True)):
        assert applied == [True, False, True, True]
        numbers = [number for step in drawn for number in step]
        assert len(set(numbers)) == len(numbers)
        generator = torch.Generator().manual_seed(7 + rank)
        expected = [int(torch.randint(10**6, (1,), generator=generator)) for _ in numbers]
        assert dropout or numbers == expected


def told_loads() -> list[list[list[int]]]:
    """Loads that a script asks for before the first step, within one that is skipped, and after the next one."""
    run = Run(STAGES["zero 2, bf16"], {2: "embedding"}, auto=False)
    run.train([0])
    for block in range(2):
        run.engine.mocte.emerge(block)
    run.train([1])
    told = [run.engine.mocte.expert_load()]
    run.backward(2, 0)
    run.engine.step()
    run.backward(2, 1)
    told.append(run.engine.mocte.expert_load())
    run.engine.step()
    told.append(run.engine.mocte.expert_load())
    run.train([3])
    return [*told, run.engine.mocte.expert_load()]


def test_loads_of_a_skipped_step_are_told_anew() -> None:
    for before, within, skipped, after in spawn(told_loads, 2, timeout=280, deepspeed=True):
        assert sum(map(sum, before)) and sum(map(sum, within)) == sum(map(sum, after)) == sum(map(sum, before))
        assert not any(map(any, skipped))


def emerged(bad: bool) -> tuple[list[tuple], list[float]]:
    """Experts emerge by hand after a step that was skipped, or after the one before it."""
    run = Run(STAGES["zero 2, bf16"], {3: "embedding"}, auto=False)
    run.train([0, 1, 2, 3] if bad else [0, 1, 2])
    run.engine.mocte.emerge(0)
    run.train([4])
    events = [(event["step"], event["clusters"]) for event in run.events if event["event"] == "emergence"]
    return events, run.losses[-1:]


def test_experts_emerge_of_the_sample_before_a_skipped_step() -> None:
    found = [spawn(emerged, 2, bad, timeout=280, deepspeed=True) for bad in (True, False)]
    assert found[0] == found[1] and found[0][0][0] == [(3, 0)]


def logged(folder: str, log_first: bool) -> tuple[list[str], list[int]]:
    """A run logs, is saved after a skipped step, and goes on; names in its log, and what its listener hears."""
    first = Run(STAGES["zero 2, bf16"], {2: "embedding"}, auto=False)
    first.engine.mocte.log_to(f"{folder}/log")
    first.train([0, 1, 2])
    first.engine.save_checkpoint(f"{folder}/checkpoints")
    first.engine.step_log.close()
    again = Run(STAGES["zero 2, bf16"], {}, auto=False)
    if log_first:
        again.engine.mocte.log_to(f"{folder}/log")
    for _ in range(2):
        again.engine.load_checkpoint(f"{folder}/checkpoints")
    if not log_first:
        again.engine.mocte.log_to(f"{folder}/log")
    again.train([3])
    again.engine.step_log.close()
    lines = Path(folder, "log", "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["event"] for line in lines], [event["event"] for event in again.events]


@pytest.mark.parametrize("log_first", [True, False])
def test_the_log_keeps_skipped_steps_that_a_checkpoint_has(tmp_path: Path, log_first: bool) -> None:
    names, heard = spawn(logged, 2, str(tmp_path), log_first, timeout=280, deepspeed=True)[0]
    assert names == ["save", "resume", "skipped_step"] and heard == []


def odd(folder: str) -> list[str]:
    """What is said of checkpoints that hold something else in place of skipped steps; nothing of them is loaded."""
    run = Run(STAGES["zero 2, bf16"], {1: "loss"}, auto=False)
    run.train([0, 1])
    facts, said = run.engine.skips.streak[0], list[str]()
    values = [3, None, ["a"], [{"a": 1}], [{**facts, "ranks": 1}], [{**facts, "domains": [2]}]]
    values += [[{**facts, "sequences": [1]}], [{**facts, "step": "2"}], [{**facts, 3: 4}]]
    for number, value in enumerate(values):
        run.engine.skips.streak = value
        run.engine.save_checkpoint(folder, str(number))
    run.engine.skips.streak = []
    run.train([2])
    for number in range(len(values)):
        with pytest.raises(CheckpointError) as found:
            run.engine.load_checkpoint(folder, str(number))
        assert run.engine.global_steps == 2
        said.append(str(found.value))
    return said


def test_odd_skipped_steps_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    for said in spawn(odd, 2, str(tmp_path), timeout=280, deepspeed=True):
        assert all("mocte_state.pt holds skipped steps that no version of mocte_ds writes: " in text for text in said)


def too_many(folder: str) -> dict[str, Any]:
    """Three in a row where two may be skipped; the script goes back and on without these batches."""
    run = Run(STAGES["zero 2, bf16"], {2: "embedding", 3: "gradient", 4: "loss"}, auto=False)
    run.train([0, 1])
    run.engine.save_checkpoint(folder)
    run.train([2, 3])
    with pytest.raises(NonFiniteLoss) as found:
        run.train([4])
    run.engine.load_checkpoint(folder)
    streak = run.engine.skips.streak
    run.train([5, 6])
    without = Run(STAGES["zero 2, bf16"], {}, auto=False)
    without.train([0, 1, 5, 6])
    return {"said": str(found.value), "apart": differing(run.state(), without.state()), "streak": streak}


def test_one_too_many_raises_and_the_script_goes_on(tmp_path: Path) -> None:
    for facts in spawn(too_many, 2, str(tmp_path), timeout=280, deepspeed=True):
        assert "step 3: the loss on rank 1 (high, low) is not finite, after 2 in a row were skipped" in facts["said"]
        assert facts["apart"] == [] and facts["streak"] == []
