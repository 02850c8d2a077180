"""Experts before their birth, and FFNs that experts have replaced, take no memory and are in no checkpoint."""

import ctypes
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from mocte_ds.checkpoints.fp32 import get_fp32_state_dict_from_zero_checkpoint
from mocte_ds.checkpoints.names import EXPERT_FILE, EXPERT_NAME, MODEL_FILE, expert_parameter
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.checkpoints.source import CheckpointSource
from mocte_ds.errors import CheckpointError, ConfigError
from tests.checkpoints.by_hand import sign
from tests.spawn import spawn

HIDDEN, WIDTH, LAYERS, EXPERTS, VOCAB = 64, 512, 3, 4, 64
FFN = 3 * HIDDEN * WIDTH
TRUNK = 2 * VOCAB * HIDDEN + LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN) + HIDDEN
MMAP_THRESHOLD = -3  # of malloc.h
BF16, STATE = 2, 12
"""Bytes of a weight, and of its master and moments."""


def engine_of(stage: int, ep_size: int, kind: str = "ffn") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    import mocte_ds

    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes))
    block = {"modules": "model.layers.*.mlp", "num_experts": EXPERTS, "auto": False, "total_steps": 100}
    zero = {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "mocte": {**block, "ep_size": ep_size, "expert": {"kind": kind, **({} if kind == "ffn" else {"width": 16})}},
    }
    return mocte_ds.initialize(model=model, config=config)[0]


def step(engine: Any, number: int) -> float:
    rank = torch.distributed.get_rank()
    ids = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(2 * number + rank))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss)


