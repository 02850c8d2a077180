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

TABLE_LOGIT = 4.0
"""science: +4 ties with a fixed table."""
_PRIOR, _PAIR_ROWS, _DIRECTIONS, _DROPPED = 4.0, 1 << 16, 32, 2


@section("mocte.expert")
class ExpertConfig:
    """What one expert is."""

    kind: Literal["ffn", "lora"] = "ffn"
    """`ffn`: a full FFN that starts as a copy of the dense one. `lora`: a narrow FFN beside the dense one whose output
    starts at zero; the paper's word, it is not a low-rank adapter."""
    width: Count | None = None
    """Hidden units of a `lora` expert. Null: the FFN's width / num_experts. Not for `ffn` experts."""
    redraw: Share = 0.0
    """Share of each expert's hidden units that are re-initialised at emergence, independently for every expert: from a
    normal distribution with the mean and standard deviation of the dense FFN's weights, and with fresh optimizer
    moments. 0: `ffn` experts are copies. 0.5: Drop-Upcycling. 1: experts from scratch; `lora` experts then write from
    the start. Other values than 0 change the model's function at emergence."""

    def __post_init__(self) -> None:
        if self.width is not None and self.kind == "ffn":
            raise ConfigError("width is for kind 'lora'; 'ffn' experts keep the FFN's width. Remove one of the two.")


