"""How a block's experts are born: the gate from the sampled features, the weights and moments from the dense FFN."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mocte_ds.config import MocteConfig
from mocte_ds.controller.feature_sample import FeatureSample
from mocte_ds.controller.key_birth import Birth
from mocte_ds.dist.collectives import from_rank_zero, sum_over_ranks
from mocte_ds.dist.mesh import Mesh
from mocte_ds.moe.bank import Bank
from mocte_ds.moe.block import Block
from mocte_ds.moe.experts import copy_slice, draw_bypass
from mocte_ds.moe.ffn_shape import FFNSlice
from mocte_ds.moe.keys import Key
from mocte_ds.moe.placement import even_placement
from mocte_ds.moe.redraw import Drawn, redraw
from mocte_ds.remote_code.tokens_mocte import Tokens
from mocte_ds.seeds import derived_seed
from mocte_ds.zero import whole
from mocte_ds.zero.unit_optimizer import UnitState

_ROWS = 4096
"""Of the weights' mean where nothing was sampled."""


def bypass_seed(seed: int, block: str, bank: int, expert: int) -> int:
    """Seed of the random matrices of a `lora` expert.

    Args:
        seed: of the run.
        block: the block's path in the model.
        bank: number of the bank.
        expert: number in the bank, whichever rank holds it.
    """
    return derived_seed(seed, block, bank, "expert", expert)


def set_gate(block: Block, config: MocteConfig, mesh: Mesh, sample: FeatureSample | None = None) -> None:
    """Fix a block's routing by the clusters of its sampled features, or at random without a sample (collective)."""
    births = [Birth(block, number, config, mesh, sample) for number in range(len(block.banks))]
    for bank, birth in zip(block.banks, births, strict=True):
        bank.gate.key.fit(birth)
    if sample is not None:
        _number_by_load(block, mesh, sample)
    for bank, birth in zip(block.banks, births, strict=True):
        if bank.gate.router.unit_mean:
            with whole(bank.gate.parameters()):
                bank.gate.cluster_mean.fill_(_mean_weight(bank, birth, sample))


@torch.no_grad()
def _number_by_load(block: Block, mesh: Mesh, sample: FeatureSample) -> None:
    """Number the experts so that all ranks get even loads of the sample (collective).

    The numbers do not depend on `ep_size`, so the run does not either. Keys that read features and learned routers are
    left as they are: their loads at birth say nothing of later (docs/results/speed.md).
    """
    banks = [bank for bank in block.banks if not bank.gate.router.learns_choice and _can_renumber(bank.gate.key)]
    if not banks:
        return
    own = torch.stack([_loads_of_sample(bank, sample) for bank in banks])
    orders = from_rank_zero(even_placement(sum_over_ranks(own, mesh.data).cpu()), mesh.world)
    for bank, order in zip(banks, orders, strict=True):
        bank.gate.key.renumber(order.to(next(bank.gate.key.buffers()).device))


def _can_renumber(key: Key) -> bool:
    return type(key).renumber is not Key.renumber


def _loads_of_sample(bank: Bank, sample: FeatureSample) -> Tensor:
    """(E,) int64 sampled tokens of this rank that each expert gets; of a document only its token is known."""
    key, ids, before = bank.gate.key, sample.token_ids, sample.ids_before
    known = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    if key.reads_ids:
        known &= ids >= 0
    if key.remembers:
        known &= torch.zeros_like(known) if before is None else (before >= 0).to(known.device)
    features = sample.tokens.features[known.to(sample.tokens.features.device)].to(next(key.buffers()).device)
    tokens = Tokens(ids[known], previous=(ids if before is None else before.to(ids.device))[known])
    return torch.bincount(key.choose(features.float(), tokens).cpu(), minlength=bank.num_experts)


