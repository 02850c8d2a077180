"""Schedulers that DeepSpeed could not make are refused by name."""

from typing import Any

import pytest

from mocte_ds.deepspeed_settings import checked_settings, require_scheduler
from mocte_ds.errors import ConfigError


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