@section("mocte.router")
class RouterConfig:
    """How a token finds its expert."""

    kind: str = "token"
    """Routing key, which decides a token's expert. `token`: the nearest cluster of its feature. `online`: the
    same by direction, of whitened features, with clusters that follow their tokens after each step. `prefix`: the
    nearest cluster of the mean feature of its document so far. `type`: a table from token ids to clusters. `previous`:
    a random table, looked up with the id of the token before. `pair`: a table from the token before and the token,
    hashed, to clusters; pairs that were not sampled at emergence take the token's own cluster. Baselines: `hash`, a
    random table of the token's own id, `pair-hash`, one of the hashed pair, and `random`, random directions of its
    feature (with `learn`, the router of Switch and of sparse upcycling). Or the name of a key that you have registered
    (docs/extending.md)."""
    directions: Count = _DIRECTIONS
    """Whitened directions of the features that kind `online` reads; with `dropped` at most the features' number."""
    dropped: CountOrZero = _DROPPED
    """Leading directions that kind `online` leaves out: they carry what all tokens share."""
    rows: Annotated[int, Field(ge=1, le=1 << 24)] = _PAIR_ROWS
    """Rows of the table of the kinds `pair` and `pair-hash`. Pairs that share a row share its expert."""
    bias: bool = True
    """Whether the gate made from clusters has a bias. Stock Mixtral has none: false lets a run export to it."""
    weight: Literal["hard", "softmax", "sigmoid", "gain"] = "hard"
    """Factor of an expert's output. `hard`: 1. `softmax`: the expert's probability; for the kinds `token`, `prefix` and
    `random`, or with `learn`. `sigmoid`: the sigmoid of its logit, as in DeepSeek-V3 and Glm4Moe, for kind `random`
    or a table with `learn`; experts are then chosen by the sigmoids plus a fixed number per expert that does not enter
    the weights. `gain`: `kind` chooses as for `hard`, and the factor 2 sigmoid(w h), with a w of the chosen expert that
    is learned and starts at zero, weighs; needs `learn`."""
    learn: bool = False
    """Whether the router is trained. Its logits are then those of `kind` plus W h, where h is the token's feature and W
    starts at zero. Not for `hard`."""
    prior: NotNegative = _PRIOR
    """Logit of the table's expert over the others in a learned router over a table. 0: the table says nothing."""
    learn_prior: bool = False
    """Whether `prior` is where one number per bank starts that is trained with the router."""
    groups: Count | None = None
    """Clusters of a table in a learned router, at most num_experts. Experts are dealt out to them in order, and all
    experts of a token's cluster have the `prior`. Null: a cluster for each expert."""
    top_k: Count = 1
    """Experts per token, at most num_experts. More than one needs `softmax` or `sigmoid`."""
    normalise: bool = False
    """Whether the weights of a token's experts are divided by their sum, as in Mixtral. Needs top_k > 1 or
    `sigmoid`."""
    scale: Positive = 1.0
    """Factor of all weights. Only with `sigmoid`."""
    unit_mean: bool = False
    """Whether weights are divided by their running mean over the global batch (of a token's experts together), so that
    the block's output keeps its scale where a router is not sure. Not for `hard` and not with `normalise`."""
    std: Positive | None = None
    """Standard deviation of the directions of kind `random`, 0.02 for instance. Null: that of Switch, (0.1 / d)^0.5
    with d features. In a learned router over a table: of what W h starts with. Null: it starts at zero."""
    shuffled: bool = False
    """Control for the clusters, with the same loads. For the kinds `type` and `pair` token ids and pairs are reassigned
    at random; for `token` and `prefix` the centroids are random points in the same directions, with prices that
    balance the loads."""
    aux: NotNegative = 0.01
    """Weight of Switch's loss for even loads of a trained router. The engine adds it to the model's loss."""
    balance_rate: NotNegative = 0.0
    """Loss-free balance: what each expert's number in the choice moves by after each optimizer step, up where the
    expert had fewer tokens of the global batch than the mean and down where it had more. Only with `sigmoid` or kind
    `online`; DeepSeek used 0.001, short runs need 0.01. Give aux = 0 with it."""
    rate: Positive = 1.0
    """Factor of the learning rate of a trained router, which has no weight decay. Switch and mixtures from scratch are
    steadier with 0.1 to 0.3."""

    def __post_init__(self) -> None:
        key = KEYS.get(self.kind, "kind")
        if not key.has_logits and self.weight == "softmax" and not self.learn:
            raise ConfigError(
                f"weight 'softmax' needs logits, which kind '{self.kind}' does not have; use kind 'token', 'prefix' or "
                "'random', weight 'hard', or learn true."
            )
        over_table = self.learn and self.weight != "gain" and "prior" in key.settings
        if self.weight == "sigmoid" and not key.by_chance and not over_table:
            raise ConfigError(
                f"weight 'sigmoid' is for kind 'random' and for tables with learn, not for '{self.kind}'."
            )
        if self.weight == "gain" and (not self.learn or self.top_k > 1 or self.unit_mean):
            raise ConfigError("weight 'gain' is a learned factor of one expert: it needs learn, top_k 1, no unit_mean.")
        if (self.prior != _PRIOR or self.learn_prior or self.groups is not None) and not over_table:
            raise ConfigError("prior, learn_prior and groups are for a table in a router that learns to choose.")
        if self.scale != 1.0 and self.weight != "sigmoid":
            raise ConfigError(f"scale = {self.scale} must be positive, and 1 without weight 'sigmoid'.")
        if self.learn and self.weight == "hard":
            raise ConfigError("learn needs weight 'softmax' or 'sigmoid': a weight of 1 gives the router no gradient.")
        if self.top_k > 1 and self.weight == "hard":
            raise ConfigError(f"top_k = {self.top_k} needs weight 'softmax' or 'sigmoid': experts share a token.")
        if self.normalise and self.top_k == 1 and self.weight != "sigmoid":
            raise ConfigError("normalise is for top_k > 1; for one expert it is the weight 'hard'.")
        if self.unit_mean and (self.weight == "hard" or self.normalise):
            raise ConfigError(
                "unit_mean is for weights that differ from token to token in sum: not for weight 'hard', "
                "not with normalise."
            )
        if self.shuffled and not key.of_sample:
            raise ConfigError(f"shuffled is for clusters, and kind '{self.kind}' has none.")
        if (self.directions, self.dropped) != (_DIRECTIONS, _DROPPED) and "dropped" not in key.settings:
            raise ConfigError(f"directions and dropped are for kind 'online', not for '{self.kind}'.")
        if self.rows != _PAIR_ROWS and "rows" not in key.settings:
            raise ConfigError(f"rows = {self.rows} is for the kinds 'pair' and 'pair-hash', not for '{self.kind}'.")
        if self.std is not None and self.kind != "random" and not over_table:
            raise ConfigError(f"std = {self.std} is for kind 'random' and learned tables, not for '{self.kind}'.")
        if self.balance_rate and self.weight != "sigmoid" and not key.moves:
            raise ConfigError(
                f"balance_rate = {self.balance_rate} needs weight 'sigmoid' or kind 'online', whose choice has a "
                "number for each expert; for 'softmax' use aux."
            )
        if self.rate != 1.0 and not self.learn:
            raise ConfigError(f"rate = {self.rate} is for a router that learns; set learn true or remove it.")


MOST_ROWS = 1 << 24
"""Largest sample: the ranks keep it in memory, once for each block."""


