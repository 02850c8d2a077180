"""Bits per byte by domain and the loss by place, against transformers alone; two ranks give the numbers of one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mocte_ds.errors import ConfigError, DataError
from mocte_ds.evaluation import evaluate
from mocte_ds.evaluation.replicas import Replicas
from mocte_ds.evaluation.texts import score_texts, texts_table
from tests.spawn import spawn

CONTEXT = 6
TEXTS = {"letters": ["a b c d a b b", "d", "c c a b d a c b a d a d c"], "words": ["ä ä b c", "d ä"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a short context, and a corpus."""
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5, max_position_embeddings=CONTEXT)
    LlamaForCausalLM(config).save_pretrained(out)
    words = {w: i for i, w in enumerate(["<s>", "</s>", "?", *"abcd", "ä"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(names))
    (out / "corpus").mkdir()
    for domain, texts in TEXTS.items():
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (out / "corpus" / f"{domain}.jsonl").write_text(lines, encoding="utf-8")
    return out


def by_hand(folder: Path, text: str) -> list[tuple[int, float]]:
    """Place in its window, and loss, of every token, one window after the other."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids, found = [0, *tokenizer.encode(text, add_special_tokens=False)], []
    for i in range(1, len(ids)):
        place = (i - 1) % CONTEXT
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([ids[i - 1 - place : i]])).logits[0, -1].log_softmax(-1)
        found.append((place, -float(logs[ids[i]])))
    return found


def sure_by_hand(folder: Path, text: str) -> list[tuple[float, bool]]:
    """Probability of the likeliest token at every place, and whether it was the right one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids, found = [0, *tokenizer.encode(text, add_special_tokens=False)], []
    for i in range(1, len(ids)):
        begin = i - 1 - (i - 1) % CONTEXT
        with torch.no_grad():
            probability = model(input_ids=torch.tensor([ids[begin:i]])).logits[0, -1].softmax(-1)
        found.append((float(probability.max()), int(probability.argmax()) == ids[i]))
    return found


def assert_calibrated(facts: dict[str, Any], pairs: list[tuple[float, bool]]) -> None:
    """Against numpy: accuracy, means by tenths of probability, and the mean of their differences."""
    probability, right = np.array([p for p, _ in pairs]), np.array([r for _, r in pairs], dtype=float)
    level = np.minimum((probability * 10).astype(int), 9)
    there = [number for number in range(10) if (level == number).any()]
    assert facts["accuracy"] == pytest.approx(right.mean())
    error = 0.0
    for number, found in zip(there, facts["by_probability"], strict=True):
        inside = level == number
        assert found["tokens"] == inside.sum()
        assert found["probability"] == pytest.approx(probability[inside].mean(), rel=1e-5)
        assert found["accuracy"] == pytest.approx(right[inside].mean())
        error += inside.mean() * abs(probability[inside].mean() - right[inside].mean())
    assert facts["calibration_error"] == pytest.approx(error, rel=1e-5)


def test_numbers_are_those_of_transformers_and_of_two_ranks(folder: Path) -> None:
    found = evaluate(folder, [], batch_size=2, texts=folder / "corpus")
    assert found["tasks"] == {} and sorted(found["texts"]) == ["letters", "words"]
    for domain, facts in found["texts"].items():
        texts = TEXTS[domain]
        losses = [pair for text in texts for pair in by_hand(folder, text)]
        size = sum(len(text.encode()) for text in texts)
        assert (facts["documents"], facts["tokens"], facts["bytes"]) == (len(texts), len(losses), size)
        assert facts["bits_per_byte"] == pytest.approx(sum(n for _, n in losses) / math.log(2) / size, rel=1e-5)
        for place in facts["by_position"]:
            inside = [nats for where, nats in losses if place["first"] <= where <= place["last"]]
            assert place["tokens"] == len(inside)
            assert place["nats_per_token"] == pytest.approx(sum(inside) / len(inside), rel=1e-5)
        assert sum(place["tokens"] for place in facts["by_position"]) == len(losses)
        assert_calibrated(facts, [pair for text in texts for pair in sure_by_hand(folder, text)])
    letters = found["texts"]["letters"]
    assert len(letters["by_probability"]) > 2 and 0 < letters["accuracy"] < 1
    lines = texts_table(found["texts"]).splitlines()
    assert lines[1].split()[:3] == ["letters", "3", str(found["texts"]["letters"]["bytes"])]
    assert [line.split()[0] for line in lines[5:]] == ["0", "1", "2-3", "4-5"]

    how = (folder, [], None, 2, None, None, None, 0, None, False, False, None, folder / "corpus")
    first, second = spawn(evaluate, 2, *how, timeout=150)
    assert second == {}
    for domain, facts in found["texts"].items():
        assert first["texts"][domain]["bits_per_byte"] == pytest.approx(facts["bits_per_byte"], rel=1e-6)
        assert first["texts"][domain]["tokens"] == facts["tokens"]
        assert first["texts"][domain]["calibration_error"] == pytest.approx(facts["calibration_error"], rel=1e-5)


def test_a_model_that_says_nan_has_a_loss_of_nan() -> None:
    class Diverged:
        max_length, prefix_token_id, device, replicas = 4, 0, "cpu", Replicas(0, 1, 0, 1)

        def tok_encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [1] * len(text)

        def _model_call(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.full((*ids.shape, 3), torch.nan)

    facts = score_texts(Diverged(), {"a": ["abc"]}, 2)["a"]
    assert facts["tokens"] == 3 and math.isnan(facts["nats_per_token"]) and math.isnan(facts["calibration_error"])


def test_some_texts_and_none(folder: Path, tmp_path: Path) -> None:
    few = evaluate(folder, [], limit=1, texts=folder / "corpus")["texts"]
    assert {name: facts["documents"] for name, facts in few.items()} == {"letters": 1, "words": 1}
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no document with text"):
        evaluate(folder, [], texts=tmp_path)


def test_an_answer_that_is_longer_than_the_context_is_refused(folder: Path) -> None:
    from mocte_ds.evaluation.harness_models import folder_model

    model = folder_model(folder, 2, "cpu")
    assert len(model._loglikelihood_tokens([(("a", "b"), [3], [4] * CONTEXT)])) == 1
    with pytest.raises(ConfigError, match="an answer of 7 tokens is, and the model's context has 6"):
        model._loglikelihood_tokens([(("a", "b"), [3], [4] * (CONTEXT + 1))])
