"""The quickstart's whole way with few steps; a second start uses again what is there."""

import json
from pathlib import Path

import pytest

from mocte_ds.ownership import remove
from tests.e2e.conftest import read_log
from tests.launch.test_scripts import bash
from tests.ownership.trees import tree

CHANGES = (
    "training.steps=24 training.batch_tokens=2048 training.micro_batch=4 training.warmup_steps=2 evaluation.every=8 "
    "evaluation.sequences_per_domain=1 model.num_hidden_layers=2 model.hidden_size=64 model.intermediate_size=96 "
    "deepspeed.mocte.check_every=0.1 deepspeed.mocte.clusters.deadline=0.3"
).split()


@pytest.mark.usefixtures("deepspeed_op")
def test_quickstart_with_few_steps(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["launch/quickstart.sh", "--out", out, *(word for change in CHANGES for word in ("--set", change))]
    variables = {"MOCTE_SKIP_SETUP": "1", "EVAL_LIMIT": "4"}
    code, output = bash(*command, timeout=600, **variables)
    assert code == 0, output[-4000:]
    assert [row["step"] for row in read_log(out)] == list(range(1, 25))
    assert "emergence" in [event["event"] for event in read_log(out, "events")]
    assert (out / "report" / "index.html").stat().st_size > 10_000
    results = json.loads((out / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert "openbookqa_offline" in json.dumps(results) and "commonsense_qa_generate" in json.dumps(results)

    # It has trained in bf16, where the CPU has it; in bf16 some tokens near a boundary would go to another expert.
    exported = json.loads((out / "export" / "export.json").read_text(encoding="utf-8"))
    assert exported["dtype"] == "fp32"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mocte_ds.convert.hf.register  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    model = AutoModelForCausalLM.from_pretrained(out / "export")
    ids = tokenizer("The", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] >= ids.shape[1] + 1

    code, output = bash(*command, timeout=600, **variables)
    assert code == 0, output[-4000:]
    for found in ("found", "done already", f"found {out}/export", f"found {out}/evaluation/results.json"):
        assert found in output

    (out / "data" / "notes.txt").write_text("of the user", encoding="utf-8")
    before = tree(out)
    code, output = bash(*command, "--fresh", timeout=60, **variables)
    assert code == 2 and "notes.txt was not written by mocte-ds" in output and tree(out) == before
    (out / "data" / "notes.txt").unlink()
    remove(out)  # as --fresh does, which would then start all over
    assert list(tmp_path.iterdir()) == []