def weight_bytes(engine: Any) -> int:
    """Of the storages behind the parameters, and of what stage 3 has cut off them; each once."""
    tensors = [t for p in engine.module.parameters() for t in (p, getattr(p, "ds_tensor", p))]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def lived(stage: int, ep_size: int, kind: str, folder: str) -> dict[str, Any]:
    """Bytes of this rank before, at and after the births of all blocks, and the files of what is saved."""
    from tests.zero.live_bytes import LiveBytes

    torch.manual_seed(0)
    engine = engine_of(stage, ep_size, kind)
    losses, found = [step(engine, number) for number in range(2)], {"warm-up": weight_bytes(engine)}
    engine.save_checkpoint(folder, "warm-up")
    buckets = [len(bucket.buffer) for bucket in engine.optimizer._expert_buckets.values()] if stage < 3 else []
    found["bucket before"] = buckets
    above = []
    for block in range(LAYERS):
        live = LiveBytes()
        with live:
            engine.mocte.emerge(block)
        above.append(live.peak - LiveBytes().now())
        losses.append(step(engine, 2 + block))
        if block == 0:
            engine.save_checkpoint(folder, "one-born")
            found["one-born"] = weight_bytes(engine)
    found["above"] = above
    found["after"] = weight_bytes(engine)
    engine.mocte.freeze(0, 1)
    engine.save_checkpoint(folder, "after")
    losses += [step(engine, 5 + number) for number in range(2)]
    resumed = {}
    for tag, done in (("warm-up", 2), ("one-born", 3), ("after", 5)):
        engine.load_checkpoint(folder, tag)  # goes back each time: what was born waits again, what was freed is there
        again = []
        for number in range(done, 7):
            if done <= number < 5 and number - 2 >= (0 if tag == "warm-up" else 1):
                engine.mocte.emerge(number - 2)
            if number == 5 and tag != "after":
                engine.mocte.freeze(0, 1)
            again.append(step(engine, number))
        resumed[tag] = again == losses[done:]
        found[f"{tag} again"] = weight_bytes(engine)
    if kind == "ffn":  # what still reads a freed weight is told so
        dense = engine.mocte.blocks[0].block.dense
        with pytest.raises(RuntimeError), deepspeed.zero.GatheredParameters([dense.up_proj.weight]):
            dense.up_proj(torch.zeros(2, HIDDEN, dtype=torch.bfloat16))
    return {**found, "resumed": resumed}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ep_size", "kind"), [(1, 1, "ffn"), (2, 2, "ffn"), (2, 2, "lora"), (3, 2, "ffn"), (3, 1, "lora")]
)
def test_bytes_of_a_rank_and_of_its_checkpoints(stage: int, ep_size: int, kind: str, tmp_path: Path) -> None:
    expert = FFN if kind == "ffn" else 3 * HIDDEN * 16
    # Stage 3 shares weights out: among both ranks, and an expert among those that hold it.
    local, shared_by, expert_by = EXPERTS // ep_size, *((2, 2 // ep_size) if stage == 3 else (1, 1))
    trunk, dense, experts = BF16 * TRUNK / shared_by, BF16 * FFN / shared_by, BF16 * local * expert / expert_by
    kept = dense if kind == "lora" else 0
    for found in spawn(lived, 2, stage, ep_size, kind, str(tmp_path), timeout=400, deepspeed=True):
        near = {"rel": 1e-3}  # padding
        assert found["warm-up"] == pytest.approx(trunk + LAYERS * dense, **near)
        assert found["one-born"] == pytest.approx(trunk + (LAYERS - 1) * dense + kept + experts, **near)
        assert found["after"] == pytest.approx(trunk + LAYERS * (kept + experts), **near)
        assert found["resumed"] == {"warm-up": True, "one-born": True, "after": True}
        assert {found[f"{tag} again"] for tag in found["resumed"]} == {found["after"]}
        assert not any(found["bucket before"])
        # One block's experts with their masters and moments, before ranks share them.
        assert max(found["above"]) <= (BF16 + STATE) * local * max(expert, FFN), found["above"]
    for tag, born in (("warm-up", 0), ("one-born", 1), ("after", LAYERS)):
        files = [path.name for path in (tmp_path / tag).iterdir()]
        assert sum(bool(EXPERT_NAME.fullmatch(name)) for name in files) == born * EXPERTS, tag
        name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        shared = torch.load(tmp_path / tag / name, weights_only=True)["module"]
        wanted = LAYERS - born if kind == "ffn" else LAYERS
        assert len([key for key in shared if ".dense." in key]) == 3 * wanted, tag
        assert not [key for key in shared if "deepspeed_experts" in key]


def one_born(folder: str) -> None:
    """Train and save a run in which one block has emerged."""
    torch.manual_seed(0)
    engine = engine_of(2, 2)
    engine.mocte.emerge(0)
    step(engine, 0)
    engine.save_checkpoint(folder, "step1")


