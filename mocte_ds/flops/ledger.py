"""Counts every FLOP of a run: forward, both halves of the backward pass, and everything that MO-CTE adds or saves.

Steps are counted by formula, checks as they happen (mocte_ds/controller/flops.py). A multiply-add counts as two.
Attention counts the full T x T scores (what the plain kernel computes). Norms, activations, softmax and the optimizer
are left out, as is usual. The tests compare every part with torch's FlopCounterMode.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mocte_ds.config import MocteConfig
from mocte_ds.flops.model_sizes import ModelSizes
from mocte_ds.moe.keys import Key, key_class
from mocte_ds.remote_code.keys_mocte import accepted


@dataclass
class Ledger:
    """Totals in FLOPs, all ranks together."""

    forward: float = 0.0
    """Forward passes of training."""
    dgrad: float = 0.0
    """Gradients of activations."""
    wgrad: float = 0.0
    """Gradients of weights, those that were really computed."""
    wgrad_saved: float = 0.0
    """Gradients of frozen experts' weights, which were not computed."""
    prefix_saved: float = 0.0
    """The rest of the backward pass through the frozen front of the model, which was not computed."""
    recompute: float = 0.0
    """Forward passes again, in the backward pass, with activation checkpointing."""
    routing: float = 0.0
    """Gates."""
    sampling: float = 0.0
    """Means of documents."""
    spectrum: float = 0.0
    """Sampled SVDs and their certificates."""
    clusters: float = 0.0
    """Detection and balanced k-means; at emergence the gate, and the block's output before and after."""
    trainability: float = 0.0
    """Products with the neural-tangent kernel."""
    progress: float = 0.0
    """Passes over the probe set."""
    validation: float = 0.0
    """Forward passes of validation; not part of the training total."""
    parts: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> float:
        """Everything but validation."""
        spent = "forward dgrad wgrad recompute routing sampling spectrum clusters trainability progress"
        return sum(getattr(self, name) for name in spent.split())

    @property
    def model(self) -> float:
        """What the model itself needs: without recomputation, and without what checks spend."""
        return self.forward + self.dgrad + self.wgrad + self.routing

    def to_dict(self) -> dict[str, float]:
        """Totals by component."""
        return {key: value for key, value in asdict(self).items() if key != "parts"} | {"total": self.total}

    def load(self, values: dict[str, float]) -> None:
        """Take over saved totals."""
        for key, value in values.items():
            if key not in ("total", "parts"):
                setattr(self, key, value)

    def step(
        self,
        model: ModelSizes,
        tokens: int,
        context: float,
        config: MocteConfig | None,
        blocks: Sequence[dict[str, Any]],
        frozen_layers: int = 0,
        sampled: bool = True,
    ) -> None:
        """Add one optimizer step.

        Args:
            model: its sizes.
            tokens: of the global batch.
            context: tokens of a sequence, on average.
            config: the "mocte" block, None for a dense run.
            blocks: for each block "layer", "mode" and, for each expert, "experts" (modes) and "load" (tokens of this
                step).
            frozen_layers: of the front; the embeddings are frozen with the first.
            sampled: whether a check wants the features of this step.
        """
        matrices = 2.0 * model.matrices * tokens
        scores = 4.0 * context * model.query_size * len(model.layers) * tokens
        self.forward += matrices + scores
        self.dgrad += matrices + 2 * scores
        self.wgrad += matrices
        emerged: dict[int, float] = {}
        for block in blocks:
            if config is None or block["mode"] == "warmup":
                continue
            layer = block["layer"]
            gates = gate_flops(model, config, tokens)
            self.routing += gates.forward + (
                0.0 if layer < frozen_layers else gates.backward(block["mode"] == "locked")
            )
            added = added_flops(model, config, layer, tokens, sum(block["load"]))
            self.forward += added
            self.dgrad += added
            self.wgrad += added
            frozen = sum(n for n, mode in zip(block["load"], block["experts"], strict=True) if mode == "frozen")
            saved = expert_flops(model, config, layer) * frozen
            self.wgrad -= saved
            self.wgrad_saved += saved
            emerged[layer] = added + gates.forward
        if model.recomputes:
            self._recompute(model, tokens, context, emerged, frozen_layers)
        if config is None:
            return
        self.sampling += 2.0 * model.hidden_size * tokens * len(blocks) * sampled
        if frozen_layers:
            self._freeze_front(model, tokens, context, config, blocks, frozen_layers)

    def _recompute(
        self, model: ModelSizes, tokens: int, context: float, emerged: Mapping[int, float], frozen_layers: int
    ) -> None:
        """Layers that run again in the backward pass.

        A dense FFN's last matrix is left out: nothing in the backward pass reads what it gives, and torch stops there.
        Where experts have emerged their outputs are put into the order of the tokens, which comes after it.
        """
        for layer in range(frozen_layers, len(model.layers)):
            flops = 2.0 * model.layers[layer].matrices + 4.0 * context * model.query_size
            last = 0 if layer in emerged else model.layers[layer].ffn_output
            self.recompute += (flops - 2.0 * last) * tokens + emerged.get(layer, 0.0)

    def _freeze_front(
        self,
        model: ModelSizes,
        tokens: int,
        context: float,
        config: MocteConfig,
        blocks: Sequence[dict[str, Any]],
        layers: int,
    ) -> None:
        """Take back what :meth:`step` has counted of the backward pass below the first layer that trains."""
        loads = {b["layer"]: sum(b["load"]) for b in blocks if b["layer"] < layers and b["mode"] != "warmup"}
        routed = sum(expert_flops(model, config, layer) * load for layer, load in loads.items())
        ffns = sum(2.0 * model.layers[layer].ffn * tokens for layer in loads)
        matrices = sum(layer.matrices for layer in model.layers[:layers]) * 2.0 * tokens
        scores = 2 * 4.0 * context * model.query_size * layers * tokens
        lora = config.expert.kind == "lora"
        dgrad = matrices + scores + (routed if lora else 0.0)
        # All experts of these layers are frozen, and their weight gradients are saved already.
        wgrad = matrices - (0.0 if lora else ffns)
        wgrad += 2.0 * model.tied * tokens
        self.dgrad -= dgrad
        self.wgrad -= wgrad
        self.prefix_saved += dgrad + wgrad

    def counted(self, flops: Mapping[str, float]) -> None:
        """Add what a check or a change counted while it worked, by part."""
        for part, value in flops.items():
            setattr(self, part, getattr(self, part) + value)

    def validate(
        self,
        model: ModelSizes,
        tokens: int,
        context: int,
        config: MocteConfig | None = None,
        blocks: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Add the forward passes of a validation; arguments as for :meth:`step`, without loads."""
        self.validation += forward_flops(model, context) * tokens
        for block in blocks:
            if config is not None and block["mode"] != "warmup":
                load = tokens * sum(router.top_k for router in config.routers)
                self.validation += added_flops(model, config, block["layer"], tokens, load)
                self.validation += gate_flops(model, config, tokens).forward


@dataclass(frozen=True)
class GateFlops:
    """Of the gates of a block."""

    forward: float
    by_weight: float
    """Gradients of what learns."""
    by_input: float
    """Gradients of the features, through what learns."""

    def backward(self, locked: bool) -> float:
        """FLOPs of the backward pass; a locked block's router trains no more."""
        return self.by_input + (0.0 if locked else self.by_weight)


def gate_flops(model: ModelSizes, config: MocteConfig, tokens: int) -> GateFlops:
    """Matrices of (E, d): a linear prior, a learned residual, and their gradients.

    The features' gradient comes through the residual; through the prior only where it is chance, see ClusterGate.
    """
    matrix = 2.0 * config.num_experts * model.hidden_size * tokens
    routers = config.routers
    keys = [key_class(router.kind) for router in routers]
    # Some keys make one product of both.
    prior = [
        0.0
        if router.learns_choice and key.learned_logits is not Key.learned_logits
        else key.flops(
            model.hidden_size, config.num_experts, **{s: getattr(router, s) for s in accepted(key.flops, key.settings)}
        )
        * tokens
        for key, router in zip(keys, routers, strict=True)
    ]
    learned = matrix * sum(router.learn for router in routers)
    through = sum(p for p, key, r in zip(prior, keys, routers, strict=True) if r.learns_choice and key.by_chance)
    return GateFlops(sum(prior) + learned, learned, learned + through)


def added_flops(model: ModelSizes, config: MocteConfig, layer: int, tokens: int, load: float) -> float:
    """What the forward pass of a block's experts costs beside that of the dense FFN, for ``load`` routed tokens."""
    added = expert_flops(model, config, layer) * load
    if config.expert.kind == "lora":
        return added
    several = any(router.top_k > 1 for router in config.routers)
    return added - 2.0 * model.layers[layer].ffn * tokens if several else 0.0


def forward_flops(model: ModelSizes, context: int) -> float:
    """FLOPs of a forward pass of the dense model, a token."""
    return 2.0 * model.matrices + 4.0 * context * model.query_size * len(model.layers)


def expert_width(model: ModelSizes, config: MocteConfig, layer: int) -> float:
    """Hidden units of one expert of a layer."""
    size, banks = model.layers[layer].ffn_width, len(config.routers)
    if config.expert.kind == "lora":
        return config.expert.width or max(1, size // config.num_experts // banks)
    return size / banks


def expert_flops(model: ModelSizes, config: MocteConfig, layer: int) -> float:
    """FLOPs of the forward pass of one expert, a token."""
    return 2.0 * model.layers[layer].ffn * expert_width(model, config, layer) / model.layers[layer].ffn_width
