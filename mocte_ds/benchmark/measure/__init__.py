"""What the benchmarks share: clocks, formulas of work and bytes, run plans, shares of training time."""
