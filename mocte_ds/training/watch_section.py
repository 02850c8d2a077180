"""The section `watch` of a run file."""

from mocte_ds.errors import ConfigError
from mocte_ds.sections import CountOrZero, NotNegative, Positive, section


@section("watch")
class WatchSection:
    """What watches the run while it goes on, see docs/watch.md. Nothing here changes what is learned, except that
    batches whose loss or gradient is not finite may be passed over."""

    stalled_after: NotNegative = 300.0
    """Seconds that a rank may stand in one phase of a step (the forward or backward pass of one micro-batch, an
    exchange, the optimizer) before the run ends with a message that names rank, host and phase. 0: no watchdog."""
    long_phases: Positive = 1800.0
    """Seconds for the phases that may take long: the first step, checks, validations, checkpoints."""
    loss_spike: NotNegative = 6.0
    """Deviations above the median of the last 32 losses from which on a loss is logged as a spike. 0: none is."""
    skip_nonfinite: CountOrZero = 0
    """How many optimizer steps in a row are skipped, as if their batches had never been read, because the loss or the
    gradient is NaN or infinite. One more ends the run as `leave_out` says. 0: the first one does."""
    leave_out: CountOrZero = 0
    """How many batches a run may leave out because their loss or gradient is NaN or infinite: it ends, and the next
    start goes on from the last good checkpoint without them, and without those that were skipped just before. 0: none;
    the user has to decide."""
    peak_tflops: Positive | None = None
    """Peak of one device in TFLOP/s, for the type that the model computes in: metrics.jsonl then has the model FLOPs
    utilisation, `mfu` (docs/watch.md). Null: that of a GPU that is known by its name."""
    prometheus: bool = False
    """Whether metrics.prom in the run's folder holds the latest numbers for Prometheus' node exporter."""

    def __post_init__(self) -> None:
        if 0 < self.leave_out <= self.skip_nonfinite:
            raise ConfigError(
                f"leave_out = {self.leave_out} is too small for skip_nonfinite = {self.skip_nonfinite}: a run that "
                f"goes back leaves {self.skip_nonfinite + 1} batches out; give leave_out that or more, or 0."
            )