def _mean_weight(bank: Bank, birth: Birth, sample: FeatureSample | None) -> float:
    """Mean over the sample of the sum of a token's weights at birth (collective).

    Before any feature was seen, over normal rows of the size that a norm before the FFN gives.
    """
    if sample is not None:
        total, count = bank.gate.begin_mean(
            sample.tokens.features, Tokens(sample.token_ids, previous=sample.ids_before)
        )
        own = torch.stack([total.cpu(), torch.tensor(float(count))]).double()
        sums = from_rank_zero(sum_over_ranks(own, birth.mesh.data), birth.mesh.world)
        return float(sums[0] / sums[1])
    generator = torch.Generator().manual_seed(derived_seed(birth.seed, "mean weight"))
    rows = torch.randn(_ROWS, birth.hidden_size, generator=generator)
    ids = torch.zeros(_ROWS, dtype=torch.int64)
    total, count = bank.gate.begin_mean(rows, Tokens(ids, previous=ids))
    return float(from_rank_zero(total.cpu(), birth.mesh.world)) / count


def copy_dense_weights(block: Block) -> None:
    """Copy the dense FFN's current weights into the `ffn` experts, each bank its slice."""
    for number, bank in enumerate(block.banks):
        for expert in bank.local_experts:
            copy_slice(block.dense, expert, FFNSlice(number, len(block.banks)))


@torch.no_grad()
def copy_buffers(block: Block) -> None:
    """Give experts the dense FFN's buffers: no checkpoint holds those of experts that wait for their birth."""
    dense = dict(block.dense.named_buffers())
    for bank in block.banks:
        for name, buffer in bank.local_experts.named_buffers():
            source = dense.get(name.partition(".")[2])
            if source is not None and source.shape == buffer.shape:
                buffer.copy_(source)


@torch.no_grad()
def redraw_units(block: Block, config: MocteConfig, ep_rank: int) -> dict[nn.Parameter, Drawn]:
    """Redraw the share `expert.redraw` of each local expert; the result does not depend on the number of ranks.

    Args:
        block: whose experts have the weights that they are born with.
        config: the "mocte" block.
        ep_rank: this rank's place among those that share the experts.

    Returns:
        What was drawn, for :func:`inherit`.
    """
    drawn: dict[nn.Parameter, Drawn] = {}
    for number, bank in enumerate(block.banks if config.expert.redraw else ()):
        for local, expert in enumerate(bank.local_experts):
            k = bank.first_local(ep_rank) + local
            seed = derived_seed(config.seed, block.name, number, "units of expert", k)
            named = dict(expert.named_parameters())
            for name, new in redraw(expert, block.dense, config.expert.redraw, seed).items():
                named[name].copy_(new.put(named[name]))
                drawn[named[name]] = new
    return drawn


def draw_bypasses(block: Block, config: MocteConfig, ep_rank: int) -> None:
    """Give each `lora` expert random matrices of its own; what it writes stays zero.

    Experts that start alike get the same first gradients wherever they see the same tokens, and a bank of copies spans
    fewer directions than its width. An expert's draw does not depend on the number of ranks.

    Args:
        block: of kind `lora`.
        config: the "mocte" block.
        ep_rank: this rank's place among those that share the experts.
    """
    for number, bank in enumerate(block.banks):
        for local, expert in enumerate(bank.local_experts):
            k = bank.first_local(ep_rank) + local
            draw_bypass(expert, bypass_seed(config.seed, block.name, number, k))


def inherit(block: Block, dense_state: UnitState, drawn: Mapping[nn.Parameter, Drawn] | None = None) -> UnitState:
    """fp32 masters and moments for a block's `ffn` experts: those of the dense FFN, each bank its slice.

    Args:
        block: the block.
        dense_state: of the dense FFN.
        drawn: what is new in the experts: its moments are zero.
    """
    dense = dict(block.dense.named_parameters())
    inherited: UnitState = {}
    for number, bank in enumerate(block.banks):
        part = FFNSlice(number, len(block.banks))
        for expert in bank.local_experts:
            for name, parameter in expert.named_parameters():
                state = dense_state.get(dense[name])
                if state is not None:
                    inherited[parameter] = {
                        key: part.cut(block.dense, name, value) if _is_like(value, dense[name]) else value
                        for key, value in state.items()
                    }
    for parameter, new in (drawn or {}).items():
        state = inherited.get(parameter, {})
        for key, value in state.items():
            if key == "master":
                state[key] = new.put(value)
            elif _is_like(value, parameter):
                state[key] = new.clear(value)
    return inherited


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
