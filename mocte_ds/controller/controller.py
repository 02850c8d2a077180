"""`engine.mocte`: what users call, and what the engine calls around every forward pass and after every step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.config import MocteConfig
from mocte_ds.controller.apply import apply_changes, set_rates
from mocte_ds.controller.changer import Changer
from mocte_ds.controller.checks import Checks
from mocte_ds.controller.decide import Change, unlocked_blocks
from mocte_ds.controller.emerge import born_at_once, emerge_now
from mocte_ds.controller.events import EventListener, Events
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.passes import Passes
from mocte_ds.controller.progress import Progress
from mocte_ds.controller.proof import Proof
from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.collectives import max_over_ranks
from mocte_ds.dist.mesh import Mesh
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.moe.context import BatchContext
from mocte_ds.watch import phase
from mocte_ds.zero import TRUNK, UnitOptimizer, UnitRegistry, follow_mode


class Controller:
    """Owns the modes of all blocks and experts: decides at checks, acts between optimizer steps."""

    def __init__(
        self, config: MocteConfig, blocks: list[Block], registry: UnitRegistry, mesh: Mesh, total_steps: int
    ) -> None:
        """Prepare the blocks; :meth:`bind` hands over the engine's parts.

        Args:
            config: the "mocte" block.
            blocks: the model's blocks.
            registry: their units.
            mesh: the run's ranks.
            total_steps: optimizer steps of the run.
        """
        self.run = RunState(config, blocks, registry, mesh, total_steps)
        self.passes, self.events = Passes(self.run), Events(self.run)
        self.proof, self.progress = Proof(), Progress(config, mesh)
        self.changer = Changer(self.run, self.proof, self.progress, self.events)
        self.checks = Checks(self.run, self.passes, self.progress, self.proof, self.events, self.changer)
        self.mid_step = False
        """Whether gradients wait for an optimizer step."""
        # What `export` and `log_to` call; the engine hands them over.
        self.exporter: Callable[..., dict[str, Any]] | None = None
        self.logger: Callable[[str | Path], None] | None = None
        self.domain: Tensor | None = None  # of the next forward pass

    def bind(self, module: torch.nn.Module, optimizer: UnitOptimizer, scheduler: Any, sequences_per_step: int) -> None:
        """Hand over the engine's module, optimizer and scheduler, and the global batch size."""
        run = self.run
        run.module, run.optimizer, run.scheduler = module, optimizer, scheduler
        run.sequences_per_step = sequences_per_step
        for handle in run.blocks:
            follow_mode(handle.block)  # what stage 3 has cut up
        self.progress.bind(module)
        self.checks.set_window(sequences_per_step)
        # Whoever calls backward, of the engine or of the loss: gradients wait from then on.
        for parameter in run.registry.units[TRUNK].parameters:
            parameter.register_post_accumulate_grad_hook(self._gradients_wait)

    # ---- for users -------------------------------------------------------------------------------------------------

    @property
    def config(self) -> MocteConfig:
        """The "mocte" block."""
        return self.run.config

    @property
    def blocks(self) -> list[BlockHandle]:
        """The blocks, in the order of the model."""
        return self.run.blocks

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.run.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; shares of the budget refer to it."""
        return self.run.total_steps

    @property
    def tokens(self) -> int:
        """Tokens of the steps that are done, all ranks together; no padding."""
        return self.run.tokens

    @property
    def frozen_layers(self) -> int:
        """Frozen layers of the front; the embeddings freeze with the first."""
        return self.run.frozen_layers

    @property
    def context(self) -> BatchContext:
        """What the blocks share about forward passes."""
        return self.run.context

    def annotate(self, domain: Tensor | None, names: list[str]) -> None:
        """Say where the next forward pass's batch comes from, so that checks can compare clusters with sources.

        Args:
            domain: (B,) index into ``names``, or None.
            names: names of the sources.
        """
        self.domain, self.run.domain_names = domain, list(names)

    def set_probe(self, input_ids: Tensor, domain: Tensor | None = None, **given: Any) -> None:
        """Set the sequences that every check looks at; by default they are some of the first step's.

        Held-out sequences are better: a lower loss on them is not memorisation.

        Args:
            input_ids: (S, T) the same on all ranks; the first ones are used, as many as `probe_tokens` asks for.
            domain: (S,) index of each into the names given to :meth:`annotate`, or None.
            **given: what else the model is called with, such as `position_ids`; tensors (S, ...) have a row for each
                sequence.

        Raises:
            MocteError: another shape, or after the first step.
        """
        if input_ids.dim() != 2 or not len(input_ids) or (domain is not None and domain.shape != input_ids.shape[:1]):
            raise MocteError(f"the probe set must be (S, T) token ids and (S,) sources, not {tuple(input_ids.shape)}.")
        if self.step:
            raise MocteError(
                "the probe set must be given before the first step; later checks compare with earlier ones."
            )
        if self.progress.active:
            self.progress.probe.give(input_ids, domain, given)

    def on_event(self, listener: EventListener) -> None:
        """Call ``listener`` with every event (check, projection, emergence, freeze, thaw), on rank 0 only."""
        self.events.listen(listener)

    def log_to(self, folder: str | Path) -> None:
        """Write metrics.jsonl (a line per step) and events.jsonl into a folder from now on (collective).

        `mocte-ds report FOLDER` and `mocte-ds inspect-run FOLDER` read them, and run.json beside them. Rank 0 writes,
        and holds the folder's lock. After `load_checkpoint`, which may come before or after this call, the logs go on
        after the checkpoint's step; at step 0 those of an earlier run are kept under another name.

        Args:
            folder: on the machine of rank zero; is made if it is not there, and may hold other files.

        Raises:
            MocteError: on all ranks; a second call, a call after the first step, a folder that cannot be written, that
                another process logs into, or in which files of others have the names of the logs.
        """
        if self.logger is None:
            raise MocteError("engine.mocte.log_to needs an engine of mocte_ds.initialize.")
        self.logger(folder)

    def emerge(self, block: int) -> None:
        """Turn a block's experts on now (collective, between two steps)."""
        self._require_between_steps("emerge")
        handle = self.run.block(block)
        if handle.mode is not BlockMode.WARMUP:
            raise MocteError(f"block {block} ({handle.name}) is {handle.mode}: its experts have emerged already.")
        emerge_now(self.run, self.changer, [handle], "called", by_hand=True)

    def freeze(self, block: int, expert: int) -> None:
        """Freeze an expert now (collective, between two steps); it stays frozen until :meth:`thaw` is called for it."""
        self._demand(block, expert, ExpertMode.TRAINING, "freeze")
        self.changer.apply([Change("freeze", block, expert, "called", by_hand=True)], {})

    def thaw(self, block: int, expert: int) -> None:
        """Let a frozen expert train again, with fresh moments (collective, between two steps).

        What was measured before has no part in a decision to freeze it again.
        """
        self._demand(block, expert, ExpertMode.FROZEN, "thaw")
        if self.run.in_frozen_front(self.blocks[block]):
            raise MocteError(f"cannot thaw expert {expert} of block {block}: it lies in a layer of the frozen front.")
        self.changer.apply([Change("thaw", block, expert, "called", by_hand=True)], {})

    def freeze_prefix(self, layers: int) -> None:
        """Freeze the embeddings and the first ``layers`` layers now (collective, between two steps).

        No graph is built for them from then on, so that their gradients by inputs are saved too. With tied embeddings
        the output matrix is frozen with them.

        Args:
            layers: at most `freeze.prefix.layers`, and more than are frozen already.

        Raises:
            MocteError: another number, or a block in one of these layers has experts to train.
        """
        self._require_between_steps("freeze_prefix")
        most = self.config.freeze.prefix.layers
        if not self.frozen_layers < layers <= most:
            raise MocteError(
                f"freeze_prefix({layers}): {self.frozen_layers} layers of the front are frozen, and "
                f"mocte.freeze.prefix.layers allows {most}."
            )
        blocks = self.run.status(self.run.share, self.step).blocks
        open_blocks = [name for layer in range(layers) for name in unlocked_blocks(blocks, layer)]
        if open_blocks:
            raise MocteError(f"freeze_prefix({layers}): {open_blocks[0]} still trains; freeze all its experts first.")
        self.changer.apply([Change("prefix", None, None, "called", by_hand=True, layers=layers)], {})

    def export(
        self,
        folder: str | Path,
        dtype: str | None = None,
        tokenizer: str | Path | None = None,
        choice: str = "auto",
    ) -> dict[str, Any]:
        """Write the model as it is now as a Hugging Face folder, compared with what trains (collective).

        Any causal language model of transformers: while it is dense, what its own `save_pretrained` writes; after an
        emergence a class of ours around it, whose code lies beside the weights (docs/huggingface.md).

        Args:
            folder: written by rank zero; appears as a whole at the end or not at all. An earlier export is replaced.
            dtype: of the weights, `fp32`, `bf16` or `fp16`; None: as they train.
            tokenizer: sentencepiece model, or a folder with a tokenizer.json, that goes along; None: none does.
            choice: `auto`; `stock`, the model's own class or none; `own`, ours also while it is dense.

        Returns:
            What was written and compared: architecture, parameters, logit_difference, tensors_compared, ...

        Raises:
            CheckpointError: on all ranks; not a model of transformers, one that its config does not make again, or the
                folder cannot be written. The run can go on.
            ConfigError: on all ranks; an unknown dtype or choice, or a folder that holds something else.
        """
        if self.exporter is None:
            raise MocteError("engine.mocte.export needs an engine of mocte_ds.initialize.")
        return self.exporter(folder=folder, dtype=dtype, tokenizer=tokenizer, choice=choice)

    def optimizer_bytes(self) -> int:
        """Bytes of fp32 master weights and optimizer state on this rank."""
        return self.run.optimizer.optimizer_bytes()

    def auxiliary_loss(self) -> Tensor | None:
        """The balance loss that the next backward pass adds, without a graph; None if there is none.

        The sum over forward passes whose graphs wait for a backward pass; one whose graph is never run adds nothing.
        """
        losses = [loss for handle in self.blocks if (loss := handle.block.auxiliary_loss()) is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def expert_load(self) -> list[list[int]]:
        """Tokens routed to each expert of each block since the last call, all ranks together (collective)."""
        return self.passes.routed_since_last_call()

    # ---- called by the engine --------------------------------------------------------------------------------------

    def before_micro_batch(self, micro: int, args: tuple, kwargs: dict) -> None:
        """Tell the blocks where in the run the next pass that trains stands.

        Args:
            micro: sequences of a micro-batch.
            args: of the model's call.
            kwargs: of the model's call.
        """
        if not self.mid_step and (waiting := born_at_once(self.run)):
            emerge_now(self.run, self.changer, waiting, "from scratch: before the first step")
        ids = kwargs.get("input_ids", args[0] if args else None)
        texts = len(ids) if isinstance(ids, Tensor) and ids.dim() > 1 else micro
        run, place = self.run, self.passes.begin(micro, texts)
        domain, self.domain = self.domain, None
        if self.progress.active and not self.progress.probe.complete:
            self.progress.probe.offer(args, kwargs, place, run.sequences_per_step, domain, micro)
        for_check = self.checks.begin_pass()
        warming_up = any(handle.mode is BlockMode.WARMUP for handle in run.blocks)
        run.context.announce(
            first_sequence=self.passes.sequences + place,
            micro_batch=micro,
            domain=domain,
            sources=len(run.domain_names),
            observer=run.samples if for_check or (warming_up and not run.config.auto) else None,
        )

    def after_step(self, step: int) -> None:
        """Do what is due after optimizer step ``step`` (collective)."""
        self.run.step, self.mid_step = step, False
        self.passes.close_step()
        self.proof.after_step(self.run)
        self.progress.close_step(self.run)
        with phase("check", long=True):
            self.checks.after_step()
        set_rates(self.run)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, in plain values and tensors (collective)."""
        self.proof.require_frozen_unmoved(self.run)
        check = self.checks.state_dict()  # first: the end of a search changes what the blocks remember
        return {**self.run.state_dict(), **self.passes.state_dict(), "check": check}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state: modes, then the partition that follows from them (before weights are loaded)."""
        self.run.load_state_dict(state)
        self.passes.load_state_dict(state)
        self.checks.load_state_dict(state.get("check"))
        apply_changes(self.run, [], {})
        set_rates(self.run)

    def rank_state_dict(self) -> dict[str, Any]:
        """What only this rank has: its part of the probe set, its experts of the last check, and its samples."""
        return {**self.progress.state_dict(), "world": self.run.mesh.world.size, **self.checks.rank_state_dict()}

    def load_rank_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what :meth:`rank_state_dict` returned, after :meth:`load_state_dict` (collective).

        With another number of ranks, or where a rank has none, the probe set is collected again, and a check that has
        measured but not decided is left out.
        """
        device = next(self.run.module.parameters()).device
        usable = state is not None and state.get("world") == self.run.mesh.world.size
        if int(max_over_ranks(torch.tensor(0 if usable else 1), self.run.mesh.world)):
            state = None
        if state is not None:
            self.progress.load_state_dict(state, device)
        self.checks.load_rank_state_dict(state, device)

    def _gradients_wait(self, _parameter: torch.nn.Parameter) -> None:
        self.mid_step = True
        self.passes.after_backward()

    # ---- refusals --------------------------------------------------------------------------------------------------

    def _require_between_steps(self, verb: str) -> None:
        """A change of the partition in the middle of a step would lose the gradients that it holds."""
        if self.mid_step:
            raise MocteError(
                f"{verb} was called between a backward pass and the optimizer's step; call it after engine.step() of "
                "the last micro-batch of a step."
            )

    def _demand(self, block: int, expert: int, mode: ExpertMode, verb: str) -> None:
        self._require_between_steps(verb)
        experts = self.run.block(block).experts
        if not 0 <= expert < len(experts):
            raise MocteError(f"block {block} has no expert {expert}: it has experts 0 to {len(experts) - 1}.")
        if experts[expert].mode is not mode:
            raise MocteError(
                f"cannot {verb} expert {expert} of block {block}: it is {experts[expert].mode}, not {mode}."
            )
