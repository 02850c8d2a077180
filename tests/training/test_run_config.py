"""Run files: what they may say, what follows from them, and errors that name key, value and mend."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING

from mocte_ds.base_model import base_facts
from mocte_ds.checkpoints.names import MODEL_FILE
from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.moe.attach import matching_modules
from mocte_ds.moe.ffn_shape import ffn_shape
from mocte_ds.training.model import TransformersModel, make_model, set_longest_context
from mocte_ds.training.presets import PRESETS, preset
from mocte_ds.training.run_config import RunConfig, read_run
from mocte_ds.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted((ROOT / "launch" / "runs").glob("*.yaml"))
PRESET_FILES = [path for path in RUN_FILES if path.stem != "smollm2-135m"]


def minimal() -> dict:
    return {
        "model": {"preset": "quickstart"},
        "data": {"prepared": "somewhere"},
        "training": {"steps": 100, "batch_tokens": 8192},
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": True},
            "mocte": {"modules": "model.layers.*.mlp", "num_experts": 4, "ep_size": 2},
        },
    }


def read(tmp_path: Path, values: dict, *changes: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return read_run(path, changes)


def test_completes_the_deepspeed_config(tmp_path: Path) -> None:
    settings = read(tmp_path, minimal()).resolve(world_size=2, eod_id=2, vocab_size=2048)
    assert settings["train_batch_size"] == 32
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["optimizer"]["params"] == {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}
    assert settings["scheduler"]["params"]["total_num_steps"] == 100
    assert settings["mocte"]["total_steps"] == 100
    assert settings["mocte"]["eod_id"] == 2
    assert (
        settings["train_batch_size"]
        == settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * 2
    )


def preset_model() -> TransformersModel:
    """The model of :func:`minimal`."""
    return TransformersModel(hf=preset("quickstart"))


def write_start(folder: Path) -> Path:
    """A checkpoint that says of its model how large it is, and nothing else."""
    (folder / "step0").mkdir(parents=True)
    (folder / "latest").write_text("step0")
    torch.save(
        {"module": {}, "base": base_facts(make_model(preset_model(), weights=False))}, folder / "step0" / MODEL_FILE
    )
    return folder


def test_sizes_of_an_imported_start(tmp_path: Path) -> None:
    """They come from the checkpoint; only what has no weights may differ."""
    start = write_start(tmp_path / "start")
    values = {
        **minimal(),
        "model": {"init": str(start), "max_position_embeddings": 128, "activation_checkpointing": True},
    }
    run = read(tmp_path, values)
    assert run.init == str(start) and run.identity()["model.init"] == str(start)
    assert run.model.activation_checkpointing and run.context == run.model.max_positions == 128
    assert run.model.num_params() == preset_model().num_params()
    assert read(tmp_path, minimal()).identity()["model.init"] is None
    for change, told in (
        ("model.num_hidden_layers=3", "unknown key model.num_hidden_layers"),
        ("model.max_position_embeddings=0", "max_position_embeddings = 0"),
        ("model.preset=quickstart", "model.preset and model.init both say"),
        ("model.init=nowhere", "nowhere is not a folder"),
    ):
        with pytest.raises(MocteError, match=told):
            read(tmp_path, values, change)


def test_a_start_of_the_decoder_that_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "step0").mkdir()
    (tmp_path / "latest").write_text("step0")
    sizes = {"style": "llama", "num_layers": 2}
    torch.save({"module": {}, "global_steps": 0, "model": sizes}, tmp_path / "step0" / MODEL_FILE)
    with pytest.raises(MocteError, match="a decoder of an earlier version of mocte_ds"):
        read(tmp_path, {**minimal(), "model": {"init": str(tmp_path)}})


def test_the_longest_context_of_a_start(tmp_path: Path) -> None:
    """Positions by kind of layer are looked into as well."""
    plain, odd = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    for second, fits in ((plain, True), (odd, False)):
        rope = {"full_attention": second, "sliding_attention": plain}
        config = CONFIG_MAPPING["gemma3_text"](rope_parameters=rope)
        if fits:
            set_longest_context(config, 64)
            assert config.max_position_embeddings == 64
        else:
            with pytest.raises(ConfigError, match="cannot be changed"):
                set_longest_context(config, 64)


def test_own_scheduler_stays(tmp_path: Path) -> None:
    values = minimal()
    values["deepspeed"]["scheduler"] = {"type": "WarmupLR", "params": {}}
    assert read(tmp_path, values).resolve(2, 2, 2048)["scheduler"]["type"] == "WarmupLR"


def test_changes_from_the_command_line(tmp_path: Path) -> None:
    changes = (
        "training.learning_rate=2e-4",
        "model.num_hidden_layers=3",
        "deepspeed.mocte.freeze.policy=off",
        "data.weights={a: 1}",
    )
    run = read(tmp_path, minimal(), *changes)
    assert run.training.learning_rate == 2e-4
    assert run.model == TransformersModel(hf={**preset("quickstart"), "num_hidden_layers": 3})
    assert run.deepspeed["mocte"]["freeze"] == {"policy": "off"}  # a boolean in YAML 1.1
    assert run.data.weights == {"a": 1.0}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "one of preset, hf, pretrained and init must say which model"),
        ({"style": "llama", "num_layers": 2}, "one of preset, hf, pretrained and init must say which model"),
        ({"preset": "gpt-140m", "n_embd": 96, "hidden_size": 96}, "model: hidden_size and n_embd are two names"),
        ({"preset": ["quickstart"]}, r"model.preset = \['quickstart'\] is unknown"),
    ],
)
def test_models_that_nobody_knows(tmp_path: Path, model: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, {**minimal(), "model": model})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_that_their_docstring_says(tmp_path: Path, name: str) -> None:
    run = read(tmp_path, minimal(), f"model.preset={name}")
    said = re.search(rf"^ *{name} +([\d,]+)", str(preset.__doc__), re.MULTILINE)
    assert said and run.model.num_params() == int(said.group(1).replace(",", ""))


def test_a_preset_takes_either_name_of_a_key(tmp_path: Path) -> None:
    """GPT-2's `hidden_size` is `n_embd`."""
    first, second = (
        read(tmp_path, minimal(), "model.preset=gpt-140m", f"model.{key}=96", "model.activation_checkpointing=true")
        for key in ("n_embd", "hidden_size")
    )
    assert first.model == second.model and first.model.config.hidden_size == 96 and first.model.num_heads == 12
    assert first.model.activation_checkpointing and first.model.config.resid_pdrop == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.step=5", "training.step .value 5.. Did you mean 'steps'"),
        ("trainig.steps=5", "section 'trainig'.*Did you mean 'training'"),
        ("model.hidden_sizes=5", "model: unknown key 'hidden_sizes' of a LlamaConfig.*'hidden_size'"),
        ("model.num_layers=3", "model: unknown key 'num_layers' of a LlamaConfig.*'num_hidden_layers'"),
        ("model.hidden_size=x", "model: LlamaConfig refuses it: .*hidden_size"),
        ("model.num_attention_heads=3", "model: LlamaConfig refuses it: "),
        ("model.activation_checkpointing=yes please", "model.activation_checkpointing = 'yes please' must be of type"),
        ("model.num_hidden_layers=0", "model: the number of layers must lie between 1 and 100,000, not 0"),
        ("model.hf={model_type: gpt2}", "model.hf and model.preset both say"),
        ("model.pretrained=nowhere", "model.pretrained and model.preset both say"),
        ("model.model_type=mistral", "model.model_type and model.preset both say"),
        ("model.preset=quikstart", "'quikstart'.*'quickstart'"),
        ("training.steps=many", "training.steps = 'many' must be of type int"),
        ("training.steps=0", "training.steps = 0 must be 1 or more"),
        ("training.betas=[0.9]", "two numbers"),
        ("training.context=512", "longer than the model's longest context, 256"),
        ("deepspeed.mocte.num_expert=4", "mocte.num_expert .*'num_experts'"),
        ("deepspeed.mocte.ep_size=3", "allowed: .1, 2, 4."),
        ("deepspeed.mocte.expert.kind=fnn", "'ffn'"),
        ("deepspeed.zero_optimisation={}", "deepspeed.zero_optimisation .*'zero_optimization'"),
        ("data.prepared=", "data.prepared"),
        ("steps=5", "section.key=value"),
        ("training.steps", "section.key=value"),
        ("training.steps.x=1", "steps is a value"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, minimal(), change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "training.batch_tokens=5000",
            r"not a multiple of 4096 = 2 ranks x micro_batch 8 x context 256; 4096 would be",
        ),
        ("deepspeed.gradient_clipping=5.0", "deepspeed.gradient_clipping = 5.0 contradicts"),
        ("deepspeed.optimizer={type: AdamW, params: {lr: 1.0}}", "params.lr = 1.0 contradicts"),
        ("deepspeed.mocte.total_steps=7", "mocte.total_steps = 7 contradicts"),
        ("deepspeed.mocte.log=runs/x", "deepspeed.mocte.log: the logs of a run file lie in --out"),
        ("deepspeed.mocte.ep_size=4", "does not divide the 2 ranks of the run; allowed with 4 experts: .1, 2."),
        ("model.vocab_size=2000", "the tokenizer has 2048 pieces"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, change: str, message: str) -> None:
    run = read(tmp_path, minimal(), change)
    with pytest.raises(ConfigError, match=message):
        run.resolve(2, 2, 2048)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_run(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("model: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot read"):
        read_run(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a run file"):
        read_run(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="deepspeed = 'none.json' is not a file"):
        read(tmp_path, {**minimal(), "deepspeed": "none.json"})


def test_no_mocte_block_is_the_dense_twin(tmp_path: Path) -> None:
    values = minimal()
    twin = read(tmp_path, values, "deepspeed.mocte=null")
    settings = twin.resolve(world_size=2, eod_id=2, vocab_size=2048)
    assert "mocte" not in twin.deepspeed and "mocte" not in settings
    blocks = read(tmp_path, values)
    differing = {key for key, value in blocks.identity().items() if twin.identity()[key] != value}
    assert differing == {"deepspeed.mocte is there"}, "a run with blocks must not go on as its twin"
    del values["deepspeed"]["mocte"]
    assert read(tmp_path, values) == twin
    assert read(tmp_path, {**values, "deepspeed": {**values["deepspeed"], "mocte": None}}) == twin
    with pytest.raises(ConfigError, match="mocte is a value, not a section"):
        read(tmp_path, minimal(), "deepspeed.mocte=null", "deepspeed.mocte.num_experts=2")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("training:\n  steps: 5\n  seed: 1\n  steps: 6\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot read .*the key 'steps' is there twice.* line 4") as caught:
        read_run(path)
    assert "\n" not in str(caught.value)
    # The same name in another section is another key, and a merged section may be overridden.
    path.write_text("a: &a {steps: 5}\nb: {<<: *a, steps: 6}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"steps": 5}, "b": {"steps": 6}}


def test_identity_ignores_only_what_does_not_matter(tmp_path: Path) -> None:
    first = read(tmp_path, minimal()).identity()
    assert first == read(tmp_path, minimal(), "training.micro_batch=4", "training.checkpoint_every=3").identity()
    for change in (
        "training.learning_rate=1e-3",
        "model.num_hidden_layers=2",
        "data.weights={a: 1}",
        "deepspeed.bf16.enabled=false",
    ):
        assert first != read(tmp_path, minimal(), change).identity(), change


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_shipped_run_files(path: Path, tmp_path: Path) -> None:
    started = "init" in yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    run = read_run(path, [f"model.init={write_start(tmp_path / 'start')}"] if started else [])
    settings = run.resolve(_ranks(path), eod_id=2, vocab_size=run.model.vocab_size)
    assert settings["train_batch_size"] * run.context == run.training.batch_tokens
    if path.stem not in ("quickstart", "cpu-small", "cpu-wide", "smollm2-135m"):
        assert 0.5e6 <= run.training.batch_tokens <= 0.55e6


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_shipped_blocks_are_ffns_of_their_presets(path: Path) -> None:
    run = read_run(path)
    with torch.device("meta"):
        model = make_model(run.model, weights=False)
    names = matching_modules(model, MocteConfig.from_dict(run.deepspeed["mocte"]).modules)
    shapes = [ffn_shape(model.get_submodule(name)) for name in names]
    assert all(shape and shape.hidden_size == run.model.config.hidden_size for shape in shapes)
    # The GPTs' blocks are the back half of the layers, as in the paper.
    assert len(names) == run.model.config.num_hidden_layers // (2 if "gpt" in path.stem else 1)


def _ranks(path: Path) -> int:
    """Ranks for which a run file is written, from its first lines ("N GPUs" or "N processes")."""
    words = path.read_text(encoding="utf-8").split("\nmodel:")[0].replace(",", " ").replace(".", " ").split()
    return next(int(a) for a, b in zip(words, words[1:], strict=False) if b in ("GPUs", "processes") and a.isdigit())


def test_every_shipped_deepspeed_config_is_used() -> None:
    used = {yaml.safe_load(path.read_text(encoding="utf-8"))["deepspeed"] for path in RUN_FILES}
    shipped = {f"../../ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    assert used == shipped
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert "modules" in json.loads(path.read_text(encoding="utf-8"))["mocte"]
