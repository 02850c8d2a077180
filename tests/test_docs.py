"""The documents say what is so: the worked example runs as printed, and what they name exists."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocte_ds import config_reference
from mocte_ds.config import MocteConfig

ROOT = Path(__file__).resolve().parents[1]


def test_worked_example_prints_what_the_page_says() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split("## 9 ")[1]
    code, expected = (
        re.search(r"```python\n(.*?)```", page, re.DOTALL),
        re.search(r"```text\n(.*?)```", page, re.DOTALL),
    )
    done = subprocess.run(
        [sys.executable, "-c", code.group(1)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = [
        line for line in done.stdout.splitlines() if re.match(r"explained|directions|planted|noise|load|lambda", line)
    ]
    wanted = expected.group(1).splitlines()
    # The expert's weights come from torch's generator, the last digits of its lambda from the machine.
    assert printed[:-1] == wanted[:-1]
    numbers = [float(number) for number in re.findall(r"[\d.]+", printed[-1])]
    assert numbers[0] > 1000 * numbers[1] > 0


def test_the_config_reference_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    assert page == config_reference.page(), "run python -m mocte_ds.config_reference > docs/reference/config.md"
    block = MocteConfig.from_dict({"modules": "m"}).to_dict()
    for path, value in leaves(block):
        rows = page.split(f"### `{'.'.join(['mocte', *path[:-1]])}`\n")[1].split("###")[0].splitlines()
        (row,) = [row for row in rows if row.startswith(f"| `{path[-1]}` |")]
        default, meaning = (row.split(" | ")[place] for place in (2, 4))
        assert default == ("required" if path == ("modules",) else f"`{json.dumps(value)}`"), row
        assert len(meaning) > 10 and meaning.removesuffix(" |").endswith("."), row


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and values of all keys that are not sections."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def test_named_files_and_settings_exist() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")) + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(
            r"\b((?:mocte_ds|tests|tools|launch|ds_configs)/[\w/.-]+\.(?:py|sh|yaml|json|sbatch))", text
        ):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
