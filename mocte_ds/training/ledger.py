"""Counts every FLOP of a run: forward, both halves of the backward pass, and everything that MO-CTE adds or saves.

A multiply-add counts as two. Attention counts the full T x T scores (what the plain kernel computes). Norms,
activations, softmax and the optimizer are left out, as is usual; the tests compare the dense decoder with
torch's FlopCounterMode.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mocte_ds.config import MocteConfig
from mocte_ds.models import DecoderConfig


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
    routing: float = 0.0
    """Gates."""
    sampling: float = 0.0
    """Means of documents."""
    spectrum: float = 0.0
    """Sampled SVDs and their certificates."""
    clusters: float = 0.0
    """Detection and balanced k-means."""
    trainability: float = 0.0
    """Products with the neural-tangent kernel."""
    progress: float = 0.0
    """Forward passes over the probe set."""
    validation: float = 0.0
    """Forward passes of validation; not part of the training total."""
    parts: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> float:
        """Everything but validation."""
        spent = ("forward", "dgrad", "wgrad", "routing", "sampling", "spectrum", "clusters", "trainability", "progress")
        return sum(getattr(self, name) for name in spent)

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
        model: DecoderConfig,
        tokens: int,
        context: int,
        config: MocteConfig | None,
        blocks: Sequence[dict[str, Any]],
        frozen_layers: int = 0,
    ) -> None:
        """Add one optimizer step.

        Args:
            model: the decoder.
            tokens: of the global batch.
            context: tokens of a sequence.
            config: the "mocte" block, None for a dense run.
            blocks: for each block "layer", "mode" and, for each expert, "experts" (modes) and "load" (tokens of this
                step).
            frozen_layers: of the front; the embeddings are frozen with the first.
        """
        matrices = 2.0 * matmul_parameters(model) * tokens
        scores = 4.0 * context * model.query_size * model.num_layers * tokens
        self.forward += matrices + scores
        self.dgrad += matrices + 2 * scores
        self.wgrad += matrices
        if config is None:
            return
        # Matrices of a gate: a linear prior, and forward, input and weight gradient of a learned residual.
        gates = sum((router.kind in ("token", "prefix", "random")) + 3 * router.learn for router in config.routers)
        for block in blocks:
            if block["mode"] == "warmup":
                continue
            each = expert_flops(model, config, block["layer"])
            self.routing += 2.0 * config.num_experts * model.hidden_size * tokens * gates
            # Beside one FFN a token, which the matrices above have.
            added = each * sum(block["load"])
            if config.expert.kind == "ffn":
                several = any(router.top_k > 1 for router in config.routers)
                added = added - 2.0 * ffn_parameters(model, block["layer"]) * tokens if several else 0.0
            self.forward += added
            self.dgrad += added
            self.wgrad += added
            frozen = sum(n for n, mode in zip(block["load"], block["experts"], strict=True) if mode == "frozen")
            self.wgrad -= each * frozen
            self.wgrad_saved += each * frozen
        self.sampling += 2.0 * model.hidden_size * tokens * len(blocks)
        if frozen_layers:
            self._freeze_front(model, tokens, context, config, blocks, frozen_layers)

    def _freeze_front(
        self,
        model: DecoderConfig,
        tokens: int,
        context: int,
        config: MocteConfig,
        blocks: Sequence[dict[str, Any]],
        layers: int,
    ) -> None:
        """Take back what :meth:`step` has counted of the backward pass below the first layer that trains."""
        loads = {b["layer"]: sum(b["load"]) for b in blocks if b["layer"] < layers and b["mode"] != "warmup"}
        routed = sum(expert_flops(model, config, layer) * load for layer, load in loads.items())
        ffns = sum(2.0 * ffn_parameters(model, layer) * tokens for layer in loads)
        matrices = sum(layer_parameters(model, layer) for layer in range(layers)) * 2.0 * tokens
        scores = 2 * 4.0 * context * model.query_size * layers * tokens
        lora = config.expert.kind == "lora"
        dgrad = matrices + scores + (routed if lora else 0.0)
        # All experts of these layers are frozen, and their weight gradients are saved already.
        wgrad = matrices - (0.0 if lora else ffns)
        if model.tied:
            wgrad += 2.0 * model.vocab_size * model.hidden_size * tokens
        self.dgrad -= dgrad
        self.wgrad -= wgrad
        self.prefix_saved += dgrad + wgrad

    def check(self, model: DecoderConfig, config: MocteConfig, event: dict[str, Any], context: int) -> None:
        """Add one check, from the sizes in its event."""
        d = model.hidden_size
        probe = event["probe"]
        self.progress += probe["passes"] * probe["tokens"] * forward_flops(model, context)
        q = config.spectrum.rank + 8
        for block in event["blocks"]:
            for rows in (block["rows"], block["documents"]):
                # Two products a pass, one pass warm; Rayleigh-Ritz over two blocks; the certificate repeats both cold.
                self.spectrum += 4.0 * rows * d * q * (1 + 1) + 4.0 * rows * d * q * (3 + 1)
            m, r = block["documents"], config.spectrum.rank
            self.clusters += 3.0 * m * m * r + 20 * 2.0 * m * config.num_experts * r
            f = expert_width(model, config, int(block["name"].split(".")[2]))  # model.layers.N.mlp
            for expert in block["experts"]:
                n = expert["rows"]
                # One forward and X X^T, then per iteration: v W2, back through W2, and two (n, n) x (n, f) products.
                once = 6.0 * n * d * f + 2.0 * n * n * d
                each = 4.0 * n * d * f + 6.0 * n * n * f
                self.trainability += once + config.freeze.iterations * each

    def validate(self, model: DecoderConfig, tokens: int, context: int) -> None:
        """Add the forward passes of a validation."""
        self.validation += forward_flops(model, context) * tokens


def forward_flops(model: DecoderConfig, context: int) -> float:
    """FLOPs of a forward pass of the dense model, a token."""
    return 2.0 * matmul_parameters(model) + 4.0 * context * model.query_size * model.num_layers


def expert_width(model: DecoderConfig, config: MocteConfig, layer: int) -> float:
    """Hidden units of one expert of a layer."""
    size, banks = model.ffn_size(layer), len(config.routers)
    if config.expert.kind == "lora":
        return config.expert.width or max(1, size // config.num_experts // banks)
    return size / banks


def expert_flops(model: DecoderConfig, config: MocteConfig, layer: int) -> float:
    """FLOPs of the forward pass of one expert, a token."""
    return 2.0 * ffn_parameters(model, layer) * expert_width(model, config, layer) / model.ffn_size(layer)


def ffn_parameters(model: DecoderConfig, layer: int) -> int:
    """Parameters of the matrices of a layer's FFN."""
    return (3 if model.style == "llama" else 2) * model.hidden_size * model.ffn_size(layer)


def layer_parameters(model: DecoderConfig, layer: int) -> int:
    """Parameters of the matrices of a layer."""
    return 2 * model.hidden_size * (model.query_size + model.kv_size) + ffn_parameters(model, layer)


def matmul_parameters(model: DecoderConfig) -> int:
    """Parameters that every token is multiplied with: all matrices, the output matrix too, no embedding lookup."""
    layers = sum(layer_parameters(model, layer) for layer in range(model.num_layers))
    return layers + model.vocab_size * model.hidden_size
