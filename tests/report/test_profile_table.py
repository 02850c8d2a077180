"""The report's table of a profiled step."""

from pathlib import Path

from mocte_ds.report.profile_table import profile_table
from mocte_ds.report.run import Run
from tests.report.parsed import Page


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
