"""Places of forward passes in an optimizer step, as they are counted."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mocte_ds.config import MocteConfig
from mocte_ds.controller.passes import Passes
from mocte_ds.dist.mesh import Axis, mesh_of_processes
from mocte_ds.errors import MocteError
from mocte_ds.moe import BlockMode, attach
from mocte_ds.moe.context import Tokens
from mocte_ds.moe.forward import BEYOND, sequence_numbers
from mocte_ds.moe.keys import KEYS, Key
from tests.moe.random_keys import randomise_key
from tests.small_models import small_llama


def begin(passes: Passes, texts: int = 4) -> list[int]:
    """Numbers of the sequences of a pass of rank 1 of 2 with micro-batches of 4."""
    return sequence_numbers(passes.begin(4, texts), 4, texts).tolist()


def made() -> Passes:
    run: Any = SimpleNamespace(blocks=[], mesh=replace(mesh_of_processes(), data=Axis(None, 1, 2)))
    return Passes(run)


def test_a_backward_pass_ends_a_micro_batch() -> None:
    passes = made()
    assert begin(passes) == [4, 5, 6, 7]
    passes.after_backward()
    passes.after_backward()  # of the engine, and of each parameter
    assert begin(passes) == [12, 13, 14, 15]


def test_texts_of_the_same_samples_in_one_call_or_several() -> None:
    both = [4, 5, 6, 7, *(number + BEYOND for number in (4, 5, 6, 7))]
    third = [number + 2 * BEYOND for number in (4, 5, 6, 7)]
    one, several = made(), made()
    assert begin(one, 8) == both == begin(several) + begin(several)
    assert begin(one) == third == begin(several)
    for passes in (one, several):
        passes.after_backward()
        assert begin(passes) == [12, 13, 14, 15]


@KEYS.register("most-tokens")
class MostTokens(Key):
    """A key of somebody's own that moves: the expert with the most tokens so far."""

    moves, has_logits = True, False

    def __init__(self, hidden_size: int, num_experts: int, vocab_size: int | None = None) -> None:
        super().__init__(hidden_size, num_experts, vocab_size)
        self.register_buffer("cluster_seen", torch.zeros(num_experts, dtype=torch.float64))

    def choose(self, features: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        return self.cluster_seen.argmax().expand(len(features))

    def no_sums(self) -> torch.Tensor:
        return torch.zeros(self.num_experts, dtype=torch.float64)

    def take_sums(self, index: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        return torch.bincount(index[:, 0], minlength=self.num_experts).double()

    def follow(self, sums: torch.Tensor, load: torch.Tensor) -> None:
        self.cluster_seen += sums


def trained(**router: Any) -> tuple[Any, Passes, Key]:
    """A model that has run a pass that counts, and the passes of its run."""
    torch.manual_seed(0)
    config = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "router": router})
    model = small_llama(50, 16, 24, 1)
    (block,) = attach(model, config)
    randomise_key(block.banks[0].gate.key)
    block.mode = BlockMode.SPECIALISING
    handle = SimpleNamespace(block=block, mode=block.mode)
    optimizer = SimpleNamespace(overflow=False)
    mesh = mesh_of_processes()
    run: Any = SimpleNamespace(blocks=[handle], mesh=mesh, context=block.context, tokens=0, step=3, optimizer=optimizer)
    passes = Passes(run)
    model.train()(input_ids=torch.randint(50, (2, 9)))
    return run, passes, block.banks[0].gate.key


def test_a_skipped_step_leaves_moving_clusters_alone() -> None:
    run, passes, key = trained(kind="online", directions=8, balance_rate=0.1)
    bank = run.blocks[0].block.banks[0]
    assert int(bank.loads.step.sum()) == 18 and bank.loads.sums is not None
    before = {name: buffer.clone() for name, buffer in key.named_buffers()}
    bank.loads.sums.fill_(torch.inf)
    run.optimizer.overflow = True
    passes.close_step()
    assert run.tokens == 18 and all(torch.equal(buffer, before[name]) for name, buffer in key.named_buffers())
    assert bank.loads.sums is None and int(bank.loads.step.sum()) == 0 and len(set(bank.loads.share.tolist())) == 1
    run.optimizer.overflow = False
    bank.deepspeed_moe.train()
    run.blocks[0].block(torch.randn(2, 9, 16))
    passes.close_step()
    moved = {name for name, buffer in key.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {"cluster_centroids", "cluster_bias"}


def test_sums_that_are_not_finite_stop_the_run() -> None:
    run, passes, _ = trained(kind="online", directions=8)
    run.blocks[0].block.banks[0].loads.sums.fill_(torch.nan)
    with pytest.raises(MocteError, match=r"step 3, router model.layers.0.mlp.0: .* NaN or infinite"):
        passes.close_step()


def test_a_key_of_somebodys_own_moves() -> None:
    _, passes, key = trained(kind="most-tokens")
    key.cluster_seen.zero_()
    passes.close_step()
    assert key.cluster_seen.sum() == 18 and key.cluster_seen.max() == 18
