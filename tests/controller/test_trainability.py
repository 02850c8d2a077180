"""What a check measures of the experts: rows chosen over all ranks, lambda and gradient norm, whoever holds them."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mocte_ds.config import MocteConfig
from mocte_ds.controller import expert_rows, search
from mocte_ds.controller.birth import set_gate
from mocte_ds.controller.expert_rows import ExpertRows, Wanted, found_rows, merged_rows
from mocte_ds.controller.samples import Samples
from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.moe import BlockMode, attach
from tests.small_models import loss_of, small_llama
from tests.spawn import spawn

MESH = mesh_of_processes()

V, T, SEQUENCES, N = 64, 32, 16, 48
STEPS = 5


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return small_llama(V, positions=T, initializer_range=0.1)


def tokens(step: int) -> torch.Tensor:
    """Of a global batch; its rear half holds few of the ids of its front, so that ranks get unequal numbers of rows."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(V, (SEQUENCES, T), generator=generator)
    ids[SEQUENCES // 2 :] %= 8
    return ids


def measured(ep_size: int, turns: int = 1, scale: float | None = None) -> dict[str, Any]:
    """Train some steps of the same global batches; the probes of all experts, and what ranks hold of the gradients."""
    import mocte_ds

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    micro = SEQUENCES // world // turns
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": turns,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "mocte": {
            "modules": "model.layers.*.mlp",
            "ep_size": ep_size,
            "total_steps": 100,
            "check_every": 0.02,
            "apply_after": 0,
            "router": {"kind": "hash"},
            "clusters": {"deadline": 0.02, "not_before": 0.0},
            "spectrum": {"rows": 128, "documents": 32},
            "freeze": {"policy": "trainability", "rows": N, "after_checks": 99},
        },
    }
    engine, *_ = mocte_ds.initialize(model=small_model(), config=settings)
    if scale is not None:
        engine.optimizer.override_loss_scale(scale)  # as fp16's, which not every CPU has
    events: list[dict] = []
    engine.mocte.on_event(events.append)
    for step in range(STEPS):
        for turn in range(turns):
            first = (turn * world + rank) * micro
            ids = tokens(step)[first : first + micro]
            engine.backward(loss_of(engine, ids, ids.roll(-1, 1)))
            engine.step()
    probes = [[vars(e.history[-1]) if e.history else None for e in b.experts] for b in engine.mocte.blocks]
    check = [event for event in events if event["event"] == "check"][-1:]
    return {
        "probes": probes,
        "sampled": [[e["sampled"] for e in block["experts"]] for event in check for block in event["blocks"]],
        "squares": dict(engine.optimizer.unit_square_norms),
        "norm": float(engine.get_global_grad_norm()),
    }


def layouts(names: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [measured(*name) for name in names]


def flops_of_checks() -> list[tuple[int, int]]:
    """What events say that checks and emergence have cost, and what torch's counter saw of the same steps."""
    from torch.utils.flop_counter import FlopCounterMode

    import mocte_ds

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "mocte": {
            "modules": "model.layers.*.mlp",
            "total_steps": 100,
            "check_every": 0.02,
            "apply_after": 0,
            "conflict_every": 2,
            "clusters": {"deadline": 0.02, "not_before": 0.0},
            "spectrum": {"rank": 4, "rows": 128, "documents": 32, "max_angle": 0.01},  # samples double
            "freeze": {"policy": "progress", "rows": N, "after_checks": 99},
        },
    }
    engine, *_ = mocte_ds.initialize(model=small_model(), config=settings)
    engine.mocte.set_probe(tokens(99))  # a set of the first step would be tried at that step, outside of any check
    spent: list[int] = []

    def hear(event: dict) -> None:
        spent.append(sum(event.get("flops", {}).values()))

    engine.mocte.on_event(hear)
    pairs = []
    # scikit-learn's distances are a formula, and no product of matrices.
    with patch.object(search, "_distance_flops", lambda *_: 0):
        for step in range(7):
            engine.backward(loss_of(engine, tokens(step), tokens(step).roll(-1, 1)))
            with FlopCounterMode(display=False) as counter:
                engine.step()
            pairs.append((sum(spent), counter.get_total_flops()))
            spent.clear()
    return pairs


