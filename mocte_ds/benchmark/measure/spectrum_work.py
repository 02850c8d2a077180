"""FLOPs, collectives' bytes and memory of sampling, SVD, certificate and clustering, by formula."""

from dataclasses import dataclass

from mocte_ds.benchmark.measure.parts import Work
from mocte_ds.benchmark.measure.run_plan import RunPlan
from mocte_ds.spectrum.subspace import COLD_PASSES, OVERSAMPLING, WARM_PASSES

FORMULAS = {
    "sampling": "FLOPs 2 t d L; held 4 L d (n' + m') + 32 n' + 24 m'; moved 8 (n' + m'), the keys; n' = min(N, 4 N / "
    "ranks + 64) of N = 2^doublings n rows that may be wanted, m' of m documents likewise",
    "svd": "q = r + 8, P passes (5 cold, 1 warm): FLOPs 4 n d q P L + 2 n d q (P + 1) L; moved L (8 (d + 3) + "
    "4 d q P + 8 (q (P + 1))^2); held 28 L d q (P + 1)",
    "certificate": "two halves of every sample, cold: svd with 2 L and n / 2; in warm-up it may be repeated on doubled "
    "samples, which is not counted",
    "documents_svd": "svd with m rows, one warm pass; FLOPs + 2 m d r L; moved + 4 m r L, the coordinates",
    "token_coordinates": "FLOPs 2 n d r L; moved 4 n r L",
    "token_line": "seconds as n^2 C; held 8 n^2 where all tokens are neighbours",
    "detect": "FLOPs 3 m^2 r C; seconds as m^2 C",
    "balanced_kmeans": "FLOPs 40 m E r C (20 iterations); seconds as m E C",
    "agreement": "seconds as m C",
    "letters": "L blocks, n rows, m documents, d features, r directions, E experts, t tokens offered by a rank, "
    "C blocks whose documents it clusters; n and m of all ranks, of which a rank holds a part only: an upper bound",
}
# Blocks of all passes in fp32, and three times in fp64 while they are made orthonormal.
_BYTES_A_BASIS_ENTRY = 28


@dataclass(frozen=True)
class SpectrumSizes:
    """What the cost of a check's spectrum and clusters depends on, on one rank."""

    d: int
    layers: int
    """Blocks."""
    rows: int
    """Token features of all ranks."""
    documents: int
    """Document means of all ranks."""
    rank: int
    """Singular directions."""
    experts: int
    context: int
    """Tokens of a sequence."""
    sequences: int
    """Of a micro-batch."""
    offered: int
    """Tokens that each block offers to the sample for one check, on one rank."""
    clustered: int
    """Blocks whose documents one rank clusters."""
    doublings: int = 0
    """The sample of tokens may be doubled so often, and so many more rows are kept."""
    ranks: int = 1

    def kept(self, rows: int) -> int:
        """Rows of ``rows`` over all ranks that one rank keeps (see Reservoir)."""
        return min(rows, 4 * -(-rows // self.ranks) + 64)

    @classmethod
    def of(cls, plan: RunPlan) -> "SpectrumSizes":
        """Those of a run."""
        spectrum = plan.config.spectrum
        return cls(
            d=plan.sizes.hidden_size,
            layers=plan.blocks,
            rows=spectrum.rows,
            documents=spectrum.documents,
            rank=min(spectrum.rank, plan.sizes.hidden_size),
            experts=plan.config.num_experts,
            context=plan.context,
            sequences=plan.micro_batch,
            offered=plan.tokens_per_step // plan.ranks * plan.window,
            clustered=-(-plan.blocks // plan.ranks),
            doublings=spectrum.doublings,
            ranks=plan.ranks,
        )


def spectrum_work(s: SpectrumSizes) -> dict[str, Work]:
    """The work of every part, in the order of a check; see FORMULAS."""
    coordinates = Work(0, 2.0 * s.layers * s.documents * s.d * s.rank, 4 * s.layers * s.documents * s.rank, 0)
    rows, documents = s.kept(s.rows << s.doublings), s.kept(s.documents)
    held = 4 * s.layers * s.d * (rows + documents) + 32 * rows + 24 * documents
    pairs = s.clustered * s.documents
    return {
        "sampling": Work(
            float(s.offered * s.layers * s.d), 2.0 * s.offered * s.layers * s.d, 8 * (rows + documents), held
        ),
        "svd_cold": svd_work(s.layers, s.rows, s.d, s.rank, COLD_PASSES),
        "svd_warm": svd_work(s.layers, s.rows, s.d, s.rank, WARM_PASSES),
        "certificate": svd_work(2 * s.layers, s.rows / 2, s.d, s.rank, COLD_PASSES),
        "token_coordinates": Work(
            2.0 * s.layers * s.rows * s.d * s.rank,
            2.0 * s.layers * s.rows * s.d * s.rank,
            4 * s.layers * s.rows * s.rank,
            4 * s.rows * s.d,
        ),
        "documents_svd_cold": _sum(svd_work(s.layers, s.documents, s.d, s.rank, COLD_PASSES), coordinates),
        "documents_svd": _sum(svd_work(s.layers, s.documents, s.d, s.rank, WARM_PASSES), coordinates),
        "detect": Work(
            float(pairs * s.documents), 3.0 * pairs * s.documents * s.rank, 0, 8 * s.documents * s.documents
        ),
        "balanced_kmeans": Work(
            float(pairs * s.experts), 40.0 * pairs * s.experts * s.rank, 0, 40 * s.documents * s.experts
        ),
        "agreement": Work(float(pairs), 0.0, 0, 0),
        "token_line": Work(float(s.clustered * s.rows * s.rows), 0.0, 0, 8 * s.rows * s.rows),
    }


def svd_work(layers: int, rows: float, d: int, rank: int, passes: int) -> Work:
    """One call of sampled_svd; its seconds are taken to be proportional to its FLOPs."""
    q = min(rank + OVERSAMPLING, d)
    columns = min(q * (passes + 1), d)  # the basis cannot have more columns than there are features
    used = -(-(columns - q) // q)
    flops = layers * (4.0 * rows * d * q * used + 2.0 * rows * d * columns)
    moved = layers * (8 * (d + 3) + 4 * d * (columns - q) + 8 * columns**2)
    return Work(flops, flops, moved, _BYTES_A_BASIS_ENTRY * layers * d * columns)


def peak_bytes(s: SpectrumSizes, store_bytes: int) -> int:
    """Largest memory of a measurement: all blocks' features, or what replaces them later, and the work beside them."""
    work = spectrum_work(s)
    one = s.rows * s.d
    # A layer in fp32 where the store is bf16; its finite entries, its squares in fp64.
    beside = one * ((4 if store_bytes < 4 else 0) + 9) + work["certificate"].held_bytes
    tokens = s.layers * one * store_bytes + beside
    documents = s.layers * s.documents * s.d * store_bytes + 13 * s.documents * s.d + work["svd_cold"].held_bytes
    batch = s.sequences * s.context * (s.d + 2)
    blocks = min(s.layers, 4) + 1  # so many are timed; one is copied
    sampling = 4 * (blocks * s.d * ((s.rows << s.doublings) + s.documents) + 5 * batch)
    return max(tokens, documents, sampling, work["token_line"].held_bytes) + work["detect"].held_bytes


def _sum(one: Work, other: Work) -> Work:
    moved, held = one.moved_bytes + other.moved_bytes, one.held_bytes + other.held_bytes
    return Work(one.units + other.flops, one.flops + other.flops, moved, held)
