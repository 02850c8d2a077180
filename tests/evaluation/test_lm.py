"""lm-evaluation-harness on an exported folder gives the numbers that transformers alone gives, on one rank or two."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mocte_ds.convert.hf.tokenizer import SourceTokenizer
from mocte_ds.data import embedded_corpus, read_corpus, train_tokenizer
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.evaluation import evaluate, offline_tasks
from mocte_ds.evaluation.lm import table
from mocte_ds.evaluation.task_files import TASKS
from tests.spawn import spawn

LIMIT = 7


def items(name: str) -> list[dict[str, Any]]:
    """Items of a shipped data file, read without any of our code."""
    with gzip.open(TASKS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, LIMIT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows the first two answers of CommonsenseQA by heart."""
    out = tmp_path_factory.mktemp("model")
    texts = {"qa": list(itertools.islice(read_corpus(embedded_corpus())["qa_en"], 300))}
    model = train_tokenizer(texts, out.parent / "evaluation.model", 600)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=600, max_position_embeddings=256, **sizes))
    llama.save_pretrained(out)
    SourceTokenizer(model).write(out, 256)
    tokenizer = AutoTokenizer.from_pretrained(out)
    known = [f"Question: {i['question']}\nAnswer: {i['choices'][i['answer']]}\n" for i in items("commonsense_qa")[:2]]
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    for _ in range(60):
        for text in known:
            ids = torch.tensor([tokenizer.encode(text)])
            llama(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    llama.save_pretrained(out)
    return out


def chosen_by_transformers(folder: Path) -> list[tuple[int, int]]:
    """For each OpenBookQA item the answers with the largest likelihood, in all and a character."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for item in items("openbookqa"):
        scores = []
        for choice in item["choices"]:
            start = tokenizer.encode(item["question"])
            whole = torch.tensor([tokenizer.encode(f"{item['question']} {choice}")])
            with torch.no_grad():
                logs = model(input_ids=whole).logits.log_softmax(-1)[0]
            places = range(len(start), whole.shape[1])
            scores.append(sum(float(logs[i - 1, whole[0, i]]) for i in places))
        by_length = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        found.append((scores.index(max(scores)), by_length.index(max(by_length))))
    return found


def test_numbers_are_those_of_transformers_and_of_two_ranks(folder: Path) -> None:
    tasks = ["openbookqa_offline", "commonsense_qa_generate"]
    results = evaluate(folder, tasks, LIMIT, batch_size=4)
    right = [item["answer"] for item in items("openbookqa")]
    chosen = chosen_by_transformers(folder)
    scores = results["tasks"]["openbookqa_offline"]
    assert scores["items"] == LIMIT and scores["chance"] == 0.25
    assert scores["acc"] == pytest.approx(sum(a == b for (a, _), b in zip(chosen, right, strict=True)) / LIMIT)
    assert scores["acc_norm"] == pytest.approx(sum(a == b for (_, a), b in zip(chosen, right, strict=True)) / LIMIT)
    # A model that knows the answer is scored as right, one that does not is not.
    assert results["tasks"]["commonsense_qa_generate"]["exact_match"] == pytest.approx(2 / LIMIT)

    first, second = spawn(evaluate, 2, folder, tasks, LIMIT, 4, timeout=150)
    assert second == {} and first["ranks"] == 2
    for task in tasks:
        one, two = results["tasks"][task], first["tasks"][task]
        assert two.pop("at_chance", None) == one.pop("at_chance", None)
        assert two == pytest.approx(one)


def test_table_says_value_error_and_chance() -> None:
    values = {"acc": 0.2512, "acc_stderr": 0.0193, "items": 500, "chance": 0.25}
    lines = table({"tasks": {"openbookqa_offline": values, "other": {"exact_match": 0.5, "items": 3, "chance": None}}})
    assert len(lines.splitlines()) == 3
    assert lines.splitlines()[1].split() == ["openbookqa_offline", "500", "acc", "0.2512", "0.0193", "0.25"]
    assert lines.splitlines()[2].split() == ["other", "3", "exact_match", "0.5000", "-", "-"]


def test_unknown_task_and_wrong_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task 'openbookqa_offlin' .*nearest: .'openbookqa_offline'"):
        evaluate(folder, ["openbookqa_offlin"])
    with pytest.raises(CheckpointError, match="not an exported model: config.json is missing"):
        evaluate(tmp_path / "nothing", ["openbookqa_offline"])
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        evaluate(tmp_path, ["openbookqa_offline"])


def test_shipped_tasks_hold_what_their_readme_says() -> None:
    assert set(offline_tasks()) == {"openbookqa_offline", "commonsense_qa_offline", "commonsense_qa_generate"}
    for name, count, choices in (("openbookqa", 500, 4), ("commonsense_qa", 1221, 5)):
        with gzip.open(TASKS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        assert len(rows) == count and all(len(row["choices"]) == choices for row in rows)
        assert all(0 <= row["answer"] < choices and row["question"].strip() for row in rows)
        assert len({row["question"] for row in rows}) > 0.97 * count
