"""What a reader needs to know who has only the page: what MO-CTE is, and what its words mean."""

INTRODUCTION = (
    "MO-CTE (Mixture of Cluster-Oriented, Trainability-aware Experts) is a way to pre-train a language model. The "
    "model starts dense: every token passes through all of it. While it trains, what its layers make of the text "
    "(their features) is looked at in regular checks. When documents fall into stable clusters there, the "
    "feed-forward network (FFN) of a layer is copied into several experts, and every token goes to the expert of its "
    "cluster. From then on the experts differ. An expert that has little left to learn is frozen: its weight "
    "gradients and its optimizer state are no longer needed. Everything on this page is computed from the logs that "
    "the run wrote while it trained."
)

STAGES = (
    ("warm-up", "The layer runs its dense FFN. Its experts are dormant and cost nothing."),
    (
        "check",
        "Every small part of the budget: singular directions of sampled features, clusters of documents in them.",
    ),
    (
        "emergence",
        "Stable clusters, or a deadline. The experts start as copies of the FFN (or as additions of zero), so the loss "
        "need not jump.",
    ),
    ("specialising", "Every token passes through one expert, chosen by the cluster that its feature is nearest to."),
    ("freezing", "Experts with little left to learn stop, and their optimizer state is freed."),
)

WORDS = (
    ("token", "A piece of text, a word or a part of one: what the model reads and predicts."),
    ("step, budget", "One update of the weights; all the updates that the run is meant to make."),
    ("block", "A layer's FFN with its experts. A model has blocks in some of its layers."),
    ("expert", "One of several networks of a block; a token passes through one of them."),
    ("feature", "The vector that a token has at the input of a block; that of a document is the mean of its tokens'."),
    ("singular direction", "A direction in which features differ most from each other, the strongest first."),
    ("emergence", "The moment when a block's experts take over from its dense FFN."),
    (
        "trainability λ",
        "Largest eigenvalue of the expert's neural-tangent kernel: how much its outputs can still be moved by "
        "training it.",
    ),
    ("freeze, thaw", "An expert stops training and its optimizer state is freed; or it starts again, at most once."),
    (
        "prefix",
        "The front of the model: its embeddings and first layers. An option freezes it from below; then no gradient is "
        "computed through it at all.",
    ),
    ("domain", "The source of a document, known to the report and not to the method."),
    ("clusters K", "Number of dense groups of documents that a check found."),
    ("silhouette", "From -1 to 1: how much nearer documents are to their own cluster than to the next one."),
    ("stability", "Agreement of the clusters with those of the check before (adjusted Rand index; 1: the same)."),
    (
        "NMI, purity",
        "Agreement of clusters with domains, from 0 to 1 (normalised mutual information; share of documents that "
        "are of their cluster's most frequent domain). The purity of a domain: the share of its tokens that go to the "
        "expert that gets most of them.",
    ),
    ("load, max/mean", "Tokens that an expert gets; the busiest expert's load over the mean. 1: all get the same."),
    (
        "optimizer state",
        "What the optimizer keeps for every weight that trains: a precise copy and two running means (moments).",
    ),
    ("rank", "One of the processes that train together; each keeps a part of the optimizer state."),
    ("FLOP", "One floating-point operation; a multiplication and an addition count as two."),
    ("nat, perplexity", "Unit of the loss, per token; perplexity is exp(loss), as if the model chose among so many."),
    ("n", "Sample size; below every figure."),
)
