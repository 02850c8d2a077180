"""Emergence in a run keeps the loss of the whole model, and `ffn` experts start with the dense FFN's Adam moments."""

from typing import Any

import pytest
import torch

from tests.small_models import loss_of, small_llama
from tests.spawn import spawn

VOCAB, HIDDEN, WIDTH, EXPERTS, EOD, BATCH, LENGTH, STEPS = 64, 32, 48, 4, 0, 4, 40, 3

CASES: dict[str, dict[str, Any]] = {
    kind: {"router": {"kind": kind}}
    for kind in ("token", "type", "pair", "prefix", "document", "previous", "hash", "pair-hash", "random")
}
CASES["online"] = {"router": {"kind": "online", "directions": 12, "balance_rate": 0.01}}
CASES["banks"] = {"banks": [{"kind": "previous"}, {"kind": "type"}]}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's ids (B, T), most sequences packed of two documents, and the tokens after them."""
    generator = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
    ids = torch.randint(1, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    ids[1:, 18] = EOD
    return ids[:, :-1], ids[:, 1:]


def config(ep_size: int, bf16: bool, block: dict[str, Any]) -> dict[str, Any]:
    """A run whose only check would come after its end: blocks sample features and change on call."""
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.1}},
        "mocte": {
            "modules": "model.layers.*.mlp",
            "num_experts": EXPERTS,
            "ep_size": ep_size,
            "total_steps": STEPS + 2,
            "check_every": 1.0,
            "eod_id": EOD,
            "spectrum": {"rank": 4, "rows": 64, "documents": 32},
            "freeze": {"policy": "off"},
            **block,
        },
    }


def unit_state(engine: Any, name: str, module: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Master weights and Adam state of a unit by the names of the module's parameters (collective)."""
    state = engine.optimizer.unit_state(name)
    return {n: {key: t.detach().clone() for key, t in state[p].items()} for n, p in module.named_parameters()}


def emerge(ep_size: int, bf16: bool, block: dict[str, Any]) -> dict[str, Any]:
    """Train a little, let the experts of all blocks emerge, and look at the same batch right before and right after."""
    import mocte_ds
    from mocte_ds.zero import dense_unit, expert_unit

    torch.manual_seed(0)
    model = small_llama(VOCAB, HIDDEN, WIDTH, positions=LENGTH, initializer_range=0.1)
    engine, *_ = mocte_ds.initialize(model=model, config=config(ep_size, bf16, block))
    events: list[dict] = []
    engine.mocte.on_event(events.append)
    for step in range(STEPS):
        engine.backward(loss_of(engine, *batch(step)))
        engine.step()
    handles = engine.mocte.blocks
    dense = [unit_state(engine, dense_unit(h.block), h.block.dense) for h in handles]
    engine.eval()
    with torch.no_grad():
        ids, labels = batch(STEPS)
        before = loss_of(engine, ids, labels), engine(ids).logits
        for number in range(len(handles)):
            engine.mocte.emerge(number)
        after = loss_of(engine, ids, labels), engine(ids).logits
    used, born = [], []
    for handle in handles:
        experts = {}
        for number, bank in enumerate(handle.block.banks):
            used.append(int(bank.deepspeed_moe.exp_counts.count_nonzero()))
            for local, expert in enumerate(bank.local_experts):
                k = number * EXPERTS + bank.first_local(engine.mesh.expert.rank) + local
                experts[number, k] = unit_state(engine, expert_unit(handle.block, k), expert)
        born.append(experts)
    gates = [event["gate"] for event in events if event["event"] == "emergence"]
    return {"before": before, "after": after, "used": used, "gates": gates, "dense": dense, "born": born}


def emerge_all(ep_size: int) -> dict[tuple[str, str, bool], dict[str, Any]]:
    """All runs one after another, because starting processes takes longer than a run."""
    wanted = [("ffn", router, False) for router in CASES]
    wanted += [("ffn", "token", True), ("ffn", "banks", True), ("lora", "token", True)]
    wanted += [("lora", "token", False), ("lora", "banks", False)]
    return {(k, r, bf16): emerge(ep_size, bf16, {**CASES[r], "expert": {"kind": k}}) for k, r, bf16 in wanted}


def slice_of_bank(name: str, value: torch.Tensor, bank: int, banks: int) -> torch.Tensor:
    """A bank's hidden units of a matrix of the dense FFN: columns of the output matrix, rows of the others."""
    return value.chunk(banks, dim=1 if name == "down_proj.weight" else 0)[bank]


def assert_inherited(born: dict[str, Any], dense: dict[str, Any], bank: int, banks: int, where: str) -> None:
    """Every parameter of an expert has its slice of the dense FFN's master weights and moments, bit for bit."""
    for name, values in born.items():
        assert set(values) == {"master", "step", "exp_avg", "exp_avg_sq"}, where
        assert values["step"] == dense[name]["step"] == STEPS, where
        for key in ("master", "exp_avg", "exp_avg_sq"):
            expected = slice_of_bank(name, dense[name][key], bank, banks)
            assert expected.any() and torch.equal(values[key], expected), f"{where}, {name}, {key}"


@pytest.mark.parametrize("ep_size", [1, 2])
def test_emergence_keeps_the_loss_and_the_moments(ep_size: int) -> None:
    for rank, results in enumerate(spawn(emerge_all, 2, ep_size, timeout=150, deepspeed=True)):
        for (kind, router, bf16), result in results.items():
            case = f"rank {rank}, {kind}, {router}, {'bf16' if bf16 else 'fp32'}"
            (loss, logits), (new_loss, new_logits) = result["before"], result["after"]
            # Hidden units summed by bank, or multiplied beside other rows, round differently; zeros do not. Single
            # logits, to their largest, show what cancels in the mean.
            tolerance = 0.0 if kind == "lora" else 2.0**-9 if bf16 else 1e-6
            assert abs(new_loss - loss) <= tolerance * loss, f"{case}: {loss} to {new_loss}"
            change = (new_logits - logits).abs().max() / logits.abs().max()
            assert change <= 8 * tolerance, f"{case}: logits changed by {change}"
            # The loss would be the same, too, if nothing had emerged or one expert took all tokens.
            assert all(count > 1 for count in result["used"]), case
            assert result["gates"] == (["clusters of the sampled features"] * 2 if rank == 0 else []), case
            banks = len(CASES[router].get("banks", [None]))
            for dense, experts in zip(result["dense"], result["born"], strict=True):
                assert len(experts) == banks * EXPERTS // ep_size
                for (bank, expert), born in experts.items():
                    if kind == "ffn":
                        assert_inherited(born, dense, bank, banks, f"{case}, expert {expert}")
                    else:  # born as zero: it has no history
                        assert all(set(values) == {"master"} for values in born.values()), case
