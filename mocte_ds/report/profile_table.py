"""Where the time of the steps went that a profiler has recorded."""

from mocte_ds.report.markup import paragraph, table
from mocte_ds.report.run import Run
from mocte_ds.report.wording import decimal, percent, plural


def profile_table(run: Run) -> str:
    """Parts of the last profile in the log, those that took longest first."""
    profiles = run.of_kind("profile")
    if not profiles:
        return paragraph("No step was profiled; --profile STEPS of the training records some.", "soft")
    last = profiles[-1]
    parts, steps = last["parts"], last["steps"]
    total = sum(map(sum, parts.values())) or 1.0
    lines = [
        [
            name,
            decimal(1e3 * forward / steps, 1),
            decimal(1e3 * backward / steps, 1),
            percent((forward + backward) / total),
        ]
        for name, (forward, backward) in parts.items()
    ]
    remark = (
        f"Rank 0, {plural(steps, 'step')} up to step {last['step']}, {decimal(last['seconds'] / steps, 3)} s each. The "
        "profiler makes steps longer. Traces are in the run's folder profile/."
    )
    head = ["part", "forward (ms)", "backward (ms)", "share"]
    return table("profile-table", head, lines, "tnnn") + paragraph(remark, "soft")
