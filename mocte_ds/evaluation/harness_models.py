"""lm-evaluation-harness' models of this project: a Hugging Face folder, and the checkpoint of a run as it is."""

import copy
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from mocte_ds.dist.collectives import gather_objects, gather_rows, wait_for_all
from mocte_ds.errors import ConfigError
from mocte_ds.evaluation.live import load_live
from mocte_ds.evaluation.network import load_network
from mocte_ds.evaluation.replicas import Replicas, join_ranks

NAME = "mocte"
"""Of :class:`MocteLM` in lm-eval's registry: `--model mocte`."""


class RankedLM(HFLM):
    """HFLM on several ranks: the replicas of the model share the items, the ranks of a replica the experts."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        replicas: Replicas,
        batch_size: int | str = 1,
        device: str | None = None,
        **how: Any,
    ) -> None:
        """Take a model.

        Args:
            network: on the CPU; is moved to ``device``.
            tokenizer: of transformers.
            replicas: how the ranks divide the work.
            batch_size: sequences of a forward.
            device: torch device; None: the GPU of this rank, else the CPU.
            **how: as of HFLM.
        """
        device = device or default_device()
        super().__init__(
            pretrained=network.to(device), tokenizer=tokenizer, batch_size=batch_size, device=device, **how
        )
        self.replicas = replicas
        self._rank, self._world_size = replicas.number, replicas.count
        self.capped = 0
        """Answers that may become shorter than their task allows."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """What each replica has, one below the other."""
        return self.replicas.of_each(gather_rows(tensor.reshape(1, -1), self.replicas.world)).reshape(-1)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What each replica has, on replica ``dst``; None on the others."""
        values = self.replicas.of_each(gather_objects(obj, self.replicas.world))
        return values if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        wait_for_all(self.replicas.world)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """HFLM puts the token that begins a text in front itself: the tokenizer must not do so a second time."""
        kept, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = kept

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """HFLM stops with an assertion where a task allows longer answers than the model's context has room for.

        They are cut to half of the context instead, and counted in :attr:`capped`.
        """
        most = max(1, self.max_length // 2)
        shortened = []
        for request in requests:
            context, settings = request.args
            wanted = settings.get("max_gen_toks") or settings.get("max_new_tokens") or self.max_gen_toks
            if wanted > most:
                self.capped += 1
                request = copy.copy(request)
                kept = {key: value for key, value in settings.items() if key != "max_new_tokens"}
                request.arguments = (context, {**kept, "max_gen_toks": most})
            shortened.append(request)
        answers = super().generate_until(shortened, disable_tqdm)
        self.replicas.require_same(answers, "the generated answers")
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **how: Any) -> list[tuple[float, bool]]:
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > self.max_length:
            raise ConfigError(
                f"a task asks how likely an answer of {longest} tokens is, and the model's context has "
                f"{self.max_length}; leave the task out, or take a model with a longer context."
            )
        found = super()._loglikelihood_tokens(requests, *args, **how)
        self.replicas.require_same(found, "the log-likelihoods")
        return found


@register_model(NAME)
class MocteLM(RankedLM):
    """The checkpoint of a run: `--model mocte --model_args checkpoint=DIR[,tag=NAME][,ep_size=N][,dtype=bf16]`."""

    def __init__(
        self,
        checkpoint: str | Path,
        tag: str | None = None,
        ep_size: int | None = None,
        tokenizer: str | Path | None = None,
        dtype: str = "fp32",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Load it, without the optimizer's state (collective where several ranks run).

        Args:
            checkpoint: a run's folder of checkpoints, or the folder of one.
            tag: which one; None: the latest.
            ep_size: ranks over which the experts are spread; None: all.
            tokenizer: sentencepiece model, or a folder with a tokenizer.json; None: the one of the run.
            dtype: `fp32`, `bf16` or `fp16`.
            batch_size: sequences of a forward.
            device: torch device; None, or any GPU: the GPU of this rank, else the CPU.
            max_batch_size: as of HFLM.
            max_length: as of HFLM.

        Raises:
            CheckpointError: it is missing, damaged, of a model that no class can hold, or has no tokenizer.
            ConfigError: ``ep_size`` does not divide the number of ranks.
        """
        join_ranks()
        if device is not None and device.startswith("cuda"):
            device = None  # lm-eval's command line says cuda:0 on every rank, and where there is none
        replicas = Replicas.of(ep_size)
        if replicas.size > 1 and not str(batch_size).isdigit():
            raise ConfigError(
                f"batch_size = {batch_size}: ranks that share experts must agree on it; give a number, or ep_size=1."
            )
        folder = Path(checkpoint) / str(tag) if tag is not None else Path(checkpoint)
        network, tokens = load_live(folder, tokenizer, replicas, dtype)
        how = {"max_batch_size": max_batch_size, "max_length": max_length}
        given = {name: value for name, value in how.items() if value is not None}
        super().__init__(network, tokens, replicas, batch_size, device, **given)


def folder_model(folder: Path, batch_size: int, device: str | None) -> RankedLM:
    """A Hugging Face folder, whole on every rank."""
    network, tokenizer = load_network(folder)
    return RankedLM(network, tokenizer, Replicas.of(1), batch_size, device)


def default_device() -> str:
    """The GPU of this rank, else the CPU."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
