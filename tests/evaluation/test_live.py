"""A run's checkpoint answers as its exported folder does under lm-eval's own class, on one rank and spread over two."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mocte_ds.convert.hf.export import export
from mocte_ds.data import prepare, train_tokenizer
from mocte_ds.data.loader import BlendedLoader
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.evaluation import conflicts, evaluate
from mocte_ds.evaluation.features import ATTENTION, FFN, read_features
from mocte_ds.evaluation.live import load_live
from mocte_ds.evaluation.replicas import Replicas
from tests.evaluation import live_runs
from tests.spawn import spawn
from tools import tasks

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


def test_experts_are_found_in_a_checkpoint(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads of texts, features and conflict of the class around a GPT-2, against hooks on its experts and norms."""
    folder, tokenizer = written[0] / "gpt2", written[1]
    (tmp_path / "corpus").mkdir()
    texts = {"few": live_runs.TEXTS, "more": [f"{text} {n}" for n in range(60) for text in live_runs.TEXTS]}
    for name, lines in texts.items():
        (tmp_path / "corpus" / f"{name}.txt").write_text("\n\n".join(lines))
    loads = evaluate(folder, [], limit=2, batch_size=4, texts=tmp_path / "corpus")["texts"]["few"]["load"]
    network, hf = load_live(folder, None, Replicas.of(1))
    read: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda _module, args: read.update({name: read.get(name, 0) + len(args[0])})

    for name, module in network.named_modules():
        if re.fullmatch(r"base\..*\.banks\.0\.experts\.\d", name):
            module.register_forward_pre_hook(count(name))
    for text in texts["few"][:2]:
        ids = [hf.bos_token_id, *hf(text, add_special_tokens=False)["input_ids"]][:-1]
        assert 3 < len(ids) <= 48, "one window"
        network(input_ids=torch.tensor([ids]))
    assert list(loads) == [f"transformer.h.{n}.mlp.banks.0" for n in range(2)]
    for name, shares in loads.items():
        mine = [read.get(f"base.{name}.experts.{k}", 0) for k in range(len(shares))]
        assert shares == pytest.approx([n / sum(mine) for n in mine]) and sum(n > 0 for n in mine) > 1

    (tmp_path / "corpus" / "few.txt").unlink()
    prepare(tmp_path / "corpus", tmp_path / "data", tokenizer, 0.5, workers=1, progress=False)
    rows = read_features(folder, tmp_path / "data", 8).rows
    assert set(rows) == {(f"transformer.h.{n}.mlp", kind) for n in range(2) for kind in (FFN, ATTENTION)}
    normed: list[torch.Tensor] = []
    network.base.transformer.h[1].ln_2.register_forward_hook(lambda _m, _a, output: normed.append(output.detach()))
    batch = next(iter(BlendedLoader(tmp_path / "data", "validation", 48, 8, 0, 1, 8)))
    network(input_ids=batch["input_ids"])
    assert torch.allclose(rows["transformer.h.1.mlp", FFN], normed[0], atol=1e-5)
    monkeypatch.setattr(conflicts, "ROWS", 8)
    found = conflicts.read_conflicts(folder, tmp_path / "data", 8)
    assert [fact["module"] for fact in found] == list(loads) and all(fact["tokens"] == 8 * 48 for fact in found)
    assert all(fact["experts"] == len(loads[fact["module"]]) and fact["kappa"] >= 1 / 8 for fact in found)


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


def test_lm_evals_own_command_line_scores_a_checkpoint_as_its_export(
    written: tuple[Path, Path], tmp_path: Path
) -> None:
    """`lm_eval` as installed: nothing but the file of `mocte-ds tasks` tells it of the model. No network is reached."""
    folder, tokenizer = written
    export(folder / "gpt2", tmp_path / "export", tokenizer_path=tokenizer, choice="own")
    assert tasks.main([str(tmp_path / "tasks")]) == 0
    place, names = tmp_path / "tasks", "openbookqa_offline,commonsense_qa_generate"
    models = {
        "mocte": (f"checkpoint={folder / 'gpt2'},tokenizer={tokenizer}", f"{place / 'mocte.yaml'},{names}"),
        "hf": (f"pretrained={tmp_path / 'export'},dtype=float32,trust_remote_code=True", names),
    }
    common = f"--include_path {place} --limit 8 --batch_size 3 --device cpu --log_samples --gen_kwargs max_gen_toks=8"
    started = []
    for model, (arguments, asked) in models.items():
        command = [Path(sys.executable).parent / "lm_eval", "--model", model, "--model_args", arguments]
        command += ["--tasks", asked, "--output_path", tmp_path / model, *common.split()]
        cache = {"HF_DATASETS_CACHE": str(tmp_path / model / "data"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
        environment = {**os.environ, **cache, "HF_HUB_OFFLINE": "1"}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-4000:]
    found, wanted = (logged(tmp_path / model) for model in models)
    assert len(wanted["answers"]) == 8 * (4 + 1) and len({*map(str, wanted["answers"])}) > 16, "nothing to tell apart"
    assert found["answers"] == [pytest.approx(a, rel=1e-5) if isinstance(a, float) else a for a in wanted["answers"]]
    assert found["scores"] == wanted["scores"] and len(wanted["scores"]) >= 3


def logged(folder: Path) -> dict[str, Any]:
    """What lm-eval wrote of a model: scores of all tasks, and log-likelihoods and texts of every item."""
    results = json.loads(next(folder.rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
    scores = {
        (task, key): value for task, row in results.items() for key, value in row.items() if not isinstance(value, str)
    }
    answers: list[Any] = []
    for path in sorted(folder.rglob("samples_*.jsonl")):
        rows = sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
        for row in rows:
            for (answer,) in row["resps"]:
                answers.append(float(answer[0]) if isinstance(answer, list) else answer)
    return {"scores": scores, "answers": answers}


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
