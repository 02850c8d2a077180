"""The "mocte" block of a DeepSpeed config: every field documented, defaulted and checked before any work starts."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from mocte_ds.errors import ConfigError
from mocte_ds.registry import KEYS, OFF, POLICIES
from mocte_ds.sections import Count, CountOrZero, NotNegative, Positive, Seed, Share, parse_section, section
from mocte_ds.shown import shown


@section("mocte.expert")
class ExpertConfig:
    """What one expert is."""

    kind: Literal["ffn", "lora"] = "ffn"
    """`ffn`: a full FFN, born as a copy of the dense one; `lora`: a narrow bypass, born as zero, beside it."""
    width: Count | None = None
    """Hidden units of a `lora` expert; null: the FFN's width / num_experts. `ffn` experts keep the FFN's width."""

    def __post_init__(self) -> None:
        if self.width is not None and self.kind == "ffn":
            raise ConfigError("width is for kind 'lora'; 'ffn' experts keep the FFN's width. Remove one of the two.")


@section("mocte.router")
class RouterConfig:
    """How a token finds its expert."""

    kind: str = "token"
    """A routing key. `token`: nearest cluster of the feature; `prefix`: of the document's mean feature so far; `type`:
    table token id -> cluster; `previous`: random table of the id before. Baselines: `hash`: random table of the id;
    `random`: random directions of the feature (with `learn`: the router of Switch and of sparse upcycling). Or a key
    that you have registered (docs/extending.md)."""
    bias: bool = True
    """False: a gate without bias, from directions orthogonal to the mean (stock Mixtral has none)."""
    weight: Literal["hard", "softmax", "sigmoid"] = "hard"
    """Weight of the expert's output: 1, or the softmax probability of the chosen expert, or the sigmoid of its logit.
    `sigmoid` is the router of DeepSeek-V3 and Glm4Moe, for kind `random`: a fixed number for each expert is added to
    the sigmoids before the choice, not to the weights."""
    learn: bool = False
    """The router above as the birth of a trained one: its logits plus a residual W h from zero. Not with `hard`."""
    top_k: Count = 1
    """Experts that each token is sent to. More than one not with `hard`, and need a kind with logits or `learn`."""
    normalise: bool = False
    """The weights of a token's experts are divided by their sum, as in Mixtral."""
    scale: Positive = 1.0
    """With `sigmoid`: factor of all weights."""
    aux: NotNegative = 0.01
    """Weight of a learned router's loss for even loads, which the engine adds to the model's loss."""

    def __post_init__(self) -> None:
        key = KEYS.get(self.kind, "kind")
        if not key.has_logits and self.weight == "softmax" and not self.learn:
            raise ConfigError(
                f"weight 'softmax' needs logits, which kind '{self.kind}' does not have; use kind 'token', 'prefix' or "
                "'random', weight 'hard', or learn true."
            )
        if self.weight == "sigmoid" and not key.by_chance:
            raise ConfigError(f"weight 'sigmoid' is for kind 'random', not for '{self.kind}'.")
        if self.scale != 1.0 and self.weight != "sigmoid":
            raise ConfigError(f"scale = {self.scale} must be positive, and 1 without weight 'sigmoid'.")
        if self.learn and self.weight == "hard":
            raise ConfigError("learn needs weight 'softmax' or 'sigmoid': a weight of 1 gives the router no gradient.")
        if self.top_k > 1 and self.weight == "hard":
            raise ConfigError(f"top_k = {self.top_k} needs weight 'softmax' or 'sigmoid': experts share a token.")
        if self.normalise and self.top_k == 1 and self.weight != "sigmoid":
            raise ConfigError("normalise is for top_k > 1; for one expert it is the weight 'hard'.")


MOST_ROWS = 1 << 24
"""Of a sample: what the ranks keep of it lies in memory, once for each block."""


