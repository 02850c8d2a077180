"""`model.bigram`: rows and sums against plain loops, documents, padding, caches, parameters and refusals."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mocte_ds.base_model import base_facts, require_base
from mocte_ds.base_model import make_model as make_stored
from mocte_ds.bigrams import Bigram, bigram_factors, bigram_rows, refuse_bigrams
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.flops.model_sizes import model_sizes
from mocte_ds.plan.parameters import count_parameters
from mocte_ds.training import make_engine as engines
from mocte_ds.training.model import CheckpointModel, Forward, TransformersModel, make_model, model_facts
from mocte_ds.training.run_config import read_run

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
OF_KIND = {
    "llama": {"intermediate_size": 24},
    "gpt2": {"n_inner": 24, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)},
}
END, ROWS = 2, 37
FACTORS = (1521439937, 623638695)


def config(kind: str = "llama", rows: int | None = ROWS, **more: Any) -> TransformersModel:
    return TransformersModel(
        hf={"model_type": kind, **SIZES, **OF_KIND[kind]},
        bigram=None if rows is None else Bigram(rows=rows, seed=5),
        **more,
    )


def drawn(kind: str = "llama", **more: Any) -> Any:
    """A model whose rows and factors are not those of birth, in evaluation mode."""
    torch.manual_seed(0)
    model = make_model(config(kind, **more), END).eval()
    with torch.no_grad():
        model.bigrams.table.weight.normal_()
        for add in model.bigrams.adds:
            add.scale.uniform_(0.2, 0.9)
    return model


def rows_by_hand(ids: torch.Tensor, end: int | None = END, rows: int = ROWS, seed: int = 5) -> torch.Tensor:
    """Python's integers, one token at a time."""
    a, b = bigram_factors(seed)
    found = [
        [rows if t == 0 or row[t - 1] == end else ((a * row[t - 1]) ^ (b * now)) % rows for t, now in enumerate(row)]
        for row in ids.tolist()
    ]
    return torch.tensor(found)


