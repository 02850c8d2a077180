"""Lets experts emerge in an imported model at once: clusters of its features on a corpus, by the code of a run."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.checkpoints.names import EXPERT_PARAMETER
from mocte_ds.checkpoints.source import Source, empty_decoder
from mocte_ds.checkpoints.weights import Made, Tensors
from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import bypass_seed, set_gate
from mocte_ds.controller.measurements import finish_readings, read_blocks
from mocte_ds.controller.run_state import RunState
from mocte_ds.convert.hf.imports.state import start_state
from mocte_ds.data.corpus import read_corpus
from mocte_ds.data.stored_tokenizer import AnyTokenizer
from mocte_ds.errors import ConfigError, DataError
from mocte_ds.models.layers import rotary_angles
from mocte_ds.moe.attach import matching_modules
from mocte_ds.moe.block import Block
from mocte_ds.moe.experts import draw_bypass, make_expert
from mocte_ds.moe.ffn_shape import Part
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.zero import UnitRegistry

ROWS_A_SEQUENCE = 16
"""Few rows a sequence: neighbours in a sequence are alike."""
_TOGETHER = 8  # sequences that a layer computes at once

# Shapes: S sequences of T tokens, d features.


class Emerged:
    """An imported model with experts, gates in memory, everything else made when it is asked for."""

    def __init__(
        self,
        source: Source,
        config: MocteConfig,
        tokenizer: AnyTokenizer,
        corpus: str | Path,
        context: int,
        tell: Callable[[str], None],
    ) -> None:
        """Send text through the model, layer by layer, and make gates of the features in front of its FFNs.

        Memory holds one layer, and the features of all sequences twice.

        Args:
            source: the dense model; one layer at a time is read.
            config: the "mocte" block; `eod_id` null: the tokenizer's.
            tokenizer: of the model.
            corpus: folder of a corpus.
            context: T.
            tell: called with a line for each layer.

        Raises:
            ConfigError: the block does not fit the model.
            DataError: a bad corpus, or too little text.
        """
        self.source, self.config = source, config
        names = matching_modules(source.model, config.modules)
        layers = [f"model.layers.{i}.mlp" for i in range(source.config.num_layers)]
        if strange := sorted(set(names) - set(layers)):
            raise ConfigError(f"mocte.modules names {strange[0]}, which is not an FFN of a layer (model.layers.N.mlp).")
        modes = [{"name": name, "mode": "warmup"} for name in names]
        state = {"config": config.to_dict(), "blocks": modes}
        self.model = empty_decoder(asdict(source.config), state, Path(str(corpus)))
        self.blocks = {m.name: m for m in self.model.modules() if isinstance(m, Block)}
        for block in self.blocks.values():
            for bank in block.banks:
                # The only part that is in memory.
                gate = ClusterGate(block.hidden_size, bank.num_experts, bank.gate.router, source.config.vocab_size)
                bank.deepspeed_moe.gate = gate
        run = RunState(config, list(self.blocks.values()), UnitRegistry(self.model, [], 0, None), 0, 1)
        ids, domain, run.domain_names = _sequences(tokenizer, corpus, wanted_sequences(config), context)
        self.tokens = ids.numel()
        """Tokens that were looked at."""
        self._collect(run, ids, domain, tell)
        readings, search = read_blocks(run, run.blocks, in_background=False)
        finish_readings(run, readings, search)
        self.clusters = {}
        """By block: how many clusters were found in its documents, as a check of a run would report them."""
        for handle in run.blocks:
            reading = readings[handle.index]
            set_gate(handle.block, config, reading.sample())
            self.clusters[handle.name] = reading.found.detection.count if reading.found else None
        self.state = start_state(source.config, config, names)
        """Of a source of this model."""
        self._newest: tuple[tuple[str, int, int], dict[str, Tensor]] = (("", -1, -1), {})

    def tensors(self, dense: Tensors) -> Tensors:
        """Every tensor of the model with experts.

        Args:
            dense: those of the dense model.
        """
        found: Tensors = {}
        for name, like in self.model.state_dict().items():
            block = next((block for block in self.blocks if name.startswith(f"{block}.")), None)
            expert = EXPERT_PARAMETER.fullmatch(name)
            if block is None:
                found[name] = dense[name]
            elif name.startswith(f"{block}.dense."):
                found[name] = dense[name.replace(f"{block}.dense.", f"{block}.", 1)]
            elif expert:
                kind = dense[f"{block}.{expert[4]}"].dtype
                make = partial(self._expert, block, int(expert[2]), int(expert[3]), expert[4], kind)
                found[name] = Made(kind, tuple(like.shape), (), make)
            else:
                found[name] = like
        return found

    @torch.no_grad()
    def _collect(self, run: RunState, ids: Tensor, domain: Tensor, tell: Callable[[str], None]) -> None:
        """Hand the features in front of every block to its collector."""
        config = self.source.config
        state = ForwardState(ids, run.context.eod_id, domain=domain, sources=len(run.domain_names))
        x = self.source.read("model.embed_tokens.weight")[ids]
        if config.style == "gpt2":
            x = x + self.source.read("model.embed_positions.weight")[: ids.shape[1]]
        collectors = {
            handle.name: collector for handle, collector in zip(run.blocks, run.samples.collectors, strict=True)
        }
        rotation = rotary_angles(config, ids.shape[1], x) if config.style == "llama" else None
        for number in range(config.num_layers):
            layer = self.source.part(f"model.layers.{number}")
            seen: list[Tensor] = []
            layer.mlp.register_forward_pre_hook(lambda _ffn, inputs, seen=seen: seen.append(inputs[0]))
            x = torch.cat([layer(part, rotation) for part in x.split(_TOGETHER)])
            collector = collectors.get(f"model.layers.{number}.mlp")
            if collector is not None:
                # All sequences as one micro-batch: blocks take turns, and the next one comes a layer later.
                collector.see(torch.cat(seen), state)
            tell(f"features of layer {number + 1} of {config.num_layers}")

    def _expert(self, block: str, bank: int, number: int, name: str, kind: torch.dtype) -> Tensor:
        """A parameter of an expert, born as in a run."""
        settings = self.config.expert
        wanted = (block, bank, 0 if settings.kind == "ffn" else number)  # copies of one slice are alike
        if self._newest[0] != wanted:
            part = Part(bank, len(self.config.routers))
            ffn = self.source.part(block)
            expert = make_expert(ffn, settings.kind, settings.width, self.config.num_experts, block, part)
            if settings.kind == "lora":
                draw_bypass(expert, bypass_seed(self.config.seed, block, bank, number))
            self._newest = (wanted, expert.state_dict())
        return self._newest[1][name].to(kind)


def wanted_sequences(config: MocteConfig) -> int:
    """Sequences that a sample of the wanted size is drawn from."""
    spectrum = config.spectrum
    return max((spectrum.rows << spectrum.doublings) // ROWS_A_SEQUENCE, spectrum.documents)


def _sequences(
    tokenizer: AnyTokenizer, corpus: str | Path, count: int, length: int
) -> tuple[Tensor, Tensor, list[str]]:
    """(S, T) ids of about ``count`` sequences, their domains (S,), and the domains' names; as many of each domain.

    Raises:
        DataError: a domain has no sequence, or all together have too few for a spectrum.
    """
    texts = read_corpus(corpus)
    each, rows, domains = -(-count // len(texts)), [], []
    for number, (name, documents) in enumerate(texts.items()):
        stream = itertools.chain.from_iterable(_ids(tokenizer, documents))
        mine: list[list[int]] = []
        while len(mine) < each and len(ids := list(itertools.islice(stream, length))) == length:
            mine.append(ids)
        if not mine:
            raise DataError(f"the domain {name} of {corpus} has less than {length} tokens; add text or remove it.")
        rows += mine
        domains += [number] * len(mine)
    return torch.tensor(rows), torch.tensor(domains), list(texts)


def _ids(tokenizer: AnyTokenizer, documents: Any) -> Iterator[list[int]]:
    for text in documents:
        yield [*tokenizer.encode(text), tokenizer.eod_id]
