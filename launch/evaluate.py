"""Evaluates on several ranks: deepspeed launch/evaluate.py MODEL --tasks ... (options of tools/evaluate.py)."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / "evaluate.py"), run_name="__main__")
