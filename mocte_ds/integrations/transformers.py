"""transformers' Trainer with blocks: `MocteTrainer(model=..., args=TrainingArguments(deepspeed=...), ...)`."""

import copy
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from transformers import Trainer

from mocte_ds.errors import ConfigError
from mocte_ds.integrations.saved_model import export_into, write_companions
from mocte_ds.integrations.stock_calls import config_of, has_block, replaced_by, with_blocks
from mocte_ds.logs.monitors import mode_counts

_EVAL_LOSS = re.compile(r"eval_(?:(.+)_)?loss")
"""Names of losses in what Trainer logs of an evaluation: of its only data set, or of one of several."""


class TrainsBlocks:
    """What a subclass of Trainer needs for blocks; stands before it among the bases (docs/integrations.md).

    A callback with a method ``on_mocte_event(args, state, control, event)`` is called with every event, on rank 0, and
    every line of Trainer's log has the state of the blocks. metrics.jsonl and events.jsonl come into `output_dir`, or
    into the folder that the block names (`log`). :attr:`engine` is what mocte_ds.initialize has returned.
    """

    engine: Any = None
    """Of mocte_ds.initialize; None before `train`."""

    # Of Trainer, which follows this class among the bases.
    args: Any
    accelerator: Any
    callback_handler: Any
    control: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any
    state: Any

    # ---- the engine ------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; then everything that it prepares goes through :meth:`_make_engine`.

        Raises:
            ConfigError: there is no "mocte" block, or arguments that do not go with one.
        """
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or not has_block(plugin.deepspeed_config):
            raise ConfigError(
                f'{type(self).__name__} finds no DeepSpeed config with a "mocte" block: give one as deepspeed= of '
                "TrainingArguments or in accelerate's config file (accelerate launch --cpu turns DeepSpeed off; use "
                "--use_deepspeed). A run without blocks is transformers.Trainer."
            )
        _require_uncut(plugin.deepspeed_config, type(self).__name__)
        _require_arguments(self.args)
        _require_world(self.args.world_size)
        prepare = self.accelerator.prepare

        def prepare_with_blocks(*objects: Any, **how: Any) -> Any:
            with replaced_by(self._make_engine):
                return prepare(*objects, **how)

        self.accelerator.prepare = prepare_with_blocks

    def train(self, *args: Any, **how: Any) -> Any:
        """Trainer's.

        Raises:
            ConfigError: a second call.
        """
        if self.engine is not None:
            raise ConfigError(
                "train() was called twice: experts and their optimizer state belong to the first call. Make a new "
                "model and Trainer, and go on by train(resume_from_checkpoint=...)."
            )
        try:
            return super().train(*args, **how)  # type: ignore[misc]
        finally:
            if self.engine is not None:
                self.engine.step_log.close()  # another Trainer may log into the same folder

    def _make_engine(self, **given: Any) -> tuple[Any, Any, Any, Any]:
        """mocte_ds.initialize, for `total_steps` of this training and the optimizer that Trainer has made."""
        config = copy.deepcopy(config_of(given))
        if config["mocte"].get("total_steps") in (None, "auto"):
            config["mocte"]["total_steps"] = self.state.max_steps
        if isinstance(given.get("optimizer"), torch.optim.Optimizer):
            given["optimizer"], given["model_parameters"] = refilled(given["optimizer"])
            if "scheduler" not in config:
                given["lr_scheduler"] = self._scheduler_of
        made = with_blocks(given, config)
        self.engine = made[0]
        self.engine.mocte.on_event(self._tell)
        if self.engine.mocte.config.log is None:
            self.engine.mocte.log_to(self.args.output_dir)
        return made

    def _scheduler_of(self, optimizer: Any) -> Any:
        """The scheduler that the arguments ask for, which the engine keeps in step with groups that leave and enter."""
        other = copy.copy(self)
        other.lr_scheduler = None
        return super(TrainsBlocks, other).create_scheduler(self.state.max_steps, optimizer)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's; the engine's own once there is one."""
        if self.lr_scheduler is None and optimizer is None and self.engine is not None:
            self.lr_scheduler = DeepSpeedSchedulerWrapper(self.engine.lr_scheduler, self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **how: Any) -> Any:
        """Trainer's.

        Raises:
            ConfigError: there is no engine yet.
        """
        if self.engine is None:
            raise ConfigError(
                "evaluate() and predict() need the engine that train() makes; for a finished run load the folder that "
                "save_model has written, with AutoModelForCausalLM and transformers.Trainer."
            )
        return super().evaluation_loop(*args, **how)  # type: ignore[misc]

    # ---- what is written -------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, experts of all ranks, as a folder for AutoModelForCausalLM (collective).

        A checkpoint needs none: it has the engine's files, and gets the tokenizer and arguments alone, unless
        `save_only_model` is set.

        Raises:
            CheckpointError, ConfigError: on all ranks; see Controller.export.
        """
        if self.engine is None:
            raise ConfigError(
                "save_model needs the engine that train() makes; before it, model.save_pretrained(FOLDER)."
            )
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        of_checkpoint = _internal_call and output_dir is not None  # push_to_hub names none
        if not of_checkpoint or self.args.save_only_model:
            export_into(self.engine, folder)
        if self.args.should_save:
            write_companions(self, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # type: ignore[attr-defined]

    # ---- what is told ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **more: Any) -> None:
        """Trainer's, with the state of the blocks beside every training loss."""
        if self.engine is not None and "loss" in logs:
            mocte = self.engine.mocte
            logs |= {f"mocte/{name}": count for name, count in mode_counts(mocte.blocks).items()}
            logs["mocte/tokens"] = mocte.tokens
            if "mfu" in self.engine.step_log.last:
                logs["mocte/mfu"] = self.engine.step_log.last["mfu"]
        losses = {found[1] or "eval": loss for name, loss in logs.items() if (found := _EVAL_LOSS.fullmatch(name))}
        if self.engine is not None and losses:
            self.engine.log_validation(losses)
        super().log(logs, *args, **more)  # type: ignore[misc]

    def _tell(self, event: dict[str, Any]) -> None:
        for callback in self.callback_handler.callbacks:
            if hear := getattr(callback, "on_mocte_event", None):
                hear(self.args, self.state, self.control, event=event)


