"""What a mixture class of transformers says of itself, so that runs are exported as it and start from its folders.

A new class is one file: a :class:`Family` with its names and three methods, and the decorator :func:`register`.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mocte_ds.checkpoints.names import expert_parameter
from mocte_ds.convert.hf.families.run import Mixture
from mocte_ds.convert.hf.families.tensors import (
    HEAD,
    LAYER,
    MATRICES,
    Pair,
    gate_tensor,
    is_finer,
    padded_pair,
    total,
)
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block

FAMILIES: dict[str, "Family"] = {}
"""By the name of the class; an export takes the first one that fits."""

# Shapes: E experts, d features, f hidden units of an expert.


def register(family: type["Family"]) -> type["Family"]:
    """Add a family to :data:`FAMILIES`."""
    FAMILIES[family.architecture] = family()
    return family


@dataclass(frozen=True)
class Start:
    """What a folder of a class says, in terms of a run."""

    widths: dict[int, int]
    """Hidden units of the dense FFN in each layer that has experts."""
    mocte: dict[str, Any]
    """"mocte" block that keeps its experts and routers."""


class Family:
    """One mixture class of transformers."""

    architecture = ""
    """Name of the class."""
    kind = "ffn"
    """`expert.kind` of the runs that fit: `ffn` without a shared FFN, `lora` beside one."""
    bases: tuple[str, ...] = ()
    """Dense classes whose layers, FFNs apart, compute what this class's do."""
    experts = "mlp.experts.{k}.{matrix}.weight"
    """Names in a layer: of an expert's matrices,"""
    gate = "mlp.gate.weight"
    """of the router,"""
    correction: str | None = None
    """of the numbers that are added to the scores for the choice alone,"""
    shared: str | None = None
    """of the matrices of the FFN beside the experts,"""
    empty: tuple[tuple[str, tuple[int | None, int | None], float], ...] = ()
    """and tensors that the class insists on, with their shapes (None is d), and the number that fills them."""
    names: Mapping[str, str] = dict(zip(MATRICES, MATRICES, strict=True))
    """Names of an expert's matrices."""
    routing = "softmax over the experts"
    """How it weighs a token's experts, for the docs."""

    # ---- what each class says of itself -----------------------------------------------------------------------------

    def fits(self, run: Mixture) -> str | None:
        """None, or why the class computes something else than this run, and what to change."""
        raise NotImplementedError

    def config_to(self, run: Mixture) -> dict[str, Any]:
        """Keys of the config that say which experts there are; the others are the base model's."""
        raise NotImplementedError

    def config_from(self, config: Any, fixed_router: bool) -> Start:
        """What a config of the class says of its experts.

        Args:
            config: as transformers have it.
            fixed_router: routers do not train on.

        Raises:
            Refusal: a value that blocks do not compute.
        """
        raise NotImplementedError

    # ---- what all classes share -------------------------------------------------------------------------------------

    def refusal(self, run: Mixture) -> str | None:
        """None where the class computes what the run does; else why not."""
        if run.architecture != self.architecture and run.architecture not in self.bases:
            return f"no stock class has experts in the layers of a {run.architecture}"
        if run.some.kind != self.kind:
            return f"{self.architecture} has experts of the kind '{self.kind}', the run of '{run.some.kind}'"
        reasons = (
            *(_routing_refusal(run, block) for block in run.emerged.values()),
            _attention_refusal(run, self),
            self.fits(run),
        )
        return next((reason for reason in reasons if reason), None)

    def sparse(self, run: Mixture) -> dict[int, Block]:
        """The blocks of the layers that have experts in the class."""
        return run.emerged

    def config(self, run: Mixture) -> Any:
        """Config of the class for a run that fits."""
        from transformers import CONFIG_MAPPING

        changed = self.config_to(run)
        if run.architecture == self.architecture:
            config = copy.deepcopy(run.config)
            for key, value in changed.items():
                setattr(config, key, value)
            return config
        return CONFIG_MAPPING[self.model_type](**{**_common_keys(run.config), **changed})

    @property
    def model_type(self) -> str:
        """Name of its config in transformers."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

        return next(kind for kind, name in NAMES.items() if name == self.architecture)

    def pairs(self, run: Mixture) -> list[Pair]:
        """Every tensor of the class, layer by layer."""
        sparse, found = self.sparse(run), []
        inside = {f"{block.name}.": block for block in run.source.blocks}
        numbers = {block.name: layer for layer, block in sparse.items()}
        done: set[str] = set()
        for name, shape in run.source.shapes.items():
            block = next((block for start, block in inside.items() if name.startswith(start)), None)
            if block is None:
                if name != HEAD or not run.config.tie_word_embeddings:
                    found.append(Pair(name, shape, (name,)))
            elif block.name not in numbers:
                if name.startswith(f"{block.name}.dense."):
                    found.append(Pair(name.replace(".dense.", ".", 1), shape, (name,)))
            elif block.name not in done:
                done.add(block.name)
                found += self._layer(run, numbers[block.name], block)
        return found

    def _layer(self, run: Mixture, layer: int, block: Block) -> Iterator[Pair]:
        """The sparse FFN of a layer."""
        prefix, d, width = LAYER.format(layer=layer), block.hidden_size, run.width
        gate = self.gate_pair(run, layer, block)
        yield gate
        if self.correction:
            added = (gate_tensor(block, "cluster_correction"),) if run.router.weight == "sigmoid" else ()
            make = (lambda tensor: tensor) if added else partial(torch.zeros, gate.shape[0])
            yield Pair(
                prefix + self.correction,
                gate.shape[:1],
                added,
                make,
                exact=is_finer(run.source, added) or not added,
                buffer=True,
            )
        for k in range(block.num_experts):
            for matrix in MATRICES:
                ours = expert_parameter(block.name, 0, k, f"{matrix}.weight")
                name = prefix + self.experts.format(k=k, matrix=self.names[matrix])
                yield padded_pair(name, ours, matrix, width, d)
        if self.shared:
            filled = math.ceil(run.ffn_width(self.sparse(run)) / width) * width
            for matrix in MATRICES:
                name = prefix + self.shared.format(matrix=matrix)
                yield padded_pair(name, f"{block.name}.dense.{matrix}.weight", matrix, filled, d)
        for name, (rows, columns), value in self.empty:
            shape = (rows or d, columns or d)
            yield Pair(prefix + name, shape, (), partial(torch.full, shape, value))

    def gate_pair(self, run: Mixture, layer: int, block: Block) -> Pair:
        """The router: the prior of the clusters and what was learned, (E, d).

        It is stored in fp32, unless it came out of a model in the export's dtype.
        """
        ours = [gate_tensor(block, "key.cluster_weight")]
        if run.router.learn:
            ours.append(gate_tensor(block, "cluster_residual"))
        exact = is_finer(run.source, ours)
        shape = (block.num_experts, block.hidden_size)
        return Pair(LAYER.format(layer=layer) + self.gate, shape, tuple(ours), total, exact=exact)


class Refusal(CheckpointError):
    """A key of a config that blocks do not compute."""

    def __init__(self, key: str, value: object, why: str) -> None:
        super().__init__(f"{key} = {value!r:.200}: {why}")


def require_value(config: Any, key: str, wanted: Any, advice: str) -> None:
    """Refuse another value of a key; where the key is missing it has the wanted one.

    Raises:
        Refusal: names the key.
    """
    value = getattr(config, key, wanted)
    if value != wanted:
        raise Refusal(key, value, f"{wanted!r} is supported; {advice}")


def kept_block(config: Any, experts: int, normalised: bool, layers: list[int], fixed_router: bool) -> dict[str, Any]:
    """The "mocte" block of a folder's experts; their routers are linear maps, which train on where they can.

    Args:
        config: as transformers have it.
        experts: per layer.
        normalised: whether the weights of a token's experts add up to 1.
        layers: that have experts.
        fixed_router: routers do not train on.

    Raises:
        Refusal: fewer than two experts, a choice of none or of more than there are, no layer, or another activation.
    """
    require_value(config, "hidden_act", "silu", "experts are gated by silu here.")
    k, count = config.num_experts_per_tok, config.num_hidden_layers
    if type(k) is not int or experts < 2 or not 1 <= k <= experts:
        why = f"it must lie between 1 and the {experts!r:.40} experts, of which 2 are needed."
        raise Refusal("num_experts_per_tok", k, why)
    if not layers:
        raise Refusal("num_hidden_layers", count, "no layer has experts.")
    hard = k == 1 and normalised
    everywhere = len(layers) == count
    return {
        "modules": "model.layers.*.mlp" if everywhere else [f"model.layers.{layer}.mlp" for layer in layers],
        "num_experts": experts,
        "spectrum": {"rows": max(2048, 16 * experts)},
        "router": {
            "kind": "random",
            "bias": False,
            "weight": "hard" if hard else "softmax",
            "learn": not hard and not fixed_router,
            "top_k": k,
            "normalise": normalised and k > 1,
        },
    }


_COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
    *("hidden_act", "attention_dropout", "rope_parameters", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def _common_keys(config: Any) -> dict[str, Any]:
    """Keys of a dense config that mean the same in every family."""
    found = {key: copy.deepcopy(getattr(config, key)) for key in _COMMON}
    # Some of the configs have no such key, but all models read it; others have a default of their own.
    found["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return found


def _routing_refusal(run: Mixture, block: Block) -> str | None:
    """Why no stock class routes as a block does."""
    if len(block.banks) != 1:
        return f"{block.name} has {len(block.banks)} banks of experts; stock classes have one"
    gate = block.banks[0].gate
    if not gate.key.stock:
        return (
            f"no stock class routes by router.kind '{gate.router.kind}'; for one, train with router.kind 'token' and "
            "router.bias false"
        )
    if gate.router.weight == "gain":
        return "no stock class multiplies an expert's output by a learned factor; for one, train with weight 'hard'"
    if gate.unit_mean:
        return "no stock class divides weights by their mean; for one, train with router.unit_mean false"
    # The same bias for all experts changes neither the choice nor the softmax.
    bias = run.source.read(gate_tensor(block, "key.cluster_bias"))
    if (bias != bias[0]).any():
        return (
            f"stock gates have no bias, that of {block.name} has one; for a stock class, train with router.bias false"
        )
    return None


def _attention_refusal(run: Mixture, family: Family) -> str | None:
    """Why the layers of the base model are not the family's, though their classes look alike."""
    if run.architecture == family.architecture:
        return None
    config = run.config
    if config.hidden_act != "silu":
        return f"stock experts are gated by silu, the run's by {config.hidden_act}"
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    windowed = "sliding_attention" in kinds and getattr(config, "sliding_window", None) is not None
    if run.architecture == "LlamaForCausalLM":
        windowed = False  # its attention reads no such key
    if windowed and family.architecture != "MixtralForCausalLM":
        return f"{family.architecture} has no sliding_window"
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            return f"no stock class with experts has {key} in the layers of a {run.architecture}"
    return None