def logits_by_hand(
    plain: Any, state: Mapping[str, torch.Tensor], ids: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The layers of a Llama without any hook, one after the other, with the weights of a model that has a table."""
    plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("bigrams.")})
    hidden, added = plain.model.embed_tokens(ids), state["bigrams.table.weight"][rows]
    places = torch.arange(ids.shape[1])[None]
    causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]
    turned = plain.model.rotary_emb(hidden, position_ids=places)
    for number, layer in enumerate(plain.model.layers):
        hidden = hidden + state[f"bigrams.adds.{number}.scale"] * added
        hidden = layer(hidden, attention_mask=causal, position_embeddings=turned, position_ids=places)
    return plain.lm_head(plain.model.norm(hidden))


def test_rows_are_those_of_a_plain_loop_and_spread_evenly() -> None:
    before, ids = torch.arange(300).repeat_interleave(300), torch.arange(300).repeat(300)
    found = bigram_rows(before, ids, bigram_factors(0), 1000)
    a, b = (int(factor) for factor in bigram_factors(0))
    with np.errstate(over="raise"):
        expected = ((a * before.numpy()) ^ (b * ids.numpy())) % 1000
    assert np.array_equal(found.numpy(), expected)
    counts = np.bincount(found.numpy(), minlength=1000)
    assert counts.min() > 45 and counts.max() < 180, "a row of 1,000 has 90 of 90,000 pairs on average"
    assert bigram_rows(torch.tensor([-1, 0]), torch.tensor([7, 0]), bigram_factors(0), 1000).tolist() == [1000, 0]


def test_factors_are_odd_and_stay_what_they_are() -> None:
    """Checkpoints keep the seed alone."""
    assert bigram_factors(0) == FACTORS
    drawn_factors = {factor for seed in range(50) for factor in bigram_factors(seed)}
    assert len(drawn_factors) == 100 and all(factor % 2 and factor < 1 << 31 for factor in drawn_factors)


def test_a_model_is_its_dense_twin_at_birth_and_learns_from_there() -> None:
    ids = torch.randint(40, (4, 20), generator=torch.Generator().manual_seed(1))
    for kind in ("llama", "gpt2"):
        torch.manual_seed(3)
        dense = make_model(config(kind, rows=None), END).eval()
        torch.manual_seed(3)
        model = make_model(config(kind), END).eval()
        ours = model.state_dict()
        assert all(torch.equal(value, ours[name]) for name, value in dense.state_dict().items())
        assert torch.equal(model(input_ids=ids).logits, dense(input_ids=ids).logits)
        Forward(model, END).loss(model(input_ids=ids, use_cache=False), ids.roll(-1, 1)).backward()
        touched = model.bigrams.table.weight.grad.abs().sum(dim=1) > 0
        assert torch.equal(touched.nonzero()[:, 0], rows_by_hand(ids).unique())
        assert all(add.scale.item() == 1.0 and not add.scale.grad.any() for add in model.bigrams.adds)


def test_sums_and_gradients_are_those_of_plain_layers() -> None:
    ids = torch.randint(40, (5, 24), generator=torch.Generator().manual_seed(2))
    ids[1, 7] = ids[2, 0] = ids[2, 1] = ids[3, -1] = END
    model, plain, rows = drawn(), make_model(config(rows=None), END).eval(), rows_by_hand(ids)
    assert torch.allclose(model(ids).logits, logits_by_hand(plain, model.state_dict(), ids, rows), atol=1e-5)
    # The gradient of the table, by differences of the plain layers.
    weights = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(4)).double()
    model = model.double()
    (model(ids).logits * weights).sum().backward()
    row, step = int(rows[1, 8]), 1e-3
    assert row == ROWS, "the token after an end has the row of its own"
    sums = []
    for sign in (1, -1):
        other = copy.deepcopy(model).float()
        with torch.no_grad():
            other.bigrams.table.weight[row, 3] += sign * step
            logits = logits_by_hand(plain, other.state_dict(), ids, rows)
        sums.append((logits.double() * weights).sum().item())
    assert model.bigrams.table.weight.grad[row, 3].item() == pytest.approx((sums[0] - sums[1]) / (2 * step), 2e-3)


def test_a_document_s_first_token_does_not_see_the_one_before() -> None:
    model, ids = drawn(), torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(6))
    seen = []
    model.bigrams.table.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    other = ids.clone()
    other[:, 4] = (ids[:, 4] + 1 - 3) % 37 + 3
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, 12)
    for given in (ids, other):
        model(input_ids=given, position_ids=positions)
        model(input_ids=given)
    assert (seen[0][:, 5] == ROWS).all() and (seen[0][:, 0] == ROWS).all() and (seen[0] == ROWS).sum() == 4
    assert torch.equal(seen[0][:, 5:], seen[2][:, 5:]) and not torch.equal(seen[1][:, 5], seen[3][:, 5])
    Forward(model, END)  # refuses models that see over the border


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_with_a_cache_equals_generation_without(kind: str) -> None:
    model = drawn(kind)
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(7))
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **how)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=True, **how), plain)
    assert len(plain[:, 6:].unique()) > 3
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.int64), mask], dim=1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **how)[:, 10:], plain[:, 6:])


def test_layers_that_are_computed_again_read_the_same_rows() -> None:
    ids, found = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(8)), []
    for again in (False, True):
        model = drawn(activation_checkpointing=again).train()
        Forward(model, END).loss(model(input_ids=ids, use_cache=False), ids.roll(-1, 1)).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_rows_cost_parameters_that_are_not_active_and_no_products() -> None:
    changes = ["deepspeed.mocte=null"]
    dense = count_parameters(read_run("cpu-small", changes))[0]
    run = read_run("cpu-small", [*changes, "model.bigram={rows: 1000}"])
    found, sizes, _ = count_parameters(run)
    assert found.total - dense.total == 1001 * 64 + 4 == run.model.num_params() - dense.total
    assert (found.active - found.embedding) - (dense.active - dense.embedding) == 4
    assert sizes == count_parameters(read_run("cpu-small", changes))[1]
    ids, counted = torch.randint(40, (2, 8)), []
    for rows in (None, ROWS):
        model = make_model(config(rows=rows), END)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, use_cache=False)
        counted.append((counter.get_total_flops(), model_sizes(model)))
    assert counted[0] == counted[1] and counted[0][0] > 0


@pytest.mark.parametrize("study", ["baselines", "tuned"])
def test_the_study_s_arm_has_the_parameters_of_its_mixtures(study: str) -> None:
    from mocte_ds.shipped import shipped_file
    from mocte_ds.study.plan import read_study

    plan = read_study(shipped_file("studies", study))
    runs = {run.arm.name: plan.config(run) for run in plan.runs(dict.fromkeys(arm.name for arm in plan.arms))}
    bigram, mixture, dense = (count_parameters(runs[name])[0] for name in ("dense-bigram", "hash", "dense"))
    assert (
        abs(bigram.total - mixture.total) < 64
        and bigram.active - bigram.embedding == dense.active - dense.embedding + 4
    )


def test_decay_is_that_of_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def keep(**arguments: Any) -> None:
        given.update(arguments)
        raise InterruptedError

    monkeypatch.setattr(engines.deepspeed, "initialize", keep)
    model = make_model(config(), END)
    with pytest.raises(InterruptedError):
        engines.make_engine(model, {})
    decayed, plain = ({id(p) for p in group["params"]} for group in given["model_parameters"])
    assert {id(model.bigrams.table.weight), id(model.model.embed_tokens.weight)} <= decayed
    assert {id(add.scale) for add in model.bigrams.adds} <= plain


def test_a_stored_model_has_its_table() -> None:
    facts = require_base(base_facts(make_model(config(), END)), "here")
    assert facts["bigram"] == {"rows": ROWS, "seed": 5, "scale": 1.0, "end_id": END}
    again, model = CheckpointModel(base=facts), drawn()
    assert again.bigram == Bigram(rows=ROWS, seed=5)
    assert model_facts(again)["bigram"] == model_facts(config())["bigram"]
    for made in (make_model(again, 9), make_stored(facts, "here").to_empty(device="cpu")):
        made.load_state_dict(model.state_dict())
        assert base_facts(made)["bigram"] == facts["bigram"], "the end of a document is the checkpoint's"
        ids = torch.tensor([[5, END, 7, 8], [9, 9, 9, 9]])
        made.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state
        assert torch.allclose(made.eval()(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)
    assert "bigram" not in base_facts(make_model(config(rows=None), END))
    for damage in ({"rows": 0}, {"rows": "many"}, {"end_id": "x"}, {"strange": 1}):
        with pytest.raises(CheckpointError, match="model.bigram is damaged"):
            require_base({**facts, "bigram": {**facts["bigram"], **damage}}, "here")
    with pytest.raises(CheckpointError, match="model.bigram is damaged"):
        require_base({**facts, "bigram": [1]}, "here")
    with pytest.raises(CheckpointError, match=r"here has a hashed-bigram embedding .* a folder cannot hold"):
        refuse_bigrams(facts["bigram"], "here", "a folder")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.bigram is for dense runs"):
        read_run("cpu-small", ["model.bigram={rows: 5}"])
    with pytest.raises(ConfigError, match=r"unknown key model\.bigram\.row .* Did you mean 'rows'"):
        read_run("cpu-small", ["deepspeed.mocte=null", "model.bigram={row: 5}"])
    with pytest.raises(ConfigError, match="greater than 0"):
        read_run("cpu-small", ["deepspeed.mocte=null", "model.bigram={rows: 5, scale: 0}"])
    assert read_run("cpu-small", ["model.bigram=null"]).model.bigram is None
    with pytest.raises(ConfigError, match="reads token ids"):
        drawn()(inputs_embeds=torch.zeros(1, 3, 16))