@functools.cache
def prepare_trainer_class(base: type[Trainer]) -> type[Trainer]:
    """A subclass of any subclass of Trainer, for blocks; the same one at every call.

    Args:
        base: for example `Seq2SeqTrainer`, or your own.
    """
    return type(f"Mocte{base.__name__}", (TrainsBlocks, base), {"__module__": __name__, "__doc__": base.__doc__})


class MocteTrainer(TrainsBlocks, Trainer):
    """transformers' Trainer for a DeepSpeed config with a "mocte" block; used like Trainer."""


def _require_uncut(config: Mapping[str, Any], name: str) -> None:
    """Refuse tensor parallelism, where Trainer and accelerate follow rules of their own."""
    size = (config.get("tensor_parallel") or {}).get("autotp_size") or 1
    if size != 1:
        raise ConfigError(
            f"tensor_parallel.autotp_size = {size} is not supported by {name}: Trainer and accelerate have their own "
            "rules for which rank reads what, how many steps there are and who saves. Remove the section, or call "
            "mocte_ds.initialize in a loop of your own (docs/tensor_parallel.md)."
        )


def _require_arguments(args: Any) -> None:
    """Refuse what does not go with blocks, before anything is made."""
    unsupported = {
        "auto_find_batch_size": (args.auto_find_batch_size, "it would begin again with another engine; set the batch"),
        "torch_compile": (args.torch_compile, "a compiled graph cannot follow experts that emerge; remove it"),
        "hub_strategy": (
            args.push_to_hub and str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end",
            "checkpoints hold no exported weights that could be uploaded; use 'end'",
        ),
    }
    for name, (found, advice) in unsupported.items():
        if found:
            raise ConfigError(f"TrainingArguments.{name} does not go with blocks: {advice}.")


def _require_world(seen: int) -> None:
    """Refuse a Trainer that does not see the other processes: every rank would train on all of the data."""
    started = int(os.environ.get("WORLD_SIZE", seen))
    if started != seen:
        raise ConfigError(
            f"Trainer sees {seen} process, and the launcher has started {started}. On CPUs set use_cpu=True in "
            "TrainingArguments."
        )


def refilled(optimizer: torch.optim.Optimizer) -> tuple[Callable[[Any], torch.optim.Optimizer], list[dict[str, Any]]]:
    """What mocte_ds.initialize takes in place of an optimizer that somebody else has made and that has not stepped.

    Args:
        optimizer: over the model's parameters before its blocks are attached; emptied.

    Returns:
        A callable that gives the same object with other groups, and its groups with all their options.

    Raises:
        ConfigError: it has a state already, or a scheduler that would go on with groups that are gone.
    """
    if optimizer.state:
        raise ConfigError("the optimizer has stepped already; make a new one, and go on from a checkpoint.")
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            "the optimizer has a scheduler, which cannot follow experts that emerge and freeze; name the scheduler in "
            "the DeepSpeed config, or hand over a callable that makes one of an optimizer."
        )
    given = [dict(group) for group in optimizer.param_groups]

    def make(groups: Any) -> torch.optim.Optimizer:
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer

    return make, given
