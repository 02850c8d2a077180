"""Which task files names mean, and when a network may be asked: for tasks of others, where no folder has their data."""

import os
from pathlib import Path

import pytest

from mocte_ds.errors import ConfigError
from mocte_ds.evaluation import lm, selection, task_files
from mocte_ds.evaluation.replicas import Replicas


def test_names_are_those_of_lm_eval_and_of_the_folder(tmp_path: Path) -> None:
    """What has to be read, and whether a network may be used, follows from the names; a misspelt one costs no time."""
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\n", encoding="utf-8")
    (tmp_path / "group.yaml").write_text("group: ours\ntask: [mine, piqa]\n", encoding="utf-8")
    cases = {
        "openbookqa_offline": (True, False, None),
        "piqa": (False, False, "piqa"),
        "mine": (False, False, None),
        "ours": (False, True, None),  # its tasks lie anywhere
        "ai2_arc": (False, True, None),  # a tag
        "mmlu_*": (False, True, None),
    }
    for name, (shipped, everything, folder) in cases.items():
        found = selection.select([name], tmp_path, False)
        assert (found.shipped, found.everything) == (shipped, everything), name
        assert [Path(path).name for path in found.folders] == ([folder] if folder else []), name
    with pytest.raises(ConfigError, match="no task 'pika' .*nearest: .*'piqa'"):
        selection.select(["openbookqa_offline", "pika"], tmp_path, False)


def test_patterns_stand_for_the_names_that_fit() -> None:
    tasks_of = selection.manager([str(task_files.TASKS)], False, None)
    wanted = ["openbookqa_offline", "commonsense_qa_generate", "commonsense_qa_offline"]
    assert selection.matching(["openbookqa_offline", "common*", "*_offline"], tasks_of) == wanted
    with pytest.raises(ConfigError, match=r"no task 'no\*'"):
        selection.matching(["no*"], tasks_of)


def test_lm_evals_own_task_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder of data is named; no network is reached in this test, and the message says what helps."""
    from lm_eval.models.dummy import DummyLM

    asked = []

    def load_dataset(path: str, *_: object, **__: object) -> None:
        asked.append((path, os.environ.get("HF_DATASETS_OFFLINE")))
        raise ConnectionError("no route to the hub")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    model = DummyLM()
    model.replicas = Replicas.of(1)
    monkeypatch.setattr(lm, "_model", lambda *_: model)
    with pytest.raises(ConfigError, match="piqa with data of the hub: ConnectionError: no route.*--offline takes"):
        lm.evaluate(tmp_path, ["piqa"], limit=2)
    assert asked and asked[0][1] is None