@section("mocte.spectrum")
class SpectrumConfig:
    """The singular directions of the features, from a sample over all ranks."""

    rank: Annotated[int, Field(ge=1, le=1 << 16)] = 8
    """Number of singular directions that are computed."""
    rows: Annotated[int, Field(ge=16, le=MOST_ROWS)] = 2048
    """Token features sampled over all ranks for one check."""
    documents: Annotated[int, Field(ge=16, le=MOST_ROWS)] = 1024
    """Document means sampled over all ranks for one check."""
    doublings: Annotated[int, Field(ge=0, le=16)] = 2
    """How many times the sample may double while a block in warm-up has fewer than min_rank reliable directions. `rows`
    doubled that many times must not exceed 2^24."""
    min_rank: Count = 4
    """Reliable directions that a gate should be made of."""
    max_angle: Share = 0.3
    """Directions are reliable while the sine of the largest angle between those of the two halves of the sample is at
    most this."""

    def __post_init__(self) -> None:
        if self.rows << self.doublings > MOST_ROWS:
            allowed = (MOST_ROWS // self.rows).bit_length() - 1
            raise ConfigError(
                f"doublings = {self.doublings} makes more than {MOST_ROWS} rows of spectrum.rows = {self.rows}; with "
                f"so many rows it can be {allowed} at most."
            )


@section("mocte.clusters")
class ClustersConfig:
    """When clusters count as detected, and experts emerge."""

    method: Literal["dbscan", "hdbscan"] = "dbscan"
    """Method that looks for clusters of documents."""
    min_silhouette: Annotated[float, Field(ge=-1, le=1)] = 0.35
    """Silhouette from which clusters count as found (the paper's alpha_c)."""
    stability: Share = 0.6
    """Adjusted Rand index from which the clusters of two checks in a row count as the same, on the documents of the
    later check."""
    deadline: Share = 0.1
    """Share of the budget at which experts emerge even if no clusters were detected. 1: never without clusters. 0, with
    not_before 0: at the first check, or, if no router needs features (kinds `random`, `hash`, `pair-hash` and
    `previous`), before the first step."""
    not_before: Share = 0.02
    """Share of the budget before which no experts emerge (the learning rate's warm-up)."""


@section("mocte.freeze.prefix")
class PrefixConfig:
    """Freezing of the model's first layers by a schedule, whatever the experts' policy decides."""

    layers: CountOrZero = 0
    """Number of layers that freeze, counted from the input; the embeddings freeze with the first. 0: none."""
    start: Share = 0.3
    """Share of the budget at which the first layer freezes."""
    end: Share = 0.6
    """Share of the budget at which the last one freezes; the others are spread evenly in between. A layer with a block
    waits until all its experts are frozen, and all later layers wait with it."""

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ConfigError(f"end = {self.end} is before start = {self.start}.")


@section("mocte.freeze")
class FreezeConfig:
    """Which experts stop training, and when."""

    policy: str = "trainability"
    """Rule that freezes an expert; lambda is its trainability. `trainability`: lambda is low (alpha) and steady (beta).
    `progress`: the expert no longer lowers the loss (gamma) and lambda is steady (beta). `paper`: low or steady, on
    single measurements. Controls: `grad-norm`, a low gradient norm (alpha); `inverted`, lambda high and still changing;
    `random`, at a random time. `off`: nothing freezes. Or the name of a policy that you have registered
    (docs/extending.md)."""
    alpha: NotNegative = 0.2
    """Lambda is low when it is below this fraction of the expert's peak (`paper`: of the largest in the block)."""
    beta: NotNegative = 0.05
    """Lambda is steady when |lambda - lambda_0| changes between two checks by less than this fraction of its largest
    (`paper`: its first) value; lambda_0 is the first measurement."""
    gamma: NotNegative = 0.5
    """`progress` freezes an expert that contributes less than this fraction of its fair part (one in num_experts) to
    the fall of the loss."""
    checks: Count = 3
    """Consecutive checks at which the rule must hold. `paper` and `random` need one."""
    after_checks: Count = 5
    """Measurements of an expert since emergence that must exist before it can freeze."""
    until: Share = 0.9
    """Share of the budget after which no expert freezes (the learning rate's decay)."""
    anneal: Share = 0.0
    """Share of the budget over which an expert's learning rate falls to zero before it freezes. 0: none, it freezes at
    once."""
    rows: Annotated[int, Field(ge=16, le=MOST_ROWS)] = 256
    """Tokens of an expert that its trainability is measured on. An expert that got fewer is not measured."""
    iterations: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Iterations of the eigenvalue solver per measurement."""
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    """Freezing of the model's first layers."""

    def __post_init__(self) -> None:
        if self.policy != OFF:
            POLICIES.get(self.policy, "policy")


@section("mocte.checkpoint")
class CheckpointConfig:
    """How checkpoints are written and read."""

    async_save: bool = False
    """Whether a save returns once everything is copied to CPU memory, and threads write the files during the next
    steps."""
    verify: bool = True
    """Whether the hash of every file is checked before anything is loaded. False: only names and sizes are."""


@section("mocte")
class MocteConfig:
    """The "mocte" block of a DeepSpeed config."""

    modules: str | list[str]
    """Glob, or list of globs, of the FFN modules that become blocks, e.g. `model.layers.*.mlp`."""
    num_experts: Annotated[int, Field(ge=2, le=1 << 20)] = 4
    """Experts per bank; a multiple of ep_size, and at most spectrum.rows / 16."""
    ep_size: Count = 1
    """Ranks that share the experts of a block (DeepSpeed's expert parallelism); divides the data-parallel ranks."""
    total_steps: Count | None = None
    """Optimizer steps of the run: the budget that all shares refer to. Null: the scheduler's total_num_steps."""
    check_every: Annotated[float, Field(gt=0, le=1)] = 0.008
    """Share of the budget between two checks."""
    apply_after: CountOrZero = 1
    """Optimizer steps from a check's measurements to its decisions, during which a thread looks for clusters. 0: the
    step waits for it. A value that reaches the next check is lowered."""
    probe_tokens: CountOrZero = 0
    """Size in tokens of the probe set, the sequences that every check reads again. 0: 4 x num_experts x freeze.rows, or
    none if nothing freezes."""
    eod_id: CountOrZero | None = None
    """Id of the token that ends a document. Null: every sequence is one document."""
    conflict_every: CountOrZero = 10
    """Checks between two measurements of gradient conflict, each a forward and backward pass over the probe set. 0:
    never."""
    auto: bool = True
    """Whether checks run. False: blocks change only by emerge(), freeze() and thaw()."""
    seed: Seed = 0
    """Seed of the sampling, of random tables and of random directions. Every bank of every block derives its own from
    it."""
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    """What one expert is."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How a token finds its expert."""
    banks: list[RouterConfig] | None = None
    """One router per bank, in place of `router`: B banks are B sets of experts with 1/B of the FFN's hidden units each,
    and a token uses each bank's choice. Null: one bank with `router`."""
    spectrum: SpectrumConfig = field(default_factory=SpectrumConfig)
    """Singular directions of the features."""
    clusters: ClustersConfig = field(default_factory=ClustersConfig)
    """When experts emerge."""
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    """Which experts stop training, and when."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How checkpoints are written and read."""

    def __post_init__(self) -> None:
        if not self.modules or not all(self.modules):
            raise ConfigError('modules must name the FFN modules that become blocks, e.g. "model.layers.*.mlp".')
        if self.num_experts % self.ep_size:
            raise ConfigError(
                f"ep_size = {self.ep_size} does not divide mocte.num_experts = {self.num_experts}; "
                f"allowed: {shown(divisors(self.num_experts))}."
            )
        if self.num_experts > self.spectrum.rows // 16:
            raise ConfigError(
                f"num_experts = {self.num_experts} is more than spectrum.rows = {self.spectrum.rows} can tell apart "
                f"(16 rows per cluster); raise spectrum.rows to at least {16 * self.num_experts}."
            )
        if self.banks is not None and (not self.banks or self.router != RouterConfig()):
            raise ConfigError("banks holds a router for each bank, at least one; leave mocte.router out then.")
        for number, router in enumerate(self.routers):
            for name, value in (("top_k", router.top_k), ("groups", router.groups or 1)):
                if value > self.num_experts:
                    where = "router" if self.banks is None else f"banks[{number}]"
                    raise ConfigError(
                        f"{where}.{name} = {value} must lie between 1 and mocte.num_experts = {self.num_experts}."
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
            allowed = shown(divisors(math.gcd(world_size, self.num_experts)))
            raise ConfigError(
                f"mocte.ep_size = {self.ep_size} does not divide the {world_size} data-parallel ranks; "
                f"allowed with {self.num_experts} experts: {allowed}."
            )

    @property
    def routers(self) -> list[RouterConfig]:
        """One router per bank."""
        return [self.router] if self.banks is None else self.banks

    def to_dict(self) -> dict[str, Any]:
        """The block as plain JSON values, defaults included."""
        return dataclasses.asdict(self)


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
