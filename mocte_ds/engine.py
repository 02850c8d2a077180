"""initialize(): deepspeed.initialize for MO-CTE; MocteEngine: where DeepSpeed's step meets the controller."""

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from mocte_ds.checkpoints.load import STATE_FILE, read_state
from mocte_ds.checkpoints.manifest import require_whole_on_ranks
from mocte_ds.checkpoints.place import resolve_tag
from mocte_ds.checkpoints.random_states import restore_random_states
from mocte_ds.config import MocteConfig
from mocte_ds.controller import Controller
from mocte_ds.dist.end import end_process_groups_at_exit
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe.attach import attach
from mocte_ds.zero import UnitRegistry, find_front, require_conformance, require_stage3_settings
from mocte_ds.zero.checkpoint_files import own_files
from mocte_ds.zero.engine import UnitEngine
from mocte_ds.zero.partitioned_files import require_same_partition
from mocte_ds.zero.process_groups import expert_parallel_rank

DEFAULT_TOTAL_STEPS = 10_000


class MocteEngine(UnitEngine):
    """A DeepSpeed engine with blocks; the training loop stays forward, backward, step."""

    mocte: Controller

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """DeepSpeed's forward; tells the blocks where in the run this micro-batch stands."""
        if self.module.training:  # engine.eval() sets the module only
            micro = self.train_micro_batch_size_per_gpu()
            accumulation = self.micro_steps % self.gradient_accumulation_steps()
            place = (accumulation * self.dp_world_size + dist.get_rank(group=self.data_parallel_group)) * micro
            self.mocte.before_micro_batch(self.global_samples, place, self.micro_steps, inputs, kwargs)
            self._count_tokens(inputs, kwargs)
        return super().forward(*inputs, **kwargs)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's backward; learned routers add their loss for even loads."""
        self.mocte.mid_step = True
        auxiliary = self.mocte.auxiliary_loss()
        return super().backward(loss if auxiliary is None else loss + auxiliary.to(loss.dtype), *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's step; at the boundary of an optimizer step the controller does what is due."""
        boundary = self.is_gradient_accumulation_boundary()
        super().step(*args, **kwargs)
        if boundary:
            self.mocte.after_step(self.global_steps, self.tokens_seen)
            self.checkpoint_engine.saver.look()

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """DeepSpeed's checkpoint plus the state of the blocks, whole or not at all (docs/checkpoints.md).

        Arguments are DeepSpeed's. With `checkpoint.async_save` it returns when everything is copied; the next save,
        the steps in between and :meth:`wait_for_checkpoint` raise what went wrong later.

        Raises:
            CheckpointError: no room, a value that is not plain, or a file that could not be written on some rank; the
                checkpoints that are there stay as they are.
        """
        if exclude_frozen_parameters and self.zero_optimization_partition_weights():
            raise CheckpointError(
                "exclude_frozen_parameters is not supported under ZeRO stage 3: frozen experts would be lost."
            )
        tag = str(tag) if tag is not None else f"global_step{self.global_steps}"
        client = dict(client_state or {})
        save = super().save_checkpoint

        def deepspeed_save(state: dict[str, Any]) -> None:
            state = {**state, "tokens_seen": self.tokens_seen}
            save(save_dir, tag, state, save_latest=False, exclude_frozen_parameters=exclude_frozen_parameters)

        def own() -> dict[str, Any]:
            files = own_files(self.mocte.rank_state_dict())
            state = {"mocte": self.mocte.state_dict(), "client_state": client}
            return {**files, STATE_FILE: state} if dist.get_rank() == 0 else files

        background = self.mocte.config.checkpoint.async_save
        self.checkpoint_engine.save_checkpoint(
            deepspeed_save, save_dir, tag, self.global_steps, client, own, save_latest, background
        )
        return True

    def wait_for_checkpoint(self) -> None:
        """Wait until the last asynchronous save is whole (collective); a script that ends waits by itself.

        Raises:
            CheckpointError: it failed on some rank.
        """
        self.checkpoint_engine.saver.wait()

    def load_checkpoint(self, load_dir: str, tag: str | None = None, **kwargs: Any) -> tuple[str | None, Any]:
        """DeepSpeed's load, after the blocks and the partition were brought into the checkpoint's state.

        Arguments and results are DeepSpeed's. A checkpoint of another number of ranks or another ep_size is brought to
        this run's on the way.

        Raises:
            CheckpointError: missing, changed or damaged files, before anything is loaded, or a checkpoint of another
                configuration; names the files or what differs.
        """
        self.wait_for_checkpoint()
        tag = tag or resolve_tag(load_dir)
        if tag is None:
            return None, None
        folder, files = Path(load_dir) / tag, self.checkpoint_engine
        manifest = require_whole_on_ranks(folder, self.mocte.config.checkpoint.verify)
        require_same_partition(folder, self.zero_optimization_stage(), self.dp_world_size)
        if self.zero_optimization_partition_weights() and (
            kwargs.get("load_module_only") or kwargs.get("custom_load_fn")
        ):
            raise CheckpointError(
                "load_module_only and custom_load_fn are not supported under ZeRO stage 3; load all of the checkpoint."
            )
        with files.reading(folder, manifest, self.mocte.config.ep_size) as read:
            names = [handle.name for handle in self.mocte.blocks]
            state = read_state(load_dir, tag, self.mocte.config, names, read)
            self.mocte.load_state_dict(state["mocte"])
            path, client_state = super().load_checkpoint(load_dir, tag, **kwargs)
            if path is None:
                raise CheckpointError(f"the checkpoint {folder} has no model states of DeepSpeed: incomplete.")
            self.tokens_seen = int(client_state.pop("tokens_seen"))
            self.mocte.proof.begin(self.mocte)
            self.mocte.load_rank_state_dict(restore_random_states(load_dir, tag, read))
        return path, client_state

    def _count_tokens(self, inputs: tuple, kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", inputs[0] if inputs else None)
        count = ids.shape[0] * (ids.shape[1] if ids.dim() > 1 else 1) if isinstance(ids, torch.Tensor) else 0
        self.tokens_seen += count * self.dp_world_size


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Path | Mapping[str, Any] | None = None,
    **other: Any,
) -> tuple[MocteEngine, Any, Any, Any]:
    """deepspeed.initialize for a config with a "mocte" block.

    Args:
        args: may carry `deepspeed_config`, as in DeepSpeed.
        model: any model whose FFNs the block's `modules` pattern names; they are replaced in place.
        optimizer: None (the config's optimizer) or a callable that makes one from parameter groups.
        model_parameters: parameters or parameter groups; None: all, without weight decay on vectors.
        training_data: as in DeepSpeed.
        lr_scheduler: as in DeepSpeed.
        distributed_port: as in DeepSpeed.
        mpu: as in DeepSpeed; a tensor-parallel size above 1 is refused.
        dist_init_required: as in DeepSpeed.
        collate_fn: as in DeepSpeed.
        config: DeepSpeed config, a dict or the path of a JSON file, with one more block "mocte".
        **other: `config_params` as in DeepSpeed; anything else is refused.

    Returns:
        engine (with `engine.mocte`), optimizer, training data loader, learning-rate scheduler.

    Raises:
        ConfigError: before any work starts, with the key, the value and what is allowed.
    """
    require_conformance()
    # DeepSpeed 0.19 calls what torch 2.13 is about to rename, at every step.
    warnings.filterwarnings("ignore", message="`torch.distributed.*deprecated", category=FutureWarning)
    if config is None:
        config = other.pop("config_params", None) or getattr(args, "deepspeed_config", None)
    given = sorted(name for name, value in other.items() if value is not None)
    if given:
        raise ConfigError(f"mocte_ds.initialize does not support: {', '.join(given)}.")
    settings = _read_config(config)
    block = MocteConfig.from_dict(settings.pop("mocte"))
    _check_deepspeed_part(settings, model, optimizer, mpu)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            distributed_port=distributed_port,
            dist_init_required=dist_init_required,
        )
        end_process_groups_at_exit()
    block.check(dist.get_world_size())
    resolved = DeepSpeedConfig(settings, mpu)
    total_steps = block.total_steps or (settings.get("scheduler") or {}).get("params", {}).get("total_num_steps")
    blocks = attach(model, block)
    ep_rank = expert_parallel_rank(block.ep_size, resolved.use_data_before_expert_parallel_)
    front = find_front(model, blocks, block.freeze.prefix.layers)
    registry = UnitRegistry(model, blocks, ep_rank, model_parameters, front)
    controller = Controller(block, blocks, registry, ep_rank, int(total_steps or DEFAULT_TOTAL_STEPS))
    engine = MocteEngine(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=registry.groups(controller.trainable_units()),
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=settings,
        config_class=resolved,
        # Stage 3 is for models that do not fit on a device: it moves one parameter at a time.
        dont_change_device=resolved.zero_config.stage == 3,
    )
    engine.mocte, engine.tokens_seen = controller, 0
    controller.bind(engine.module, engine.optimizer, engine.lr_scheduler, dist.get_rank(), engine.train_batch_size())
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _read_config(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """A private copy of the config, from a dict or a JSON file."""
    if config is None:
        raise ConfigError("mocte_ds.initialize needs config=: a DeepSpeed config (dict or path) with a 'mocte' block.")
    values: Any = config
    if isinstance(config, str | Path):
        try:
            values = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the DeepSpeed config {config}: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"the DeepSpeed config must be a dict or the path of a JSON file, not {type(values).__name__}."
        )
    if "mocte" not in values:
        raise ConfigError(
            'the DeepSpeed config has no "mocte" block, e.g. "mocte": {"modules": "model.layers.*.mlp"}; '
            "a run without blocks is deepspeed.initialize."
        )
    return copy.deepcopy(dict(values))


