"""initialize(): deepspeed.initialize for MO-CTE; MocteEngine: where DeepSpeed's step meets the controller."""

import contextlib
import functools
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from mocte_ds.base_model import base_facts, refuse_saving_alone
from mocte_ds.checkpoints.load import STATE_FILE, read_state
from mocte_ds.checkpoints.manifest import require_whole_on_ranks
from mocte_ds.checkpoints.names import CONVERTERS_FILE
from mocte_ds.checkpoints.place import require_tag, resolve_tag
from mocte_ds.checkpoints.random_states import restore_random_states
from mocte_ds.checkpoints.values import only_plausible
from mocte_ds.config import MocteConfig
from mocte_ds.controller import Controller
from mocte_ds.controller.take_back import begin_pass, take_back_step, tell_skip
from mocte_ds.convert.hf.running import export_run
from mocte_ds.deepspeed_settings import (
    parsed_by_deepspeed,
    require_scheduler,
    scheduled_steps,
    tensor_ranks,
    type_of_weights,
)
from mocte_ds.dist.begin import begin_group
from mocte_ds.dist.cpu_op import build_cpu_op, use_kernel_lock
from mocte_ds.dist.end import end_process_groups_at_exit
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.dist.same_batch import require_same_batch
from mocte_ds.dist.shared_memory import forget_shared_memory
from mocte_ds.engine_settings import read_config, require_supported
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.flops.mfu import utilisation_of
from mocte_ds.logs.run_facts import count_parameters, run_facts
from mocte_ds.logs.step_log import StepLog
from mocte_ds.moe.attach import attach
from mocte_ds.moe.balance import watched
from mocte_ds.moe.idle import free, leave_untouched
from mocte_ds.rotary_tables import kept_in_fp32
from mocte_ds.skips import Skips, require_skippable
from mocte_ds.vocabulary import Vocabulary
from mocte_ds.zero import UnitRegistry, find_front, require_conformance
from mocte_ds.zero.checkpoint_files import own_files
from mocte_ds.zero.cut import cut_model
from mocte_ds.zero.engine import UnitEngine
from mocte_ds.zero.gathered_weights import converters_notice
from mocte_ds.zero.partitioned_files import require_same_partition
from mocte_ds.zero.process_groups import make_mesh, make_tensor_groups

DEFAULT_TOTAL_STEPS = 10_000