@section("mocte.spectrum")
class SpectrumConfig:
    """The distributed sampled SVD of the features."""

    rank: Annotated[int, Field(ge=1, le=1 << 16)] = 8
    """Singular directions that are kept."""
    rows: Annotated[int, Field(ge=16, le=MOST_ROWS)] = 2048
    """Token features sampled over all ranks for one check."""
    documents: Annotated[int, Field(ge=16, le=MOST_ROWS)] = 1024
    """Document means sampled over all ranks for one check."""
    doublings: Annotated[int, Field(ge=0, le=16)] = 2
    """How often the sample is doubled while it determines fewer than min_rank directions of a block in warm-up; doubled
    so often, `rows` is at most 2^24."""
    min_rank: Count = 4
    """Directions that a gate should be made of."""
    max_angle: Share = 0.3
    """Largest accepted sine of the angle between the subspaces of two half-samples."""

    def __post_init__(self) -> None:
        if self.rows << self.doublings > MOST_ROWS:
            allowed = (MOST_ROWS // self.rows).bit_length() - 1
            raise ConfigError(
                f"doublings = {self.doublings} makes more than {MOST_ROWS} rows of spectrum.rows = {self.rows}; with "
                f"so many rows it can be {allowed} at most."
            )


@section("mocte.clusters")
class ClustersConfig:
    """When a block's clusters count as detected."""

    method: Literal["dbscan", "hdbscan"] = "dbscan"
    """How clusters are looked for."""
    min_silhouette: Annotated[float, Field(ge=-1, le=1)] = 0.35
    """Smallest silhouette of the detected clusters (the paper's alpha_c)."""
    stability: Share = 0.6
    """Smallest adjusted Rand index between what two checks in a row detected, on the documents of the later one."""
    deadline: Share = 0.1
    """Share of the budget after which experts emerge anyway; 1: never without detection."""
    not_before: Share = 0.02
    """Share of the budget before which nothing emerges (the learning rate's warm-up)."""


@section("mocte.freeze.prefix")
class PrefixConfig:
    """Freezing of the model's front, from the embeddings upwards; an option apart from the experts' policy."""

    layers: CountOrZero = 0
    """Layers that may freeze, from the front; the embeddings freeze with the first. 0: none."""
    start: Share = 0.3
    """Share of the budget at which the first layer freezes."""
    end: Share = 0.6
    """Share at which the last of them freezes, the others in between. A layer with a block waits until all its experts
    are frozen, and the layers behind it wait with it."""

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ConfigError(f"end = {self.end} is before start = {self.start}.")


@section("mocte.freeze")
class FreezeConfig:
    """Which experts stop training, and when."""

    policy: str = "trainability"
    """Rule that decides: trainability, progress, paper, grad-norm, inverted, random, off, or a registered one of yours
    (docs/extending.md)."""
    alpha: NotNegative = 0.2
    """LEVEL: lambda under this share of the expert's own peak."""
    beta: NotNegative = 0.05
    """RATE: change of |lambda - lambda_0| between checks under this share of its largest (`paper`: first) value."""
    gamma: NotNegative = 0.5
    """PROGRESS: an expert's part of the loss decrease under this share of its fair part (one in num_experts)."""
    checks: Count = 3
    """Checks in a row that must agree."""
    after_checks: Count = 5
    """Checks with an expert's own tokens, since emergence, before it can be frozen."""
    until: Share = 0.9
    """Share of the budget after which nothing is frozen any more (the learning rate's decay)."""
    anneal: Share = 0.0
    """Share of the budget over which the learning rate of an expert falls to zero before it is frozen; 0: at once."""
    rows: Annotated[int, Field(ge=16, le=MOST_ROWS)] = 256
    """Routed tokens an expert's trainability is measured on."""
    iterations: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Power iterations of a trainability measurement."""
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    """Freezing of the model's front."""

    def __post_init__(self) -> None:
        if self.policy != OFF:
            POLICIES.get(self.policy, "policy")


@section("mocte.checkpoint")
class CheckpointConfig:
    """How checkpoints are written and read."""

    async_save: bool = False
    """True: a save copies everything to CPU memory and returns; threads write it beside the steps that follow."""
    verify: bool = True
    """Whether the hash of every file is compared before anything is loaded; False: names and sizes only."""


@section("mocte")
class MocteConfig:
    """The "mocte" block of a DeepSpeed config."""

    modules: str | list[str]
    """Glob or list of globs of the modules (FFNs) that become blocks, e.g. `model.layers.*.mlp`. Required."""
    num_experts: Annotated[int, Field(ge=2, le=1 << 20)] = 4
    """Experts of a block, a multiple of ep_size."""
    ep_size: Count = 1
    """Ranks that share the experts of a block (DeepSpeed's expert parallelism)."""
    total_steps: Count | None = None
    """Optimizer steps of the run; shares of the budget refer to it. Null: the scheduler's total_num_steps."""
    check_every: Annotated[float, Field(gt=0, le=1)] = 0.008
    """Share of the budget between two checks."""
    apply_after: CountOrZero = 1
    """Optimizer steps between a check's measurements and its decisions, in which a thread looks for clusters; 0: none.
    Less than the steps between two checks."""
    probe_tokens: CountOrZero = 0
    """Tokens of the sequences that every check looks at again; 0: 4 x num_experts x freeze.rows, and none where nothing
    freezes."""
    eod_id: CountOrZero | None = None
    """Token id that ends a document; null: every sequence is one document."""
    conflict_every: CountOrZero = 10
    """Checks between two measurements of gradient conflict, a pass to and fro over the probe set; 0: never."""
    auto: bool = True
    """False: no checks; blocks change only by emerge(), freeze() and thaw()."""
    seed: Seed = 0
    """Seed of sampling, and, mixed with each block's path and each bank's number, of tables and random directions."""
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    """What one expert is."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How a token finds its expert."""
    banks: list[RouterConfig] | None = None
    """Several sets of experts, a router each, in place of `router`: a token uses one expert of every bank, whose widths
    add up to the FFN's. Null: one bank with `router`."""
    spectrum: SpectrumConfig = field(default_factory=SpectrumConfig)
    """The distributed sampled SVD."""
    clusters: ClustersConfig = field(default_factory=ClustersConfig)
    """Detection of clusters."""
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    """Freezing of experts."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and loading."""

    def __post_init__(self) -> None:
        if not self.modules or not all(self.modules):
            raise ConfigError('modules must name the FFN modules that become blocks, e.g. "model.layers.*.mlp".')
        if self.num_experts % self.ep_size:
            raise ConfigError(
                f"ep_size = {self.ep_size} does not divide mocte.num_experts = {self.num_experts}; "
                f"allowed: {shown(_divisors(self.num_experts))}."
            )
        if self.num_experts > self.spectrum.rows // 16:
            raise ConfigError(
                f"num_experts = {self.num_experts} is more than spectrum.rows = {self.spectrum.rows} can tell apart "
                f"(16 rows per cluster); raise spectrum.rows to at least {16 * self.num_experts}."
            )
        if self.banks is not None and (not self.banks or self.router != RouterConfig()):
            raise ConfigError("banks holds a router for each bank, at least one; leave mocte.router out then.")
        for number, router in enumerate(self.routers):
            if router.top_k > self.num_experts:
                where = "router" if self.banks is None else f"banks[{number}]"
                raise ConfigError(
                    f"{where}.top_k = {router.top_k} must lie between 1 and mocte.num_experts = {self.num_experts}."
                )

    @classmethod
    def from_dict(cls, block: Mapping[str, Any], world_size: int | None = None) -> "MocteConfig":
        """Check a "mocte" block and fill in its defaults.

        Args:
            block: the block as read from JSON.
            world_size: data-parallel ranks, to check ep_size against.

        Raises:
            ConfigError: unknown key, wrong type, value out of range or a contradiction; names the key and the mend.
        """
        config = parse_section(cls, block)
        if world_size is not None:
            config.check(world_size)
        return config

    def check(self, world_size: int) -> None:
        """Raise ConfigError where ep_size does not divide the data-parallel ranks."""
        if world_size % self.ep_size:
            divisors = shown(_divisors(math.gcd(world_size, self.num_experts)))
            raise ConfigError(
                f"mocte.ep_size = {self.ep_size} does not divide the {world_size} data-parallel ranks; "
                f"allowed with {self.num_experts} experts: {divisors}."
            )

    @property
    def routers(self) -> list[RouterConfig]:
        """One router a bank."""
        return [self.router] if self.banks is None else self.banks

    def to_dict(self) -> dict[str, Any]:
        """The block as plain JSON values, defaults included."""
        return dataclasses.asdict(self)


def _divisors(number: int) -> list[int]:
    """All divisors, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