def _check_deepspeed_part(settings: dict[str, Any], model: nn.Module | None, optimizer: Any, mpu: Any) -> None:
    if model is None:
        raise ConfigError("mocte_ds.initialize needs model=.")
    if isinstance(model, deepspeed.PipelineModule):
        raise ConfigError("pipeline modules are not supported; hand over the plain model.")
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"zero_optimization.stage = {stage}: use stage 1, 2 or 3 (freezing acts on ZeRO's partition)."
        )
    if stage == 3:
        require_stage3_settings(settings, model)
    zero = settings["zero_optimization"]
    for name in ("contiguous_gradients", "reduce_scatter"):
        if not zero.get(name, True):
            # DeepSpeed would find out when the first experts emerge.
            raise ConfigError(f"zero_optimization.{name} = false: DeepSpeed's expert layers need true; remove it.")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "an optimizer object cannot follow experts that do not exist yet; name the optimizer in the config, or "
            "hand over a callable: optimizer=lambda groups: torch.optim.AdamW(groups, lr=...)."
        )
    kind = str((settings.get("optimizer") or {}).get("type", "")).lower()
    if optimizer is None and kind in ("muon", "adagrad"):
        raise ConfigError(
            f"optimizer.type '{settings['optimizer']['type']}' builds its own parameter groups or state, which cannot "
            "follow experts that emerge and freeze; use AdamW or Adam."
        )
    if optimizer is None and "optimizer" not in settings:
        raise ConfigError('the DeepSpeed config has no "optimizer" and no optimizer callable was handed over.')
    _check_accumulation((settings.get("data_types") or {}).get("grad_accum_dtype"), settings, stage)
    if mpu is not None and mpu.get_tensor_model_parallel_world_size() > 1:
        raise ConfigError("tensor parallelism above 1 is not supported yet; use expert and data parallelism.")


def _check_accumulation(dtype: Any, settings: dict[str, Any], stage: int) -> None:
    """Gradients are added up in the model's precision, or in fp32 where DeepSpeed's optimizer of the stage does so."""
    if dtype in (None, "null"):
        return
    if dtype != "fp32":
        raise ConfigError(
            f"data_types.grad_accum_dtype = {dtype!r}: only 'fp32' is supported; without it gradients are added up in "
            "the model's precision."
        )
    if stage == 1 and (settings.get("bf16") or {}).get("enabled"):
        raise ConfigError(
            "data_types.grad_accum_dtype = 'fp32' with bf16 is not supported at ZeRO stage 1, where DeepSpeed uses an "
            "optimizer of another kind (BF16_Optimizer), which cannot freeze units; use zero_optimization.stage 2 or 3."
        )
