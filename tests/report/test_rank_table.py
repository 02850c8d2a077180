"""The table of ranks agrees with numpy's quantiles of the log."""

import re
from pathlib import Path

import numpy as np

from mocte_ds.report.rank_table import ranks_table
from mocte_ds.report.run import Run


def test_ranks() -> None:
    seconds = np.random.default_rng(0).uniform(1, 2, (40, 3))
    seconds[:30, 2] += 1
    seconds[30:, 0] += 1
    rows = [{"step": n, "tokens": n, "rank_seconds": row.tolist()} for n, row in enumerate(seconds)]
    early = [{"step": -1, "tokens": 0, "rank_seconds": [1.0]}, {"step": -1, "tokens": 0}]
    page = ranks_table(Run(Path(), early + rows))
    cells = [re.sub("<[^>]*>", " ", row).split() for row in page.split("<tr>")[2:]]
    assert [row[0] for row in cells] == ["2", "0", "1"] and [row[3] for row in cells] == ["30", "10", "0"]
    assert [float(row[1]) for row in cells] == np.median(seconds, axis=0)[[2, 0, 1]].round(4).tolist()
    assert [float(row[2]) for row in cells] == np.quantile(seconds, 0.95, axis=0)[[2, 0, 1]].round(4).tolist()


def test_an_older_log() -> None:
    assert "no working times" in ranks_table(Run(Path(), [{"step": 1, "tokens": 1}]))
