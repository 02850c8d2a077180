"""Tasks with several filters, rolling ones and ones without a context, against transformers alone."""

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mocte_ds.data.hf_tokenizer import HFTokenizer
from mocte_ds.errors import ConfigError
from mocte_ds.evaluation import evaluate, lm, task_files
from mocte_ds.evaluation.results import collect, table

TEXTS = ["a b c d a b", "d d c", "b a"]


@pytest.fixture(scope="module", params=[True, False], ids=["begins", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer puts <s> in front of a text, or does not."""
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5)).save_pretrained(out)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", "?", *"abcd"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if request.param:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(names))
    return out


def write_task(where: Path, name: str, **values: object) -> None:
    (where / "data.jsonl").write_text("\n".join(json.dumps({"text": text, "answer": 0}) for text in TEXTS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(where / "data.jsonl")}}}
    task = {"task": name, **data, "test_split": "test", **values, "metadata": {"version": 1}}
    (where / f"{name}.yaml").write_text(yaml.safe_dump(task))


def by_hand(folder: Path, text: str) -> float:
    """Log probability of a text after one <s>."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits.log_softmax(-1)[0]
    return sum(float(logs[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))


def test_texts_begin_once_and_every_filter_is_shown(folder: Path, tmp_path: Path) -> None:
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_task(tmp_path, "rolling", **rolling, metric_list=[{"metric": "bits_per_byte"}])
    choices = {"doc_to_text": "", "doc_to_target": 0, "doc_to_choice": ["a b", "d c"], "target_delimiter": ""}
    write_task(tmp_path, "empty", output_type="multiple_choice", **choices, metric_list=[{"metric": "acc"}])
    first = {"function": "take_first"}
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern, "fallback": "x"}, first]}
        for name, pattern in (("strict", "(never)"), ("flexible", "(?s)(.?)"))
    ]
    asked = {"doc_to_text": "{{text}}", "doc_to_target": "x", "filter_list": filters}
    keywords = {"until": ["</s>"], "max_gen_toks": 2, "do_sample": False}
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write_task(
        tmp_path, "filters", output_type="generate_until", **asked, generation_kwargs=keywords, metric_list=metrics
    )
    names = ["rolling", "empty", "filters"]
    results = evaluate(folder, names, include_path=tmp_path, batch_size=2)
    found = results["tasks"]
    bits = -sum(by_hand(folder, text) for text in TEXTS) / math.log(2) / sum(len(text) for text in TEXTS)
    assert found["rolling"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert found["empty"]["acc"] == float(by_hand(folder, "a b") > by_hand(folder, "d c"))
    shown = {key for key in found["filters"] if key.startswith("exact_match,")}
    assert shown == {"exact_match,strict", "exact_match,flexible"}
    assert found["filters"]["exact_match,strict"] == 1.0 and found["filters"]["exact_match,flexible"] == 0.0
    assert "exact_match (strict)" in table(results) and "exact_match (flexible)" in table(results)


def test_documents_begin_as_the_tokenizer_begins_texts(folder: Path) -> None:
    ids = AutoTokenizer.from_pretrained(folder)("a b").input_ids
    assert HFTokenizer(folder).encode("a b") == ids
    path = folder / "tokenizer_config.json"
    kept = path.read_text()
    try:
        for value in (True, False):
            path.write_text(json.dumps({**json.loads(kept), "add_bos_token": value}))
            assert HFTokenizer(folder).encode("a b") == AutoTokenizer.from_pretrained(folder)("a b").input_ids
    finally:
        path.write_text(kept)


def test_groups_and_strange_values() -> None:
    results = {
        "g": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "g", "f1,a": torch.tensor(0.25).item(), "f1,b": 1}
    }
    assert collect({"results": results}, {}) == {
        "g": {"acc": 0.5, "f1,a": 0.25, "f1,b": 1, "items": None, "chance": None}
    }


def test_numbers_that_make_no_evaluation(tmp_path: Path) -> None:
    for values in ({"limit": 0}, {"batch_size": 0}, {"num_fewshot": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(values))} = .* must be"):
            evaluate(tmp_path, ["openbookqa_offline"], **values)
    with pytest.raises(ConfigError, match="no task is named"):
        evaluate(tmp_path, [])


def test_shipped_tasks_read_their_own_data_where_a_folder_looks_like_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    for name in ('r[1] "x', 'r1 "x'):
        shutil.copytree(task_files.TASKS, tmp_path / name)
        row = {"question": name, "choices": ["a", "b"], "answer": 0}
        (tmp_path / name / "openbookqa.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    monkeypatch.setattr(task_files, "TASKS", tmp_path / 'r[1] "x')
    with lm._task_folder() as folder:
        task = yaml.safe_load(Path(folder, "openbookqa_offline.yaml").read_text())
        found = datasets.load_dataset("json", **task["dataset_kwargs"], cache_dir=str(tmp_path / "cache"))
    assert found["validation"]["question"][:] == ['r[1] "x']
