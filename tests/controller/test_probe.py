"""The probe set: the same sequences however a batch is shared out, honest losses, weights that come back unchanged."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import set_gate
from mocte_ds.controller.gradients import DENSE, block_conflict, read_conflict
from mocte_ds.controller.probe import ProbeSet
from mocte_ds.controller.progress import Progress
from mocte_ds.controller.route_observer import RouteObserver
from mocte_ds.controller.run_state import RunState
from mocte_ds.controller.snapshots import Snapshots
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.moe import Block, BlockMode, ExpertMode, attach
from mocte_ds.moe.keys import KEYS, HashKey, Tokens
from mocte_ds.seeds import derived_seed
from mocte_ds.spectrum.sample import Selection, hash_keys
from mocte_ds.trainability import coherence, conflict
from mocte_ds.zero import expert_unit
from tests.small_models import small_llama

MESH = mesh_of_processes()

V, T, EOD, BATCH, N = 40, 24, 0, 16, 16
IDS = torch.randint(1, V, (BATCH, T), generator=torch.Generator().manual_seed(1))
IDS[0, 5] = EOD


def collected(parts: list[list[tuple[int, int]]], wanted: int = 4 * T) -> torch.Tensor:
    """What ranks keep together that get these (start, end) sequences, micro-batch after micro-batch."""
    kept = []
    for mine in parts:
        probe = ProbeSet(wanted, EOD, MESH)
        for start, end in mine:
            probe.offer((), {"input_ids": IDS[start:end], "labels": IDS[start:end]}, start, BATCH)
        probe.finish()
        state = probe.state_dict()
        assert state is not None and "labels" not in state["kwargs"]
        kept.append(state["kwargs"]["input_ids"][state["valid"]])
    return torch.cat(kept)


def test_the_set_does_not_depend_on_ranks_and_micro_batches() -> None:
    whole = collected([[(0, 16)]])
    assert torch.equal(whole, IDS[[0, 4, 8, 12]])
    assert torch.equal(collected([[(0, 8)], [(8, 16)]]), whole)
    assert torch.equal(collected([[(0, 4), (8, 12)], [(4, 8), (12, 16)]]).sort(0).values, whole.sort(0).values)
    # Sixteen ranks with a sequence each: those without one of the set keep the others company.
    assert torch.equal(collected([[(i, i + 1)] for i in range(16)]), whole)
    assert len(collected([[(0, 16)]], wanted=10**6)) == BATCH


def padded_probe(parts: list[tuple[int, int]], lengths: torch.Tensor, left: bool) -> ProbeSet:
    """Of sequences of these lengths, each micro-batch padded to its own longest one."""
    probe = ProbeSet(4 * T, EOD, MESH)
    for start, end in parts:
        longest = int(lengths[start:end].max())
        ids, mask = torch.full((end - start, longest), EOD), torch.zeros(end - start, longest, dtype=torch.long)
        for row, length in enumerate(lengths[start:end].tolist()):
            place = slice(longest - length, longest) if left else slice(0, length)
            ids[row, place], mask[row, place] = IDS[start + row, :length], 1
        probe.offer((), {"input_ids": ids, "attention_mask": mask}, start, BATCH)
    probe.finish()
    return probe


@pytest.mark.parametrize("left", [False, True])
def test_the_set_does_not_depend_on_padding_to_each_micro_batch_s_length(left: bool) -> None:
    lengths = torch.tensor([8, 24, 12, 5, 20, 24, 9, 6, 7, 10, 23, 11, 24, 4, 9, 6])
    made, blocks = model()
    found = []
    for parts in ([(0, 16)], [(0, 4), (4, 8), (8, 12), (12, 16)], [(i, i + 1) for i in range(16)]):
        probe = padded_probe(parts, lengths, left)
        reading, order = probe.read(made, blocks, torch.device("cpu")), probe.number.argsort()
        assert reading is not None and reading.losses is not None
        kept = [row[~row.isnan()] for row in reading.losses[order]]
        found.append((probe.number[order].tolist(), probe.count(), torch.cat(kept)))
    for number, count, losses in found:
        assert number == [0, 1, 2, 3] and count == int(lengths[[0, 4, 8, 12]].sum())
        torch.testing.assert_close(losses, found[0][2])


def test_given_sequences_are_shared_out_and_the_first_step_adds_none() -> None:
    probe = ProbeSet(4 * T, EOD, MESH)
    probe.give(IDS, torch.arange(BATCH))
    assert probe.complete
    probe.offer((), {"input_ids": IDS[:8]}, 0, BATCH)
    kept = probe.state_dict()
    assert torch.equal(kept["kwargs"]["input_ids"], IDS[:4]) and kept["valid"].all()
    assert kept["domain"].tolist() == [0, 1, 2, 3]


def model() -> tuple[torch.nn.Module, list[Block]]:
    made = small_llama(V, 16, 24, positions=T)
    config = MocteConfig.from_dict(
        {"modules": "model.layers.*.mlp", "num_experts": 4, "eod_id": EOD, "router": {"kind": "token"}}
    )
    blocks = attach(made, config)
    for block in blocks:
        block.banks[0].gate.key.set(torch.randn(4, 16), torch.zeros(4))
        block.mode = BlockMode.SPECIALISING
    return made.train(), blocks


def state(made: torch.nn.Module, blocks: list[Block], units: dict) -> RunState:
    config = MocteConfig.from_dict({"modules": "x", "num_experts": 4, "eod_id": EOD, "freeze": {"rows": N}})
    run = RunState(config, blocks, SimpleNamespace(units=units), mesh=MESH, total_steps=10)
    run.module = made
    return run


def filled() -> ProbeSet:
    probe = ProbeSet(3 * T, EOD, MESH)
    probe.offer((), {"input_ids": IDS, "labels": IDS}, 0, BATCH)
    probe.finish()
    return probe


def training() -> tuple[RunState, Progress]:
    """A run in which all experts train, and its probe set of three sequences."""
    made, blocks = model()
    units = {
        expert_unit(b, k): SimpleNamespace(parameters=tuple(expert.parameters()))
        for b in blocks
        for k, expert in enumerate(b.banks[0].local_experts)
    }
    run = state(made, blocks, units)
    for handle in run.blocks:
        for expert in handle.experts:
            expert.mode = ExpertMode.TRAINING
        handle.refresh_mode()
    progress = Progress(MocteConfig(modules="x", num_experts=4, eod_id=EOD, probe_tokens=3 * T), MESH)
    progress.probe.offer((), {"input_ids": IDS}, 0, BATCH)
    progress.probe.finish()
    return run, progress


@pytest.mark.parametrize("bare", [True, False])
def test_losses_and_routes(bare: bool) -> None:
    """Of a model that returns its logits alone, and of one that returns an output with them."""
    made, blocks = model()
    if bare:
        made.register_forward_hook(lambda _module, _args, output: output.logits)
    counts = [block.banks[0].loads.total.clone() for block in blocks]
    reading = filled().read(made, blocks, torch.device("cpu"))
    assert made.training and all(module.training for module in made.modules())
    for block, before in zip(blocks, counts, strict=True):
        assert torch.equal(block.banks[0].loads.total, before), "a look is not training"
    ids = IDS[[0, 4, 8]]
    with torch.no_grad():
        output = made.eval()(input_ids=ids)
    logits = output if bare else output.logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, T - 1)
    counted = torch.isfinite(reading.losses)
    assert counted.sum() == 3 * (T - 1) - 1 and not counted[0, 5], "the token after the end is of another document"
    torch.testing.assert_close(reading.losses[:, :-1][counted[:, :-1]].float(), expected[counted[:, :-1]])
    assert set(reading.routes) == {(0, 0), (1, 0)} and reading.routes[0, 0].shape == (3, T)


def test_a_model_without_logits_has_routes_but_no_losses() -> None:
    made, blocks = model()
    probe = filled()
    hidden = SimpleNamespace(last_hidden_state=torch.zeros(1))
    wrapped = made.register_forward_hook(lambda *_: hidden)
    reading = probe.read(made, blocks, torch.device("cpu"))
    wrapped.remove()
    assert reading.losses is None and reading.routes
    assert ProbeSet(10, None, MESH).read(made, blocks, torch.device("cpu")) is None


def test_snapshots_put_back_the_very_same_tensors() -> None:
    made, blocks = model()
    units = {f"unit {i}": tuple(expert.parameters()) for i, expert in enumerate(blocks[0].banks[0].local_experts)}
    snapshots = Snapshots()
    snapshots.take(units)
    old = {name: [p.detach().clone() for p in parameters] for name, parameters in units.items()}
    with torch.no_grad():
        for parameters in units.values():
            for p in parameters:
                p.add_(1)
    storage = [p.data_ptr() for parameters in units.values() for p in parameters]
    with pytest.raises(RuntimeError), snapshots.in_place(units):
        assert all(torch.equal(p, o) for name in units for p, o in zip(units[name], old[name], strict=True))
        raise RuntimeError
    assert [p.data_ptr() for parameters in units.values() for p in parameters] == storage
    assert all(torch.equal(p, o + 1) for name in units for p, o in zip(units[name], old[name], strict=True))
    again = Snapshots()
    again.load_state_dict(snapshots.state_dict(), torch.device("cpu"))
    again.take({name: units[name] for name in list(units)[:2]})
    assert list(units)[0] in again and list(units)[2] not in again


def test_progress_and_churn_against_an_explicit_computation() -> None:
    run, progress = training()
    made, blocks, units = run.module, [handle.block for handle in run.blocks], run.registry.units
    progress.remember_routes(run, {0, 1})
    first = progress.measure(run, run.blocks)
    assert first.progress == {} and first.churn == {0: [0.0], 1: [0.0]} and sum(first.load[0]) == 3 * T
    assert first.imbalance[1] == [pytest.approx(max(first.load[1]) / (3 * T / 4))]
    assert progress.measure(run, []).passes == 1
    before = progress.probe.read(made, blocks, torch.device("cpu"))

    def learn(block: int, expert: int) -> None:
        with torch.no_grad():
            for p in blocks[block].banks[0].local_experts[expert].parameters():
                p.add_(0.3 * torch.randn_like(p))

    learn(1, 2)
    second = progress.measure(run, run.blocks)
    now = progress.probe.read(made, blocks, torch.device("cpu"))
    gain = (before.losses - now.losses).nan_to_num()
    total = int(torch.isfinite(now.losses).sum())
    own = [float(gain[now.routes[1, 0] == k].sum()) / total for k in range(4)]
    assert second.progress[1] == pytest.approx(own, abs=1e-12) and any(own)
    assert [p != 0 for p in second.progress[1]] == [k == 2 for k in range(4)], "only that expert's tokens changed"
    assert second.progress[0] == [0.0] * 4, "a block that has not changed has learned nothing"
    assert second.passes == 3, "today's, and one for each block"
    # Both have learned: each gets what its own rollback costs, with the other as it is today.
    old = {name: [p.clone() for p in unit.parameters] for name, unit in units.items()}
    for block in (0, 1):
        learn(block, 1)
    third = progress.measure(run, run.blocks)
    now = progress.probe.read(made, blocks, torch.device("cpu"))
    for i in range(2):
        kept = {name: [p.clone() for p in unit.parameters] for name, unit in units.items()}
        with torch.no_grad():
            for name in (expert_unit(blocks[i], k) for k in range(4)):
                for p, value in zip(units[name].parameters, old[name], strict=True):
                    p.copy_(value)
            alone = progress.probe.read(made, blocks, torch.device("cpu"))
            for name, unit in units.items():
                for p, value in zip(unit.parameters, kept[name], strict=True):
                    p.copy_(value)
        gain = (alone.losses - now.losses).nan_to_num()
        own = [float(gain[now.routes[i, 0] == k].sum()) / total for k in range(4)]
        assert third.progress[i] == pytest.approx(own, abs=1e-12)
    with torch.no_grad():
        blocks[0].banks[0].gate.key.cluster_weight.copy_(torch.randn(4, 16))
    moved = progress.measure(run, [])
    again = progress.probe.read(made, blocks, torch.device("cpu"))
    assert moved.churn[0] == [pytest.approx(float((again.routes[0, 0] != before.routes[0, 0]).float().mean()))]
    assert moved.churn[0][0] > 0.3 and moved.progress == {} and moved.passes == 1


def by_table(router: dict, left: bool | None) -> tuple[RunState, Progress]:
    """A run whose blocks emerged with two banks of a router; ``left``: padded sequences, None: none is."""
    made = small_llama(V, 16, 24, positions=T)
    values = {"modules": "model.layers.*.mlp", "num_experts": 4, "eod_id": EOD, "banks": [router, router]}
    blocks = attach(made, MocteConfig.from_dict(values))
    for block in blocks:
        set_gate(block, MocteConfig.from_dict(values), MESH)
        block.mode = BlockMode.SPECIALISING
    run = state(made.train(), blocks, {})
    for handle in run.blocks:
        for expert in handle.experts:
            expert.mode = ExpertMode.TRAINING
        handle.refresh_mode()
    progress = Progress(MocteConfig(modules="x", num_experts=4, eod_id=EOD, probe_tokens=3 * T), MESH)
    lengths = torch.arange(BATCH) % 7 + T - 6
    progress.probe = filled() if left is None else padded_probe([(0, 8), (8, 16)], lengths, left)
    progress.remember_routes(run, {0, 1})
    return run, progress


TABLES = ["type", "hash", "previous", "pair", "pair-hash", "document"]


@pytest.mark.parametrize("left", [None, False, True])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_ids_say_where_tokens_go_without_a_pass(kind: str, left: bool | None) -> None:
    run, progress = by_table({"kind": kind}, left)
    found = progress.measure(run, [])
    assert found.passes == 0 and found.flops == 0 and found.tokens == int(progress.probe.real.sum())
    assert found.churn == {0: [0.0, 0.0], 1: [0.0, 0.0]}
    read = progress.probe.read(run.module, [handle.block for handle in run.blocks], torch.device("cpu"))
    for block, load in found.load.items():
        routes = [read.routes[block, bank][progress.probe.real] for bank in range(2)]
        assert load == [n for route in routes for n in torch.bincount(route, minlength=4).tolist()]
    assert progress.measure(run, run.blocks[:1]).passes == 2, "a rollback needs losses, then and now"
    with torch.no_grad():  # a table that has moved all the same is found out
        key = run.blocks[0].block.banks[0].gate.key
        for buffer in key.buffers():
            buffer.copy_(buffer.roll(1, dims=-1))
    assert progress.measure(run, []).churn[0][0] > 0


@KEYS.register("table-and-feature")
class OwnKey(HashKey):
    """Reads features, too."""

    def choose(self, features: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        return (super().choose(features, tokens) + (features[:, 0] > 0)) % 4


@pytest.mark.parametrize(
    "router", [{"kind": "table-and-feature"}, {"kind": "hash", "weight": "softmax", "learn": True}]
)
def test_a_pass_where_ids_do_not_decide_alone(router: dict) -> None:
    run, progress = by_table(router, None)
    assert progress.measure(run, []).passes == 1


def test_progress_of_an_expert_begins_when_it_begins_to_train() -> None:
    """An expert that thaws, or is born, between two checks is rolled back to what it was then."""
    run, progress = training()
    blocks = [handle.block for handle in run.blocks]
    thawed = run.blocks[1].experts[2]
    thawed.mode = ExpertMode.FROZEN
    progress.measure(run, run.blocks)
    thawed.mode = ExpertMode.TRAINING
    progress.remember_new(run)
    with torch.no_grad():
        for p in blocks[1].banks[0].local_experts[2].parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert [part != 0 for part in progress.measure(run, run.blocks).progress[1]] == [False, False, True, False]


def test_conflict_is_that_of_the_gradients_of_single_tokens() -> None:
    """Two blocks, one in warm-up; the reference asks autograd for each token's gradient of the FFN's weights."""
    made, blocks = model()
    blocks[0].mode = BlockMode.WARMUP
    made.eval()
    for parameter in made.parameters():
        parameter.requires_grad_(True)  # for the reference; experts that do not train are measured as well
    run = state(made, blocks, {})
    probe = ProbeSet(4 * T, EOD, MESH)
    probe.offer((), {"input_ids": IDS}, 0, BATCH, torch.arange(BATCH) // 8)
    probe.finish()
    basis, mean = torch.linalg.qr(torch.randn(16, 2))[0], torch.zeros(16)
    ids, source = IDS[[0, 4, 8, 12]], torch.tensor([0, 0, 1, 1]).repeat_interleave(T)
    caught = []
    hook = blocks[0].register_forward_hook(lambda _m, args, _o: caught.append(args[0].detach()))
    made(input_ids=ids)
    hook.remove()
    z = (caught[0].mean(1) - mean) @ basis
    for handle in run.blocks:
        handle.document_mean, handle.document_basis = mean, basis
        handle.document_centroids, handle.document_prices = z[:2], torch.zeros(2)
    found = read_conflict(run, probe)
    assert set(found) == {0, 1} and set(found[0]) == {DENSE}
    valid = torch.ones(4, T, dtype=torch.bool)
    valid[:, -1] = False
    valid &= ids != EOD

    def gram(look: torch.nn.Module, mine: torch.Tensor | None = None) -> torch.Tensor:
        """Of all tokens (zeros where the expert does not read them): experts read theirs in order, then padding."""
        caught = {}
        hook = look.register_forward_hook(lambda _m, args, out: caught.update(x=args[0], y=out))
        logits = made(input_ids=ids).logits
        hook.remove()
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * valid[:, :-1].flatten()).sum()
        (slope,) = torch.autograd.grad(loss, caught["y"])
        x, slope = caught["x"].detach().reshape(-1, 16), slope.reshape(-1, 16)
        rows = []
        if mine is not None:
            both = x.new_zeros(2, 4 * T, 16)
            both[:, mine] = torch.stack([x, slope])[:, : int(mine.sum())]
            x, slope = both
        for a, b in zip(x, slope, strict=True):
            parts = torch.autograd.grad((look(a[None])[0] * b).sum(), list(look.parameters()))
            rows.append(torch.cat([part.flatten() for part in parts]).double())
        return torch.stack(rows) @ torch.stack(rows).T

    cluster = (z[:, None] - run.blocks[0].document_centroids).square().sum(2).argmin(1).repeat_interleave(T)
    seed = derived_seed(run.config.seed, "rows of experts")
    place = hash_keys(torch.arange(4)[:, None], torch.arange(T), seed).flatten()

    def chosen(gradients: torch.Tensor, mine: torch.Tensor | None = None) -> torch.Tensor:
        """Of the tokens that have a gradient, those that all ranks would choose; none where they are too few."""
        able = (gradients.diagonal() > 0) if mine is None else (gradients.diagonal() > 0) & mine
        selection = Selection(N, seed)
        selection.offer(place[able])
        rows = (place[:, None] == selection.keys).nonzero()
        return rows[rows[:, 1].argsort(), 0] if len(rows) == N else rows[:0, 0]

    whole = gram(blocks[0].dense)
    order = chosen(whole)
    own, source_of, cluster_of = whole[order[:, None], order], source[order], cluster[order]
    between = conflict(own, source_of, unbiased=True)
    assert found[0][DENSE]["kappa"] == pytest.approx(coherence(own), rel=1e-4)
    cosine = found[0][DENSE].get("cosine", math.nan)  # left out where there is none
    assert cosine == pytest.approx(between.mean_cosine, abs=1e-4, nan_ok=True)
    assert found[0][DENSE]["Q"] == pytest.approx(between.q, abs=1e-4)
    assert found[0][DENSE]["R"] == pytest.approx(between.ratio, rel=1e-3)
    by_cluster = conflict(own, cluster_of, unbiased=True)
    assert len(cluster_of.unique()) > 1, "the test needs sequences of two clusters"
    assert found[0][DENSE]["cluster_Q"] == pytest.approx(by_cluster.q, abs=1e-4)
    routes, busy = _routes(made, blocks[1], ids), []
    for k in range(4):
        whole = gram(blocks[1].banks[0].local_experts[k], routes == k)
        order = chosen(whole, routes == k)
        assert (k in found[1]) == (len(order) == N), "an expert with fewer rows is not measured"
        if not len(order):
            continue
        busy.append(k)
        own, mine = whole[order[:, None], order], source[order]
        assert found[1][k]["rows"] == N and found[1][k]["kappa"] == pytest.approx(coherence(own), rel=1e-4)
        if len(mine.unique()) == 2 and min(torch.bincount(mine)) > 2:
            cosine = conflict(own, mine, unbiased=True).mean_cosine
            assert found[1][k].get("cosine", math.nan) == pytest.approx(cosine, abs=1e-4, nan_ok=True)
    assert 0 < len(busy) < 4 and all(p.grad is None for p in made.parameters())
    summary = block_conflict(found[1])
    assert summary["rows"] == sum(numbers["rows"] for numbers in found[1].values()) and block_conflict({}) is None


def _routes(made: torch.nn.Module, block: Block, ids: torch.Tensor) -> torch.Tensor:
    look = RouteObserver()
    with torch.no_grad(), block.context.watched_by(look):
        made(input_ids=ids)
    return look.routes[block.banks[0].deepspeed_moe]
