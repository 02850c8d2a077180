"""A run's checkpoint answers as its exported folder does under lm-eval's own class, on one rank and spread over two."""

from pathlib import Path
from typing import Any

import pytest

from mocte_ds.convert.hf.export import export
from mocte_ds.data import train_tokenizer
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.evaluation import evaluate
from mocte_ds.evaluation.replicas import Replicas
from tests.evaluation import live_runs
from tests.spawn import spawn

NAMES = ("gpt2", "llama")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of checkpoints, and their tokenizer."""
    folder = tmp_path_factory.mktemp("live")
    texts = {"prose": [f"{text}\n" for text in live_runs.TEXTS * 40]}
    tokenizer = train_tokenizer(texts, folder / "own.model", 320)
    spawn(live_runs.write, 2, str(folder), str(tokenizer), timeout=300, deepspeed=True)
    return folder, tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_exported_folder(name: str, written: tuple[Path, Path], tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    folder, tokenizer = written
    export(folder / name, tmp_path / "export", tokenizer_path=tokenizer, choice="own")
    stock = HFLM(pretrained=str(tmp_path / "export"), device="cpu", batch_size=3, dtype="float32")
    wanted = live_runs.answers(stock)
    assert len(set(wanted["generated"])) > 1 and len(set(wanted["loglikelihood"])) > 10, "nothing to tell apart"
    one, whole = live_runs.live(str(folder / name), str(tokenizer), None)
    same(one, wanted)
    for (spread, held), place in zip(
        spawn(live_runs.live, 2, str(folder / name), str(tokenizer), None, timeout=200), range(2), strict=True
    ):
        same(spread, wanted)
        assert 2 * held == whole, f"rank {place} holds more than its experts"


def same(found: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    assert found["generated"] == wanted["generated"] and found["greedy"] == wanted["greedy"]
    for kind in ("loglikelihood", "rolling"):
        assert found[kind] == pytest.approx(wanted[kind], rel=1e-5)


def test_ranks_that_share_items_or_experts_give_the_same_scores(written: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = written
    tasks = ["openbookqa_offline"]
    one = evaluate(folder / "gpt2", tasks, limit=5, batch_size=4)
    for how in ({"ep_size": 1}, {"ep_size": 2}):
        first, second = spawn(
            evaluate, 2, folder / "gpt2", tasks, 5, 4, None, None, None, 0, None, False, False, how, timeout=200
        )
        assert second == {} and first["ranks"] == 2 and first["tasks"].keys() == one["tasks"].keys()
        for task, scores in one["tasks"].items():  # standard errors are rounded by the order of the items
            found = first["tasks"][task]
            assert found.pop("acc_stderr") == pytest.approx(scores["acc_stderr"]) and found.items() <= scores.items()


def test_lm_evals_own_command_line_finds_the_model(written: tuple[Path, Path], tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    from mocte_ds.evaluation import harness_models

    assert get_model("mocte") is harness_models.MocteLM
    folder, tokenizer = written
    given = f"checkpoint={folder / 'gpt2'},tag=step6,tokenizer={tokenizer}"
    # Its command line says cuda:0 on any machine.
    model = get_model("mocte").create_from_arg_string(given, {"batch_size": 2, "device": "cuda:0"})
    same(live_runs.answers(model), live_runs.live(str(folder / "gpt2"), str(tokenizer), None)[0])
    with pytest.raises(CheckpointError, match="step7"):
        get_model("mocte").create_from_arg_string(given.replace("step6", "step7"))


def test_a_checkpoint_without_a_tokenizer_and_ranks_that_do_not_fit(written: tuple[Path, Path]) -> None:
    folder, _ = written
    with pytest.raises(CheckpointError, match="no tokenizer.*--tokenizer"):
        evaluate(folder / "llama", ["openbookqa_offline"], limit=1)
    with pytest.raises(ConfigError, match="ep_size = 3 must divide the number of ranks, 1"):
        Replicas.of(3)


def test_parts_of_replicas_are_all_of_a_model() -> None:
    for size in (1, 2, 3, 5):
        parts = [Replicas(0, 1, place, size).share(8) for place in range(size)]
        assert sorted(k for part in parts for k in part) == list(range(8))
