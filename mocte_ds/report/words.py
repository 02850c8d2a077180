"""What a reader needs to know who has only the page: what MO-CTE is, and what its words mean."""

INTRODUCTION = (
    "MO-CTE (Mixture of Cluster-Oriented, Trainability-aware Experts) is a way to pre-train a language model. The "
    "model starts dense. While it trains, the singular spectrum of its features is watched at regular checks; when "
    "documents fall into stable clusters there, the feed-forward network (FFN) of a layer is copied into several "
    "experts, and every token goes to the expert of its cluster. From then on the experts differ. An expert whose "
    "Jacobian says that it has little left to learn is frozen: its weight gradients and its optimizer state are no "
    "longer needed. Everything on this page is computed from the log that the run wrote while it trained."
)

STAGES = (
    ("warm-up", "The layer runs its dense FFN. Its experts are dormant and cost nothing."),
    (
        "check",
        "Every small part of the budget: singular directions of sampled features, clusters of documents in them.",
    ),
    (
        "emergence",
        "Stable clusters, or a deadline. The experts start as copies of the FFN, so the loss need not jump.",
    ),
    ("specialising", "Every token passes through one expert, chosen by the cluster that its feature is nearest to."),
    ("freezing", "Experts with little left to learn stop, and their optimizer state is freed."),
)

WORDS = (
    ("block", "A layer's FFN with its experts. A model has blocks in some of its layers."),
    ("expert", "One of several networks of a block; a token passes through one of them."),
    ("emergence", "The moment when a block's experts take over from its dense FFN."),
    (
        "trainability λ",
        "Largest eigenvalue of the expert's neural-tangent kernel: how much its outputs can still be moved by "
        "training it.",
    ),
    ("freeze, thaw", "An expert stops training and its optimizer state is freed; or it starts again, at most once."),
    ("domain", "The source of a document, known to the report and not to the method."),
    (
        "clusters K, noise",
        "Number of dense groups of documents that were found, and the share of documents in none of them.",
    ),
    ("silhouette", "From -1 to 1: how much nearer documents are to their own cluster than to the next one."),
    ("stability", "Agreement of the clusters with those of the check before (adjusted Rand index; 1: the same)."),
    (
        "NMI, purity",
        "Agreement of clusters with domains, from 0 to 1 (normalised mutual information; share of documents that "
        "are of their cluster's most frequent domain).",
    ),
    ("nat", "Unit of the loss, per token; perplexity is exp(loss)."),
)
