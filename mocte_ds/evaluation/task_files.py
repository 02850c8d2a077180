"""The shipped lm-eval tasks as files that lm-eval reads anywhere, and one that makes `--model mocte` known to it."""

import glob
import hashlib
import json
import re
from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
MODEL = "mocte.yaml"
_MODEL = """# lm-eval {version} finds a model of another package where a file among --tasks imports it, as here:
#   lm_eval --model mocte --model_args checkpoint=DIR --tasks THIS_FILE,openbookqa_offline --include_path ITS_FOLDER
# The group is empty, and no score comes of it.
group: mocte
task: []
metadata:
  model: !function mocte_ds.evaluation.harness_models.MocteLM
"""


def task_files() -> dict[str, bytes]:
    """Names and contents: the tasks with the place of their data filled in."""
    found = {}
    for path in sorted(TASKS.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        # `datasets` takes the name of a file for a pattern.
        text = re.sub(r'"@TASKS@/([^"]+)"', lambda name: json.dumps(glob.escape(str(TASKS / name[1]))), text)
        found[path.name] = text.encode()
    return found


def model_file() -> dict[str, bytes]:
    """Name and content of the file that registers the model."""
    from importlib.metadata import version

    return {MODEL: _MODEL.format(version=version("lm_eval")).encode()}


def usual_folder(files: dict[str, bytes]) -> Path:
    """Where they are written if no folder is named: one for each content, as installations differ in their paths."""
    found = hashlib.sha256()
    for name, content in sorted(files.items()):
        found.update(f"{name}\0{len(content)}\0".encode() + content)
    return Path.home() / ".cache" / "mocte_ds" / "tasks" / found.hexdigest()[:12]
