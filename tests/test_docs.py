"""The documents say what is so: the worked example runs as printed, and what they name exists."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mocte_ds import config_reference
from mocte_ds.benchmark import benchmarks
from mocte_ds.config import MocteConfig
from tools import study

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


def test_every_result_is_listed() -> None:
    results = ROOT / "docs" / "results"
    text = (results / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in results.iterdir()} - {"README.md"}
    assert {name for name in names if f"| [{name}]({name}) |" not in text} == set()


def test_every_reviewers_question_has_an_entry() -> None:
    text = (ROOT / "docs" / "reviewers.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## ([\d, ]+)  \S", text, re.MULTILINE)
    assert [int(number) for heading in headings for number in heading.split(",")] == list(range(1, 30))


def commands() -> list[tuple[str, list[str]]]:
    """Scripts and their words on the pages that say how numbers are made, each command once."""
    pages = [ROOT / "docs" / name for name in ("reviewers.md", "results/README.md")]
    found = [
        re.findall(r"\b(?:python|bash|deepspeed) ([\w/.-]+\.(?:py|sh))\b([^`\n#>]*)", page.read_text(encoding="utf-8"))
        for page in pages
    ]
    assert min(map(len, found)) > 8
    return [
        (script, shlex.split(rest)) for script, rest in dict.fromkeys(command for page in found for command in page)
    ]


def test_commands_that_make_results_exist() -> None:
    for script, words in commands():
        assert (ROOT / script).is_file(), script
        for word in words:
            assert not re.match(r"launch/(studies|runs)/", word) or (ROOT / word).is_file(), f"{script} {word}"
        sources = [ROOT / script]
        if script == "tools/benchmark.py":
            assert words[0] in benchmarks(), f"{script} {words[0]}"
            sources += (ROOT / "mocte_ds" / "benchmark").rglob("*.py")
        known = " ".join(path.read_text(encoding="utf-8") for path in sources)
        if script.startswith("tools/"):
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in known] == [], script


@pytest.mark.slow
def test_studies_that_make_results_can_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for script, words in commands():
        if script == "tools/study.py":
            assert study.main([*words, "--list"]) == 0  # refuses arms, keys and values that no run could have
            assert capsys.readouterr().out
