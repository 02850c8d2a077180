"""The "mocte" block of a DeepSpeed config: every field documented, defaulted and checked before any work starts."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from mocte_ds.errors import ConfigError
from mocte_ds.registry import OFF, POLICIES
from mocte_ds.router_config import RouterConfig
from mocte_ds.sections import Count, CountOrZero, NotNegative, Positive, Seed, Share, parse_section, section
from mocte_ds.shown import shown


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


MOST_ROWS = 1 << 24
"""Largest sample: the ranks keep it in memory, once for each block."""
# The thresholds are those of Modular Adaptive Training (arXiv 2405.07527).
_PAPER: dict[str, dict[str, Any]] = {
    "router": {"kind": "token"},
    "freeze": {"policy": "paper", "alpha": 0.1, "beta": 0.001, "checks": 1},
}


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
    """Glob, or list of globs, of the FFN modules that become blocks, e.g. `model.layers.*.mlp`. Where a layer calls the
    matrices of its FFN itself, the first of them: `model.decoder.layers.*.fc1` of OPT. `auto`: every FFN in the layers
    of the model, found by its shape and told in the log."""
    preset: Literal["default", "paper"] = "default"
    """Where the keys that are left out come from. `default`: this page. `paper`: the published rules, `token` as the
    router's kind and policy `paper` with alpha 0.1 and beta 0.001."""
    num_experts: Annotated[int, Field(ge=2, le=1 << 20)] = 4
    """Experts per bank; a multiple of ep_size, and at most spectrum.rows / 16."""
    ep_size: Count = 1
    """Ranks that share the experts of a block (DeepSpeed's expert parallelism); divides the ranks of the run."""
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
    """Checks between two measurements of gradient conflict, each a forward and backward pass over the probe set; the
    check before each also reads the features of emerged blocks. 0: never; these are read at every tenth check."""
    log: str | None = None
    """Folder of the run's logs, as by engine.mocte.log_to (docs/watch.md). Null: none, or that of MocteTrainer. Not in
    run files, whose logs lie in --out."""
    peak_tflops: Positive | None = None
    """Peak of one device in TFLOP/s, for the type that the model computes in: logs then have the model FLOPs
    utilisation, `mfu` (docs/watch.md). Null: that of a GPU that is known by its name. Not in run files, which have
    `watch.peak_tflops`."""
    skip_nonfinite: CountOrZero = 0
    """How many optimizer steps in a row are skipped, as if their batches had never been read, because the loss or the
    gradient is NaN or infinite (docs/watch.md). One more raises NonFiniteLoss. 0: DeepSpeed's way; it drops a gradient
    that is not finite and counts the step. Not in run files, which have `watch.skip_nonfinite`."""
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
        if self.log == "":
            raise ConfigError('log = "" must name a folder, e.g. "runs/mine"; null: no logs.')
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
            if (router.groups or self.num_experts) < self.num_experts and router.std is None:
                raise ConfigError(
                    f"router.groups = {router.groups} without router.std: the experts of a group would have the same "
                    "logit at birth, and its first ones get every token; give std, e.g. 0.02."
                )

    @classmethod
    def from_dict(cls, block: Mapping[str, Any], world_size: int | None = None) -> "MocteConfig":
        """Check a "mocte" block and fill in its defaults.

        Args:
            block: the block as read from JSON.
            world_size: ranks of the run, to check ep_size against.

        Raises:
            ConfigError: unknown key, wrong type, value out of range or a contradiction; names the key and the mend.
        """
        config = parse_section(cls, _with_preset(block))
        if world_size is not None:
            config.check(world_size)
        return config

    def check(self, world_size: int) -> None:
        """Raise ConfigError where ep_size does not divide the ranks of the run."""
        if world_size % self.ep_size:
            allowed = shown(divisors(math.gcd(world_size, self.num_experts)))
            raise ConfigError(
                f"mocte.ep_size = {self.ep_size} does not divide the {world_size} ranks of the run; "
                f"allowed with {self.num_experts} experts: {allowed}."
            )

    @property
    def routers(self) -> list[RouterConfig]:
        """One router per bank."""
        return [self.router] if self.banks is None else self.banks

    def to_dict(self) -> dict[str, Any]:
        """The block as plain JSON values, defaults included."""
        return dataclasses.asdict(self)


def _with_preset(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """A block with its preset's values for the keys that it leaves out."""
    preset = _PAPER if block.get("preset") == "paper" else {}
    sections = {name: block.get(name) or {} for name in preset if name != "router" or block.get("banks") is None}
    return {**block, **{name: {**preset[name], **keys} for name, keys in sections.items() if isinstance(keys, Mapping)}}


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
