"""Keys that DeepSpeed would pass over, and schedulers that it could not make, are refused by name."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.monitor import config as monitor
from deepspeed.runtime import config

from mocte_ds import deepspeed_settings
from mocte_ds.deepspeed_settings import checked_settings, parsed_by_deepspeed, require_scheduler, tensor_ranks
from mocte_ds.errors import ConfigError

SOURCES = ("constants.py", "config.py")


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (
            {"type": "WarmupDecayLR", "params": {"total_step": 9}},
            "params.total_step is not .* Did you mean 'total_num_steps'",
        ),
        ({"type": "WarmupDecayLR", "params": {"warmup_num_steps": 9}}, "params.total_num_steps is missing"),
        ({"type": "WarmupDecayL"}, "type = 'WarmupDecayL' is not one of .* Did you mean 'WarmupDecayLR'"),
        ({"type": "StepLR", "params": {"gamma": 0.5}}, "params.step_size is missing; StepLR needs it"),
        ({"type": "StepLR", "params": {"step_size": 2, "gama": 0.5}}, "Did you mean 'gamma'"),
    ],
)
def test_refused(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        require_scheduler(checked_settings({"scheduler": section}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scheduler": {}},
        {"scheduler": {"type": "WarmupLR"}},
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 2}}},
        {"scheduler": {"type": "StepLR", "params": {"step_size": 2}}},
    ],
)
def test_accepted(settings: dict[str, Any]) -> None:
    require_scheduler(checked_settings(settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gradient_acumulation_steps": 2}, "unknown key gradient_acumulation_steps .* 'gradient_accumulation_steps'"),
        ({"my_own": 1}, "unknown key my_own"),
        ({"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}}, "preset_model = 'llama' is not supported"),
        ({"tensor_parallel": 2}, "tensor_parallel = 2 must be a section"),
        ({"tensor_parallel": {"autotp_size": -2}}, "tensor_parallel.autotp_size = -2 must be a number of ranks"),
        ({"autotp_size": 2}, "autotp_size = 2 is not supported: it belongs into the section tensor_parallel"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size = 2 is not supported: .*read whole sequences"),
        ({"data_parallel_size": 4}, "data_parallel_size = 4 is not supported: it follows"),
        ({"pipeline": {"stages": 2}}, "pipeline = .* is not supported"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel = .* is not supported: .*mocte.ep_size"),
        ({"compile": True}, "compile = True is not supported"),
        ({"elasticity": {"enabled": True}}, "DeepSpeed has removed it"),
    ],
)
def test_keys_that_would_be_passed_over(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        checked_settings(settings)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"optimizer": {"parms": {"lr": 1e-3}}}, "unknown key optimizer.parms. Did you mean 'params'"),
        ({"scheduler": {"typ": "WarmupLR"}}, "unknown key scheduler.typ. Did you mean 'type'"),
        ({"activation_checkpointing": {"partition_activation": True}}, "'partition_activations'"),
        (
            {"checkpoint": {"tag_validate": "Fail"}},
            "unknown key checkpoint.tag_validate. .*'tag_validation'",
        ),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "'grad_accum_dtype'"),
        ({"flops_profiler": {"profile_steps": 3}}, "'profile_step'"),
        ({"torch_autocast": {"type": "bf16"}}, "unknown key torch_autocast.type"),
        ({"aio": {"queue_length": 3}}, "unknown key aio.queue_length"),
        ({"timers": {"throughout": {}}}, "'throughput'"),
        # DeepSpeed refuses these itself, without a name to take instead.
        ({"zero_optimization": {"stgae": 2}}, r"unknown key stgae \(DeepSpeedZeroConfig\). Did you mean 'stage'"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "unknown key offload_optimizer.devise .* 'device'",
        ),
        ({"bf16": {"enabeld": True}}, "unknown key enabeld .* 'enabled'"),
        ({"tensorboard": {"output_pth": "x"}}, "unknown key tensorboard.output_pth .* 'output_path'"),
        ({"comms_logger": {"enbled": True}}, "unknown key enbled .* 'enabled'"),
    ],
)
def test_unknown_keys_of_sections(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parsed_by_deepspeed(checked_settings({"train_micro_batch_size_per_gpu": 1, **section}))


@pytest.mark.parametrize("name", deepspeed_settings._KEYS)
def test_keys_of_a_section_are_read_by_deepspeed(name: str) -> None:
    """They stand in DeepSpeed's sources as strings."""
    root = Path(config.__file__).parents[1]
    text = "".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py") if path.name in SOURCES)
    for key in deepspeed_settings._KEYS[name].split():
        assert re.search(rf"""= ?["']{key}["']|^    {key}:""", text, re.MULTILINE), key


def test_what_says_that_it_is_not_used_is_left_out() -> None:
    settings = {"tensor_parallel": {"autotp_size": 0}, "sequence_parallel_size": 1, "pipeline": {"stages": 1}}
    settings |= {"compile": False, "data_efficiency": {"enabled": False, "seed": 7}, "elasticity": None, "bf16": None}
    assert checked_settings({**settings, "steps_per_print": 5}) == {"steps_per_print": 5}
    assert tensor_ranks(checked_settings(settings)) == 1
    cut = checked_settings({"tensor_parallel": {"autotp_size": 4, "tp_overlap_comm": False}})
    assert cut == {"tensor_parallel": {"autotp_size": 4}} and tensor_ranks(cut) == 4


def test_every_key_that_deepspeed_reads_is_known_or_refused_with_a_reason() -> None:
    """Read out of DeepSpeed's own config module, so that another version's keys are noticed."""
    read = inspect.getsource(config) + inspect.getsource(monitor)
    names = set(re.findall(r"param_dict(?:\.get\(|\[)['\"](\w+)['\"]", read))
    constants = re.findall(r"get_scalar_param\(\s*param_dict,\s*([A-Z_]+)", read)
    names |= {getattr(config, name) for name in constants} | set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    names |= {config.OPTIMIZER, config.SCHEDULER, config.CHECKPOINT, config.DATA_TYPES, config.TORCH_AUTOCAST}
    assert len(names) > 30
    assert names <= {*deepspeed_settings._KNOWN, *deepspeed_settings._UNSUPPORTED}
