"""Bars of command lines whose stderr is a file: lines that stay, and few of them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys, time
from mocte_ds.cli import run_cli
from mocte_ds.errors import MocteError

def main():
    from transformers.utils import logging
    from tqdm import tqdm

    for _ in logging.tqdm(range(200), desc="weights"):
        time.sleep(0.002)
    with tqdm(total=200, desc="items") as bar:
        for number in range(200):
            time.sleep(0.002)
            bar.update(1)
            if number == 100:
                bar.write("half", file=sys.stderr)
    print("a line", file=sys.stderr)
    raise MocteError("what to do")

run_cli(main)
"""


def test_bars_in_a_file_are_lines() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "\r" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Warning")]
    shown = [line.split(":")[0] + (" end" if "200/200" in line else "") for line in lines]
    # 0.4 s of a bar, which would be four states; after a text of its own it shows where it stands.
    assert [line for line in shown if line.startswith("weights")] == ["weights", "weights end"], lines
    assert shown[-2:] == ["a line", "error"] and lines[-1] == "error: what to do" and "half" in shown
    assert shown[shown.index("half") - 1].startswith("items") and "items end" in shown
    assert len([line for line in shown if line.startswith("items")]) <= 3 and "" not in shown, lines
