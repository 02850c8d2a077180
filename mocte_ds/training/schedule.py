"""The learning rate over a run: linear warm-up, then a cosine, by DeepSpeed's own scheduler."""

import math
from typing import Any


def warmup_cosine(total_steps: int, warmup_steps: int, min_ratio: float) -> dict[str, Any]:
    """The "scheduler" section of a DeepSpeed config.

    DeepSpeed's WarmupCosineLR gives the first step the rate 0 whatever one asks for, and starts its ramp one step
    later; with 1 / warmup_steps as the ramp's start no second step is lost.

    Args:
        total_steps: optimizer steps of the run.
        warmup_steps: steps of the ramp.
        min_ratio: share of the largest rate at the end.
    """
    ramp = max(2, warmup_steps)  # DeepSpeed's own lower bound
    return {
        "type": "WarmupCosineLR",
        "params": {
            "total_num_steps": total_steps,
            "warmup_num_steps": ramp,
            "warmup_min_ratio": 1.0 / ramp,
            "cos_min_ratio": min_ratio,
            "warmup_type": "linear",
        },
    }


def learning_rate(step: int, peak: float, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Learning rate that optimizer step ``step`` (from 1) takes under :func:`warmup_cosine`; for plans and tests."""
    if step <= 1:
        return 0.0
    ramp, done = max(2, warmup_steps), step - 2
    if done < ramp:
        return peak * (1.0 / ramp + (1.0 - 1.0 / ramp) * done / ramp)
    progress = min(1.0, (done - ramp + 1) / max(1, total_steps - ramp))
    return peak * (min_ratio + (1.0 - min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0)


def follow_new_length(engine: Any) -> tuple[float, float]:
    """Let a run that was prolonged take the rate of its new schedule at once, not one step late.

    Args:
        engine: that has loaded a checkpoint; its optimizer has the rate which the old schedule gave for the next step.

    Returns:
        The rate of the next step before and now.
    """
    groups, schedule = engine.optimizer.param_groups, engine.lr_scheduler
    before = float(groups[0]["lr"])
    if hasattr(schedule, "last_batch_iteration"):  # DeepSpeed's; one of torch goes on by itself
        schedule.step(schedule.last_batch_iteration)
    return before, float(groups[0]["lr"])
