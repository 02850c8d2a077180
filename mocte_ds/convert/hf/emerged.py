"""Lets experts emerge in an imported model at once: clusters of its features on a corpus, by the code of a run."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.names import EXPERT_PARAMETER
from mocte_ds.checkpoints.source import Source, empty_model
from mocte_ds.checkpoints.weights import Made, Tensors
from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import bypass_seed, set_gate
from mocte_ds.controller.collect import FeatureCollector
from mocte_ds.controller.measurements import finish_readings, read_blocks
from mocte_ds.controller.run_state import RunState
from mocte_ds.convert.hf.imported_folder import start_state
from mocte_ds.convert.hf.trained import trained_by_layer
from mocte_ds.data.corpus import read_corpus
from mocte_ds.data.stored_tokenizer import AnyTokenizer
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import DataError
from mocte_ds.moe.attach import matching_modules
from mocte_ds.moe.block import Block, BlockMode, running_state
from mocte_ds.moe.experts import draw_bypass, make_expert
from mocte_ds.moe.ffn_shape import FFNSlice
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.gate import ClusterGate
from mocte_ds.moe.loose import gather_named
from mocte_ds.zero import UnitRegistry

ROWS_A_SEQUENCE = 16
"""Few rows per sequence: neighbours in a sequence are alike."""
_TOGETHER = 8  # sequences per forward pass

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
        """Send text through the model, and make gates of the features that enter its FFNs.

        Args:
            source: the dense model, of which a layer is in memory at a time.
            config: the "mocte" block; `eod_id` null: the tokenizer's.
            tokenizer: of the model.
            corpus: folder of a corpus.
            context: T.
            tell: called with a line for each part of the corpus.

        Raises:
            ConfigError: the block does not fit the model.
            DataError: a bad corpus, or too little text.
        """
        self.config, self.dense = config, trained_by_layer(source)
        names = matching_modules(self.dense.model, config.modules)
        warm = {"config": config.to_dict(), "blocks": [{"name": name, "mode": "warmup"} for name in names]}
        model = empty_model(source.base, warm, Path(str(corpus)))
        self.blocks = {m.name: m for m in model.modules() if isinstance(m, Block)}
        gather_named(self.dense.model, names)
        vocab_size = self.dense.model.config.get_text_config().vocab_size
        for block in self.blocks.values():
            for bank in block.banks:
                # The only part that is in memory.
                gate = ClusterGate(block.hidden_size, bank.num_experts, bank.gate.router, vocab_size)
                bank.deepspeed_moe.gate = gate
        mesh = mesh_of_processes()
        run = RunState(config, list(self.blocks.values()), UnitRegistry(model, [], 0, None), mesh, 1)
        ids, domain, run.domain_names = _sequences(tokenizer, corpus, wanted_sequences(config), context)
        self.tokens_seen = ids.numel()
        """Tokens that were looked at."""
        self._collect(run, ids, domain, tell)
        readings, search = read_blocks(run, run.blocks, in_background=False)
        finish_readings(run, readings, search)
        self.clusters = {}
        """By block: how many clusters were found in its documents, as a check of a run would report them."""
        for handle in run.blocks:
            reading = readings[handle.index]
            set_gate(handle.block, config, mesh, reading.sample())
            handle.block.mode = BlockMode.SPECIALISING
            self.clusters[handle.name] = reading.found.detection.count if reading.found else None
        self.model, self.state = model, {**source.state, **start_state(config, names)}
        """Its structure, and its state as of :class:`mocte_ds.checkpoints.source.Source`."""
        self._newest: tuple[tuple[str, int, int], dict[str, Tensor]] = (("", -1, -1), {})

    def tensors(self, dense: Tensors) -> Tensors:
        """Every tensor of the model with experts.

        Args:
            dense: those of the dense model.
        """
        found: Tensors = {}
        outside = {ours: theirs for block in self.blocks.values() for ours, theirs in block.names_outside.items()}
        for name, like in running_state(self.model).items():
            block = next((block for block in self.blocks if name.startswith(f"{block}.")), None)
            expert = EXPERT_PARAMETER.fullmatch(name)
            if block is None:
                found[name] = dense[name]
            elif name in outside:
                found[name] = dense[outside[name]]
            elif expert:
                kind = dense[outside[f"{block}.dense.{expert[4]}"]].dtype
                make = partial(self._expert, block, int(expert[2]), int(expert[3]), expert[4], kind)
                found[name] = Made(kind, tuple(like.shape), (), make)
            else:
                found[name] = like
        return found

    @torch.no_grad()
    def _collect(self, run: RunState, ids: Tensor, domain: Tensor, tell: Callable[[str], None]) -> None:
        """Hand the features in front of every block to its collector."""
        batch: list[ForwardState] = []

        def look(collector: FeatureCollector, _ffn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            collector.see(inputs[0], batch[-1])

        hooks = []
        for handle, collector in zip(run.blocks, run.samples.collectors, strict=True):
            ffn = self.dense.model.get_submodule(handle.name)
            hooks.append(ffn.register_forward_pre_hook(partial(look, collector)))
        sources = len(run.domain_names)
        with self.dense.running() as model:
            for start in range(0, len(ids), _TOGETHER):
                part = slice(start, start + _TOGETHER)
                state = ForwardState(ids[part], run.context.eod_id, domain=domain[part], sources=sources)
                state.first_sequence = start
                batch.append(state)
                model(input_ids=ids[part], use_cache=False)
                if start % (16 * _TOGETHER) == 0:
                    tell(f"features of sequence {start + 1} of {len(ids)}")
        for hook in hooks:
            hook.remove()

    def _expert(self, block: str, bank: int, number: int, name: str, kind: torch.dtype) -> Tensor:
        """A parameter of an expert, born as in a run."""
        settings = self.config.expert
        wanted = (block, bank, 0 if settings.kind == "ffn" else number)  # copies of one slice are alike
        if self._newest[0] != wanted:
            part = FFNSlice(bank, len(self.config.routers))
            self._newest = (("", -1, -1), {})  # the one before it is not needed any more
            ffn = self.dense.model.get_submodule(block)
            self.dense.load(ffn)
            expert = make_expert(ffn, settings.kind, settings.width, self.config.num_experts, block, part)
            self.dense.free(ffn)
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
