"""The router sections of the "mocte" block: which settings of a bank's router there are, and which go together."""

from typing import Annotated, Literal

from pydantic import Field

from mocte_ds.errors import ConfigError
from mocte_ds.registry import KEYS
from mocte_ds.sections import Count, CountOrZero, NotNegative, Positive, Share, section

_PRIOR, _PAIR_ROWS, _DIRECTIONS, _DROPPED, _CENTROID_RATE, _AUX = 4.0, 1 << 16, 32, 2, 0.01, 0.01


@section("mocte.router")
class RouterConfig:
    """How a token finds its expert."""

    kind: str = "type"
    """Routing key, which decides a token's expert. `type`: the cluster of its id's mean feature, a table; needs a model
    that is called with `input_ids`. `token`: the nearest cluster of its own feature, for any model. `online`: the
    same by direction, of whitened features, with clusters that follow their tokens after each step. `prefix`: the
    nearest cluster of the mean feature of its document so far. `document`: the cluster of documents for which the ids
    of its document so far speak most. `previous`: a random table, looked up with the id of the token before. `pair`: a
    table from the token before and the token, hashed, to clusters; where nothing was sampled of a pair's row, the
    token's own cluster. Baselines: `hash`, a random table of the token's own id, `pair-hash`, one of the hashed pair,
    and `random`, random directions of its feature (with `learn`, the router of Switch and of sparse upcycling). Or the
    name of a key that you have registered (docs/extending.md)."""
    directions: Count = _DIRECTIONS
    """Whitened directions of the features that kind `online` reads; with `dropped` at most the features' number."""
    dropped: CountOrZero = _DROPPED
    """Leading directions that kind `online` leaves out: they carry what all tokens share."""
    rows: Annotated[int, Field(ge=1, le=1 << 24)] = _PAIR_ROWS
    """Rows of the table of the kinds `pair` and `pair-hash`. Pairs that share a row share its expert: with many times
    the rows of the sample's pairs few pairs that were not sampled fall on one that was."""
    centroid_rate: Share = _CENTROID_RATE
    """Part of the way to the mean of their tokens that the centroids of kind `online` go in an optimizer step. 0: they
    stand."""
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
    """Logit of the table's expert over the others in a learned router over a table. 0 says
    nothing of them and needs `std`."""
    learn_prior: bool = False
    """Whether `prior` is where one number per bank starts that is trained with the router."""
    groups: Count | None = None
    """Clusters of a table in a learned router, at most num_experts. Experts are dealt out to them in order, and all
    experts of a token's cluster have the `prior`; fewer groups than experts need `std`. Null: a cluster for each
    expert."""
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
    with d features. In a learned router over a table: of what W h starts with, which tells experts apart where the
    prior does not. Null: it starts at zero."""
    shuffled: bool = False
    """Control for the clusters, with the same loads. For the kinds `type` and `pair` token ids and pairs are reassigned
    at random, for `document` the scores of the ids; for `token` and `prefix` the centroids are random points in the
    same directions, with prices that balance the loads."""
    aux: NotNegative = _AUX
    """Weight of Switch's loss for even loads of a trained router. The engine adds it to the model's loss.
    Weight `gain` has none."""
    balance_rate: NotNegative = 0.0
    """Loss-free balance: what each expert's number in the choice moves by after each optimizer step, up where the
    expert had fewer tokens of the global batch than the mean and down where it had more. Only with `sigmoid` or kind
    `online`; DeepSeek used 0.001, short runs need 0.01. Give aux = 0 with it."""
    rate: Positive = 1.0
    """Factor of the learning rate of a trained router, which has no weight decay. Published routers have 0.1 to 1;
    in short runs a slow router hardly leaves its start (docs/results/tuned.md)."""

    @property
    def learns_choice(self) -> bool:
        """Whether training changes which expert a token goes to, and not its factor alone."""
        return self.learn and self.weight != "gain"

    def __post_init__(self) -> None:
        key = KEYS.get(self.kind, "kind")
        if not key.has_logits and self.weight == "softmax" and not self.learn:
            raise ConfigError(
                f"weight 'softmax' needs logits, which kind '{self.kind}' does not have; use kind 'token', 'prefix' or "
                "'random', weight 'hard', or learn true."
            )
        if key.moves and self.weight not in ("hard", "gain"):
            raise ConfigError(
                f"weight '{self.weight}' is not for kind '{self.kind}': its logits are moved by loads, not by the "
                "loss. Use 'hard' or 'gain'."
            )
        if key.moves and not self.bias:
            raise ConfigError(f"bias = false is not for kind '{self.kind}', which always has one; remove it.")
        taken = key.taken()
        over_table = self.learns_choice and "prior" in taken
        if self.weight == "sigmoid" and not key.by_chance and not over_table:
            raise ConfigError(
                f"weight 'sigmoid' is for kind 'random' and for tables with learn, not for '{self.kind}'."
            )
        if self.weight == "gain" and (not self.learn or self.top_k > 1 or self.unit_mean):
            raise ConfigError("weight 'gain' is a learned factor of one expert: it needs learn, top_k 1, no unit_mean.")
        if (self.prior != _PRIOR or self.learn_prior or self.groups is not None) and not over_table:
            raise ConfigError("prior, learn_prior and groups are for a table in a router that learns to choose.")
        if over_table and self.prior == 0 and self.std is None:
            raise ConfigError(
                "prior = 0 without std: all experts would have the same logit at birth, and the first ones get every "
                "token; give std, e.g. 0.02."
            )
        if over_table and self.shuffled and self.prior == 0 and not self.learn_prior:
            raise ConfigError("shuffled changes a table, of which prior = 0 without learn_prior uses nothing.")
        if self.weight == "gain" and self.aux not in (0, _AUX):
            raise ConfigError(f"aux = {self.aux} is for routers that learn to choose; weight 'gain' has no such loss.")
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
        if (self.directions, self.dropped) != (_DIRECTIONS, _DROPPED) and "dropped" not in taken:
            raise ConfigError(f"directions and dropped are for kind 'online', not for '{self.kind}'.")
        if self.centroid_rate != _CENTROID_RATE and "centroid_rate" not in taken:
            raise ConfigError(f"centroid_rate is for kind 'online', not for '{self.kind}'.")
        if self.rows != _PAIR_ROWS and "rows" not in taken:
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