def gone_on(folders: list[str]) -> list[list[float]]:
    losses = []
    for folder in folders:
        engine = engine_of(2, 2)
        engine.load_checkpoint(folder)
        losses.append([step(engine, number) for number in range(1, 4)])
        engine.mocte.emerge(1)
        losses[-1].append(step(engine, 4))
    return losses


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It holds weights that do not run; here they are wrong ones."""
    spawn(one_born, 2, str(tmp_path / "now"), timeout=150, deepspeed=True)
    earlier = tmp_path / "earlier" / "step1"
    shutil.copytree(tmp_path / "now", earlier.parent)
    shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    wrong = {f"{name}.weight": torch.full(shape, 7.0, dtype=torch.bfloat16) for name, shape in shapes.items()}
    model = torch.load(earlier / MODEL_FILE, weights_only=True)
    model["module"].update({f"model.layers.0.mlp.dense.{name}": value for name, value in wrong.items()})
    torch.save(model, earlier / MODEL_FILE)
    for layer in (1, 2):
        for k in range(EXPERTS):
            path = expert_parameter(f"model.layers.{layer}.mlp", 0, k, "")
            torch.save({path + n: v for n, v in wrong.items()}, earlier / EXPERT_FILE.format(layer=layer, expert=k))
    sign(earlier, ranks=2)
    folders = [str(tmp_path / name) for name in ("now", "earlier")]
    for now, then in spawn(gone_on, 2, folders, timeout=200, deepspeed=True):
        assert now == then
    assert CheckpointSource(folders[0]).shapes == CheckpointSource(folders[1]).shapes
    found = [get_fp32_state_dict_from_zero_checkpoint(folder) for folder in folders]
    assert found[0].keys() == found[1].keys() == CheckpointSource(folders[0]).shapes.keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    reshape(folders[1], tmp_path / "one", 1, 1)
    assert get_fp32_state_dict_from_zero_checkpoint(tmp_path / "one").keys() == found[0].keys()
    (earlier.parent.parent / "now" / "step1" / EXPERT_FILE.format(layer=0, expert=3)).unlink()
    sign(tmp_path / "now" / "step1", ranks=2)
    with pytest.raises(CheckpointError, match="layer_0_expert_3_mp_rank_00_model_states.pt is missing"):
        CheckpointSource(folders[0])


def test_an_ffn_that_shares_weights_is_refused() -> None:
    from mocte_ds.config import MocteConfig
    from mocte_ds.moe import attach
    from tests.small_models import small_llama

    model = small_llama(64)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ConfigError, match="the same parameter as model.layers.1.mlp.up_proj.weight"):
        attach(model, MocteConfig.from_dict({"modules": "model.layers.0.mlp", "num_experts": 2}))


def start_at_stage_3(hidden: int, layers: int, experts: int) -> tuple[int, int]:
    """Bytes that initialize adds to a process at most, and bytes of all experts in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import mocte_ds
    from mocte_ds.benchmark.measure.memory import Peak

    engine_of(3, 1)  # whatever is imported and compiled at a first start
    # As for the matrices of a large model: what is not touched is not there, and what is freed goes back at once.
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, **sizes)).bfloat16()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5000},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "mocte": {"modules": "model.layers.*.mlp", "num_experts": experts, "auto": False, "total_steps": 100},
    }
    peak = Peak()
    mocte_ds.initialize(model=model, config=config)
    return peak.to_dict()["added_bytes"], BF16 * layers * experts * 12 * hidden**2


def test_waiting_experts_take_no_memory_of_the_host_under_stage_3() -> None:
    """Each of two ranks, whose memory is that of the device too, cuts its half off; the dense model adds 40 MB."""
    for added, experts in spawn(start_at_stage_3, 2, 256, 8, 16, timeout=200, deepspeed=True):
        assert experts / 2 < added < experts / 2 + 60e6, (added / 1e6, experts / 1e6)


def names_written(stage: int, folder: str) -> list[str]:
    """Files of experts that this rank writes, where both ranks hold all of them."""
    torch.manual_seed(0)
    engine = engine_of(stage, 1)
    for block in range(LAYERS - 1):
        engine.mocte.emerge(block)
    step(engine, 0)
    saver, found = engine.checkpoint_engine.saver, list[str]()
    save = saver.save

    def noted(save_dir: Any, tag: str, files: dict[str, Any], *rest: Any) -> None:
        found.extend(name for name in files if EXPERT_NAME.fullmatch(name))
        save(save_dir, tag, files, *rest)

    saver.save = noted
    engine.save_checkpoint(folder, "step1")
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_hold_the_same_experts_take_turns_to_write_them(stage: int, tmp_path: Path) -> None:
    files = [[EXPERT_FILE.format(layer=layer, expert=k) for k in range(EXPERTS)] for layer in range(LAYERS - 1)]
    assert spawn(names_written, 2, stage, str(tmp_path), timeout=200, deepspeed=True) == files
    source = CheckpointSource(tmp_path)
    path = expert_parameter("model.layers.1.mlp", 0, 0, "up_proj.weight")
    assert float(source.read(path).abs().sum()) > 0