class MocteEngine(UnitEngine):
    """A DeepSpeed engine with blocks; the training loop stays forward, backward, step."""

    mocte: Controller
    vocabulary: Vocabulary
    step_log: StepLog
    skips: Skips

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """DeepSpeed's forward; tells the blocks where in the run a pass that trains stands."""
        trains = self.module.training and torch.is_grad_enabled()  # engine.eval() sets the module only
        require_same_batch(inputs, kwargs, self.mesh, trains)
        self.vocabulary.look(inputs, kwargs, self.global_steps, trains)
        self.mocte.context.forget_interrupted()
        if trains:
            self.step_log.before_forward()
            begin_pass(self.mocte, self.skips)
            self.mocte.before_micro_batch(self.train_micro_batch_size_per_gpu(), inputs, kwargs)
        try:
            with self.skips.drawing() if trains else contextlib.nullcontext():
                return super().forward(*inputs, **kwargs)
        finally:
            self.mocte.context.unannounce()

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        """DeepSpeed's backward; every forward pass that it goes through adds its routers' loss for even loads.

        Without ``scale_wrt_gas`` the loss has been divided by what all micro-batches hold; theirs has not.
        """
        self.mocte.mid_step = True
        context = self.mocte.context
        self.skips.see(loss)
        self.step_log.see_loss(loss, 1.0 / self.gradient_accumulation_steps() if scale_wrt_gas else 1.0)
        loss = watched(loss, context, 1.0 if scale_wrt_gas else 1.0 / self.gradient_accumulation_steps())
        try:
            with self.skips.drawing():
                return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        finally:
            context.loss_scale = None
            self.mocte.passes.after_backward()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """DeepSpeed's scale, for a loss whose own ``backward()`` is called."""
        self.mocte.passes.after_backward()
        self.skips.see(loss)
        self.step_log.see_loss(loss, 1.0)  # DeepSpeed leaves the division by micro-batches to the script here
        return super().scale(watched(loss, self.mocte.context))

    def step(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's step; after an optimizer step the controller does what is due.

        With `skip_nonfinite` a step whose loss or gradient is not finite is skipped: `global_steps` stays.

        Raises:
            NonFiniteLoss: on all ranks; too many such steps in a row.
        """
        before = self.global_steps
        self.step_log.before_step()
        self.optimizer.spoiled = self.skips.spoiled
        super().step(*args, **kwargs)
        if self.global_steps == before:
            return
        if self.skips.limit and self.optimizer.overflow:
            take_back_step(self.mocte)
            self.step_log.take_back()
        if not self.skips.look(self):
            self.mocte.after_step(self.global_steps)
            self.step_log.after_step()
            self.checkpoint_engine.saver.look()

    @property
    def tokens_seen(self) -> int:
        """Tokens that the run has trained on up to the last optimizer step, all ranks together; no padding."""
        return self.mocte.tokens

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | int | None = None,
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
        if exclude_frozen_parameters:
            raise CheckpointError("exclude_frozen_parameters is not supported: frozen experts would be lost.")
        tag = str(tag) if tag is not None else f"global_step{self.global_steps}"
        require_tag(tag)
        client, started = dict(client_state or {}), time.perf_counter()
        save = super().save_checkpoint

        def deepspeed_save(state: dict[str, Any]) -> None:
            state = {**state, "tokens_seen": self.tokens_seen}
            save(str(save_dir), tag, state, save_latest=False, exclude_frozen_parameters=exclude_frozen_parameters)

        def own() -> dict[str, Any]:
            files = own_files(self.mesh.world, self.mocte.rank_state_dict())
            state: dict[str, Any] = {"mocte": self.mocte.state_dict(), "client_state": client}
            state |= {"base": base_facts(self.module), "skipped": self.skips.streak}
            shared = {STATE_FILE: state, CONVERTERS_FILE: converters_notice()}
            return {**files, **shared} if self.mesh.world.rank == 0 else files

        background = self.mocte.config.checkpoint.async_save
        self.checkpoint_engine.save_checkpoint(
            deepspeed_save, save_dir, tag, self.global_steps, client, own, save_latest, background
        )
        self.step_log.saved(tag, time.perf_counter() - started)
        return True

    def log_validation(self, losses: Mapping[str, float]) -> None:
        """Tell the logs and monitors what a script's own validation has found after the last step.

        Args:
            losses: on held-out text, in nats per token, by domain or data set; agreed between the ranks.
        """
        self.step_log.validated(losses)

    def destroy(self) -> None:
        """DeepSpeed's; the folder of the logs is free again."""
        if "step_log" in vars(self):  # DeepSpeed calls it for an engine that could not be made, too
            self.step_log.close()
        super().destroy()

    def wait_for_checkpoint(self) -> None:
        """Wait until the last asynchronous save is whole (collective); a script that ends waits by itself.

        Raises:
            CheckpointError: it failed on some rank.
        """
        self.checkpoint_engine.saver.wait()

    def load_checkpoint(
        self, load_dir: str | Path, tag: str | int | None = None, **kwargs: Any
    ) -> tuple[str | None, Any]:
        """DeepSpeed's load, after the blocks and the partition were brought into the checkpoint's state.

        Arguments and results are DeepSpeed's. A checkpoint of another number of ranks or another ep_size is brought to
        this run's on the way.

        Raises:
            CheckpointError: missing, changed or damaged files, before anything is loaded, or a checkpoint of another
                configuration; names the files or what differs.
        """
        self.wait_for_checkpoint()
        tag = resolve_tag(load_dir) if tag is None else str(tag)
        if tag is None:
            return None, None
        if not tag:
            raise CheckpointError(f"load_checkpoint({load_dir}, tag=''): name a checkpoint, or leave out the tag.")
        folder, files = Path(load_dir) / tag, self.checkpoint_engine
        manifest = require_whole_on_ranks(folder, self.mesh.world, self.mocte.config.checkpoint.verify)
        require_same_partition(folder, self.zero_optimization_stage(), self.mesh)
        if self.zero_optimization_partition_weights() and (
            kwargs.get("load_module_only") or kwargs.get("custom_load_fn")
        ):
            raise CheckpointError(
                "load_module_only and custom_load_fn are not supported under ZeRO stage 3; load all of the checkpoint."
            )
        # torch refuses weights of other names and shapes by RuntimeErrors.
        plausible = only_plausible(folder, RuntimeError, AssertionError)
        with plausible, files.reading(folder, manifest, self.mocte.config.ep_size) as read:
            state = read_state(load_dir, tag, self.mocte.config, [block.name for block in self.mocte.blocks], read)
            self.mocte.load_state_dict(state["mocte"])
            path, client_state = super().load_checkpoint(str(load_dir), tag, **kwargs)
            if path is None:
                raise CheckpointError(f"the checkpoint {folder} has no model states of DeepSpeed: incomplete.")
            client_state.pop("tokens_seen")  # the controller has them too
            self.mocte.proof.begin(self.mocte.run)
            self.mocte.load_rank_state_dict(restore_random_states(load_dir, tag, self.mesh.world.rank, read))
        self.skips.restore(state["skipped"])
        self.mocte.mid_step = False
        self.forget_step()
        self.step_log.loaded(str(folder), state["skipped"])
        return path, client_state


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
        mpu: as in DeepSpeed; a tensor-parallel size above 1 is refused (`tensor_parallel.autotp_size` makes groups).
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
        config = other.pop("config_params", None)
        config = getattr(args, "deepspeed_config", None) if config is None else config
    given = sorted(name for name, value in other.items() if value is not None)
    if given:
        raise ConfigError(f"mocte_ds.initialize does not support: {', '.join(given)}.")
    settings = read_config(config)
    block = MocteConfig.from_dict(settings.pop("mocte"))
    require_supported(settings, model, optimizer, mpu)
    require_skippable(settings, "mocte.skip_nonfinite", block.skip_nonfinite)
    if lr_scheduler is None:
        require_scheduler(settings)
    use_kernel_lock()
    if not dist.is_initialized():
        if get_accelerator().device_name() == "cpu":
            build_cpu_op()  # DeepSpeed compiles it at its first start, without a word
        begin_group(distributed_port=distributed_port, dist_init_required=dist_init_required)
        forget_shared_memory()
        end_process_groups_at_exit()
    block.check(mesh_of_processes().world.size)
    cut_over = tensor_ranks(settings)
    mpu = make_tensor_groups(cut_over) or mpu
    resolved = parsed_by_deepspeed(settings, mpu)
    total_steps = block.total_steps or scheduled_steps(settings)
    if total_steps is None:
        total_steps = DEFAULT_TOTAL_STEPS
        warnings.warn(f"mocte.total_steps is missing: it is taken to be {total_steps}.", stacklevel=2)
    mesh = make_mesh(block.ep_size, resolved.use_data_before_expert_parallel_, mpu, cut_over)
    parameters = count_parameters(model)
    utilisation = utilisation_of(model, block, mesh.world.size, settings)
    # Stage 3 cuts the weights of experts up before it lets them go.
    cuts = resolved.zero_config.stage == 3
    blocks = attach(model, block, functools.partial(leave_untouched, dtype=type_of_weights(settings)) if cuts else free)
    if cut_over > 1:
        cut_model(model, blocks, mesh.tensor)
    front = find_front(model, blocks, block.freeze.prefix.layers)
    registry = UnitRegistry(model, blocks, mesh.expert.rank, model_parameters, front)
    controller = Controller(block, blocks, registry, mesh, total_steps)
    with kept_in_fp32(model):
        engine = MocteEngine(
            mesh,
            args=args,
            model=model,
            optimizer=optimizer,
            model_parameters=registry.groups(controller.run.trainable_units()),
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
    forget_shared_memory()  # again: where the caller made the process group, DeepSpeed's backend came only now
    engine.mocte, engine.vocabulary = controller, Vocabulary(engine.module, controller.checks.interval, mesh.world)
    controller.bind(engine.module, engine.optimizer, engine.lr_scheduler, engine.train_batch_size())
    controller.exporter = lambda **how: export_run(engine, **how)
    engine.skips = Skips(block.skip_nonfinite, mesh.world, functools.partial(tell_skip, controller))
    engine.step_log = StepLog(engine, lambda: run_facts(engine, settings, parameters), utilisation)
    controller.logger = engine.step_log.log_to
    if block.log is not None:
        controller.log_to(block.log)
    refuse_saving_alone(engine.module)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler
