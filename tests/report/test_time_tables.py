"""The table of ranks agrees with numpy's quantiles of the log; that of parts with sums by hand."""

import re
from pathlib import Path

import numpy as np

from mocte_ds.report.run import Run
from mocte_ds.report.time_tables import profile_table, ranks_table
from tests.report.parsed import Page


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


def test_parts_of_the_last_profile() -> None:
    early = {"event": "profile", "step": 3, "tokens": 30, "steps": 1, "seconds": 9.0, "parts": {"gate": [9.0, 0.0]}}
    late = {**early, "step": 8, "steps": 2, "seconds": 4.0, "parts": {"experts": [1.0, 2.0], "gate": [1.0, 0.0]}}
    html = profile_table(Run(Path("run"), [], [early, late]))
    assert Page(html).tables["profile-table"] == [
        ["part", "forward (ms)", "backward (ms)", "share"],
        ["experts", "500.0", "1000.0", "75.00 %"],
        ["gate", "500.0", "0.0", "25.00 %"],
    ]
    assert "2 steps up to step 8, 2.000 s each." in html


def test_a_run_without_a_profile_says_how_to_get_one() -> None:
    assert "--profile STEPS" in profile_table(Run(Path("run"), []))