def alone_on_a_rank(names: list[tuple]) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    return layouts(names), flops_of_checks()


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert other["sampled"] in (one["sampled"], []), "events are told on rank 0 only"
    for block, again in zip(one["probes"], other["probes"], strict=True):
        for probe, twin in zip(block, again, strict=True):
            assert (probe is None) == (twin is None)
            if probe is not None and twin is not None:
                assert probe["tokens"] == twin["tokens"] == N and probe["step"] == twin["step"]
                assert probe["value"] == pytest.approx(twin["value"], rel=1e-4)
                assert probe["gradient_norm"] == pytest.approx(twin["gradient_norm"], rel=1e-4)


def test_ranks_ep_size_and_micro_batches_do_not_matter() -> None:
    cases = [(1, 1), (1, 4, 1024.0)]  # the loss scale is not part of a gradient's norm
    alone, flops = spawn(alone_on_a_rank, 1, cases, timeout=240, deepspeed=True)[0]
    assert all(told == counted for told, counted in flops) and sum(told > 0 for told, _ in flops) == 3
    for two in [*spawn(layouts, 2, [(1, 1), (2, 2)], timeout=240, deepspeed=True), alone[1:]]:
        for found in two:
            same(alone[0], found)
    probes = [probe for block in alone[0]["probes"] for probe in block]
    assert any(probe is not None for probe in probes), "nothing was measured"
    # A unit's gradient is what all ranks hold of it.
    for found in alone:
        assert sum(found["squares"].values()) ** 0.5 == pytest.approx(found["norm"], rel=1e-5)


def one_layer(rows: int) -> tuple[list[Any], Any]:
    model = small_model()
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": 4, "freeze": {"rows": rows}})
    blocks = attach(model, config)
    for block in blocks:
        set_gate(block, config, MESH)
        block.mode = BlockMode.SPECIALISING
    return blocks, model


def merged(rows: ExpertRows, experts: list[int], width: int) -> torch.Tensor:
    wanted = [Wanted(rows, expert, width) for expert in experts]
    return torch.stack(list(merged_rows(wanted, torch.device("cpu"), ALONE)))


