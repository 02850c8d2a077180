"""Starts a run from an imported model or from another run (`model.init`): its weights and modes, no moments."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mocte_ds.checkpoints.names import expert_parameter
from mocte_ds.checkpoints.source import CheckpointSource
from mocte_ds.config import MocteConfig
from mocte_ds.controller import Controller
from mocte_ds.controller.apply import apply_changes
from mocte_ds.errors import ConfigError
from mocte_ds.moe.attach import matching_modules
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.router_config import RouterConfig
from mocte_ds.zero import allocate_experts

_OF_TRAINING = ("aux", "balance_rate", "centroid_rate", "rate", "redraw", "shuffled")
"""Keys of routers and experts that are about how they are born or trained."""
_STRUCTURE = ("num_experts", "expert", "router", "banks")


class InitialWeights:
    """A checkpoint whose weights a new run takes over."""

    def __init__(self, folder: str | Path) -> None:
        """Look at it; every file that is read is held against the checkpoint's manifest.

        Raises:
            CheckpointError: it is none, or damaged.
        """
        self._source = CheckpointSource(folder)
        self._blocks = {m.name: m for m in self._source.model.modules() if isinstance(m, Block)}
        self._emerged = [name for name, block in self._blocks.items() if block.mode is not BlockMode.WARMUP]

    def require_fit(self, config: MocteConfig | None, model: nn.Module, stage: int) -> None:
        """Refuse a run whose experts are others than the checkpoint's.

        Args:
            config: the run's "mocte" block; None: a dense run.
            model: the run's, without blocks.
            stage: of ZeRO; 3 cuts weights up before experts could take theirs.

        Raises:
            ConfigError: names every key that differs, or ZeRO-3.
        """
        if not self._emerged:
            return
        folder = self._source.folder
        if config is None:
            raise ConfigError(
                f"model.init = {folder} has experts, and the run has none: give it the deepspeed.mocte block that "
                "stands in import.json."
            )
        if stage == 3:
            raise ConfigError(
                f"model.init = {folder} has experts, and zero_optimization.stage is 3: use stage 1 or 2, or a start "
                "without experts."
            )
        saved, settings = self._source.state["mocte"], config.to_dict()
        before, now = (_structure(values) for values in (saved, settings))
        keys = [key for key in now if before.get(key) != now[key]]
        if keys:
            listed = "; ".join(f"mocte.{key}: start {before.get(key)!r}, run {now[key]!r}" for key in keys)
            raise ConfigError(f"model.init = {folder} has other experts than the run: {listed}. Use its values.")
        missing = sorted(set(self._emerged) - set(matching_modules(model, config.modules)))
        if missing:
            raise ConfigError(f"model.init = {folder} has experts in {missing[0]}; let mocte.modules name it too.")

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Give a model without blocks the weights outside of the experts.

        Args:
            model: of the checkpoint's sizes.
        """
        stored: dict[str, str | None] = {}
        for block in self._blocks.values():
            gone = "dense" in block.idle  # experts have taken its place
            stored |= {theirs: None if gone else ours for ours, theirs in block.names_outside.items()}
        for name, tensor in model.state_dict().items():
            if (ours := stored.get(name, name)) is not None:
                tensor.copy_(self._source.read(ours))

    @torch.no_grad()
    def begin(self, mocte: Controller) -> None:
        """Give the blocks of an engine the checkpoint's gates and experts, and let all of them train (collective).

        Args:
            mocte: `engine.mocte`, before the first step.
        """
        if not self._emerged:
            return
        run = mocte.run
        for handle in run.blocks:
            if handle.name not in self._emerged:
                continue
            allocate_experts(handle.block)
            for number, bank in enumerate(handle.block.banks):
                path = f"{handle.name}.banks.{number}.deepspeed_moe.gate."
                for name, tensor in bank.gate.state_dict().items():
                    tensor.copy_(self._source.read(path + name))
                for local, expert in enumerate(bank.local_experts):
                    k = bank.first_local(run.mesh.expert.rank) + local
                    for name, tensor in expert.state_dict().items():
                        tensor.copy_(self._source.read(expert_parameter(handle.name, number, k, name)))
            for expert in handle.experts:
                expert.mode, expert.changed_at = ExpertMode.TRAINING, run.step
            handle.born_share = run.share
            handle.refresh_mode()
        # The optimizer's groups follow from the modes; master weights are made of the weights, moments start anew.
        apply_changes(run, [], {})
        mocte.proof.begin(run)


def _structure(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a "mocte" block decides which experts and gates there are, and what they compute."""
    found = {key: settings.get(key) for key in _STRUCTURE}
    routers = found["banks"] if found["banks"] is not None else [found["router"] or {}]
    kept = [_kept({**asdict(RouterConfig()), **router}) for router in routers]
    if found["banks"] is not None:
        found["banks"] = kept
    else:
        found["router"] = kept[0]
    if found["expert"]:
        found["expert"] = {key: value for key, value in found["expert"].items() if key not in _OF_TRAINING}
    return found


def _kept(router: dict[str, Any]) -> dict[str, Any]:
    """Of a router; a start of an older version has the defaults of what is new."""
    born = (*_OF_TRAINING, "std") if router["kind"] == "random" else _OF_TRAINING
    return {key: value for key, value in router.items() if key not in born}