def test_the_rows_are_spread_over_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a choice by numpy among all rows; nothing of it depends on the order in which they come."""
    index = torch.randint(4, (40 * T, 1), generator=torch.Generator().manual_seed(1))
    features = torch.arange(40 * T).float()[:, None].expand(-1, 3).contiguous()
    counts = torch.rand(40, T, generator=torch.Generator().manual_seed(2)) < 0.8
    whole, parts = ExpertRows(4, N, seed=3), ExpertRows(4, N, seed=3)
    sequence, place = (100 + torch.arange(40))[:, None].expand(40, T), torch.arange(T).expand(40, T)
    whole.offer(features, index, sequence, place, counts)
    for start in (24, 0, 8, 32, 16):  # sequences
        cut, of = slice(start * T, (start + 8) * T), slice(start, start + 8)
        parts.offer(features[cut], index[cut], sequence[of], place[of], counts[of])
    assert found_rows([whole, parts], ALONE) == [[N] * 4] * 2
    both = [merged(rows, [0, 1, 2, 3], 3) for rows in (whole, parts)]
    assert torch.equal(*both)
    monkeypatch.setattr(expert_rows, "_AT_ONCE", 3 * N * 3)  # three experts in one exchange, then one
    assert torch.equal(merged(whole, [0, 1, 2, 3], 3), both[0])
    chosen = both[0][..., 0].long().numpy()
    for expert in range(4):
        there = chosen[expert]
        assert len(np.unique(there)) == N and (index[there, 0] == expert).all() and counts.reshape(-1)[there].all()
    # Of 40 sequences each expert's 48 rows touch many, and the last quarter as often as the first.
    quarters = np.bincount((chosen // (10 * T)).reshape(-1), minlength=4)
    assert quarters.min() > N / 2 and all(len(np.unique(rows // T)) > 20 for rows in chosen)


def test_few_rows_are_no_sample_and_a_checkpoint_holds_them() -> None:
    rows, again = ExpertRows(2, 8, seed=0), ExpertRows(2, 8, seed=0)
    index = torch.tensor([[0, 1]] * 5 + [[1, 0]] * 2)  # two experts per token
    rows.offer(torch.randn(7, 4), index, torch.zeros(7, dtype=torch.int64), torch.arange(7))
    assert found_rows([rows], ALONE) == [[7, 7]]
    again.load_state_dict(rows.state_dict(), torch.device("cpu"))
    for sample in (rows, again):
        sample.offer(torch.ones(3, 4), torch.tensor([[0], [0], [0]]), torch.ones(3, dtype=torch.int64), torch.arange(3))
    assert found_rows([rows, again], ALONE) == [[8, 7]] * 2
    expected = merged(rows, [0], 4)
    assert torch.equal(merged(again, [0], 4), expected) and expected.shape == (1, 8, 4)
    rows.clear()
    assert found_rows([rows], ALONE) == [[0, 0]]


def test_padding_and_recomputation_are_left_out() -> None:
    """Rows of a padded batch are those of the texts without padding; a layer that is computed again adds none."""
    text, found = tokens(0)[:, : T - 8], []
    padded, labels = torch.full((SEQUENCES, T), 5), torch.full((SEQUENCES, T), -100)
    padded[:, : T - 8], labels[:, : T - 8] = text, text
    for ids, told in ((text, text), (padded, labels), (padded, None)):
        blocks, model = one_layer(16)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        config = MocteConfig.from_dict({"modules": "x", "num_experts": 4, "seed": 3, "freeze": {"rows": 16}})
        samples = Samples(config, blocks, ALONE)
        blocks[0].context.announce(first_sequence=0, micro_batch=SEQUENCES, observer=samples)
        out = model(ids, labels=told)
        rows = [samples.rows[block.banks[0].deepspeed_moe] for block in blocks]
        before = found_rows(rows, ALONE)
        (out.logits.square().mean() if told is None else out.loss).backward()
        assert found_rows(rows, ALONE) == before
        whole = [k for k, count in enumerate(before[1]) if count == 16]
        found.append((before, whole, merged(rows[1], whole, 32)))
    alone, masked, counted = found
    assert alone[0] == masked[0] and min(map(sum, alone[0])) > 0 and alone[1]
    torch.testing.assert_close(masked[2], alone[2])
    # The control: padding that nothing tells of takes rows.
    assert counted[0] != alone[0] or not torch.allclose(counted[2], alone[2])


def test_what_a_hand_has_frozen_only_a_hand_thaws() -> None:
    from mocte_ds.controller.decide import decide_freezing
    from mocte_ds.controller.run_state import RunState
    from mocte_ds.moe import ExpertMode
    from mocte_ds.trainability import Probe

    blocks, _ = one_layer(N)
    run = RunState(MocteConfig.from_dict({"modules": "x", "num_experts": 4}), blocks, _Registry(), MESH, 1000)
    handle = run.blocks[0]
    handle.born_share, values = 0.1, [100.0, 80.0, 60.0, 5.0, 4.0, 4.0, 4.0, 90.0, 90.0, 90.0, 90.0, 90.0]
    for expert, held in zip(handle.experts, (True, False, True, False), strict=True):
        expert.mode, expert.held, expert.changed_at = ExpertMode.FROZEN, held, 6
        expert.history = [Probe(i, 0.1 + 0.008 * i, value, 256, 1.0) for i, value in enumerate(values)]
    handle.experts[3].changed_at = 10  # frozen after most of these probes
    saved = handle.state_dict()
    for expert in handle.experts:
        expert.held = False
    handle.load_state_dict(saved)
    changes = decide_freezing(run.status(handle.experts[0].history[-1].share, 11), run.config)
    assert [(change.kind, change.expert) for change in changes] == [("thaw", 1)]


class _Registry:
    """Of a model without a frozen front."""

    front = None
