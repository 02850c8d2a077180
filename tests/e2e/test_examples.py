"""The scripts in examples/ run through the launcher, and resume."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from mocte_ds.convert.hf.export import export
from mocte_ds.report import read_run
from tests.e2e.conftest import LIMIT, ROOT, Launcher


def test_deepspeed_loop(launch: Launcher, tmp_path: Path) -> None:
    code, output = launch("examples/deepspeed_loop.py", "--out", tmp_path, "--steps", 60)
    assert code == 0, output
    assert len(re.findall(r"\d+ emergence ", output)) == 2, output
    code, output = launch("examples/deepspeed_loop.py", "--out", tmp_path)
    assert code == 0 and not re.search(r"\d+ emergence ", output), output
    (loss,) = re.findall(r"step 80: loss (\d+\.\d\d)", output)
    assert "step 60" not in output and float(loss) < 4.0, "bytes without any learning cost ln 256 = 5.5"
    assert output.count("'training'") + output.count("'frozen'") == 8, output
    log = read_run(tmp_path)
    assert [row["step"] for row in log.metrics] == list(range(1, 81)) and len(log.of_kind("emergence")) == 2


def test_routing_key(launch: Launcher, tmp_path: Path) -> None:
    """The key is the script's own; a run goes on with it, and other scripts refuse it by name."""
    code, output = launch("examples/routing_key.py", "--out", tmp_path, "--steps", 60)
    assert code == 0 and len(re.findall(r"\d+ emergence ", output)) == 2, output
    code, output = launch("examples/routing_key.py", "--out", tmp_path)
    assert code == 0 and re.search(r"step 80: loss \d", output) and "step 60" not in output, output
    code, output = launch("examples/deepspeed_loop.py", "--out", tmp_path)
    assert code != 0 and "kind-of-byte" in output, output


def test_accelerate(launch: Launcher, tmp_path: Path) -> None:
    """A loop of accelerate goes on from its state; experts emerge and freeze, and the folder is what was trained."""
    script = "examples/accelerate_loop.py"
    code, output = launch(script, "--out", tmp_path, "--steps", 16, through="accelerate")
    assert code == 0 and len(re.findall(r"^\d+ emergence ", output, re.MULTILINE)) == 2, output
    code, output = launch(script, "--out", tmp_path, through="accelerate")
    _resumed(code, output)
    log = read_run(tmp_path)
    assert [row["step"] for row in log.metrics] == list(range(1, 41)) and len(log.of_kind("resume")) == 1
    assert log.metrics[-1]["loss"] < 4.0, "bytes without any learning cost ln 256 = 5.5"


def test_chat(launch: Launcher, prepared: Path, run_file: Callable[[bool], Path], tmp_path: Path) -> None:
    """From a corpus to a conversation; what the script says is what transformers generate."""
    code, output = launch.pretrain(run_file(True), tmp_path / "run", "--set", "training.steps=10")
    assert code == 0, output
    folder = tmp_path / "export"
    export(tmp_path / "run" / "checkpoints", folder)
    words = [sys.executable, "examples/chat.py", folder, "--temperature", "0", "--tokens", "8"]
    done = subprocess.run(
        words, cwd=ROOT, input="alpha beta\n\none two\n", capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for text, line in zip(("alpha beta", "one two"), done.stdout.splitlines(), strict=True):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        made = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=8, do_sample=False)
        wanted = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert line.split() == wanted.split() and wanted.split()
    words[-1] = "32"
    done = subprocess.run(words, cwd=ROOT, input="", capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 2 and "between 1 and 31" in done.stderr


def test_trainer(launch: Launcher, tmp_path: Path) -> None:
    """MocteTrainer goes on, under each launcher; experts emerge and freeze, and what it saves is what was trained."""
    code, output = launch("examples/trainer.py", "--out", tmp_path, "--steps", 40, "--stop-after", 16)
    assert code == 0 and len(re.findall(r"^\d+ emergence ", output, re.MULTILINE)) == 2, output
    assert (tmp_path / "checkpoint-16").is_dir() and not (tmp_path / "model").exists()
    code, output = launch(
        "examples/trainer.py", "--out", tmp_path, "--steps", 40, "--stop-after", 18, through="torchrun"
    )
    assert code == 0 and (tmp_path / "checkpoint-18").is_dir() and "emergence" not in output, output
    code, output = launch("examples/trainer.py", "--out", tmp_path, "--steps", 40, through="accelerate")
    steps = _resumed(code, output)
    log = read_run(tmp_path)
    assert [row["step"] for row in log.metrics] == list(range(1, 41)) and len(log.of_kind("resume")) == 2
    assert [event["step"] for event in log.of_kind("freeze")] == steps


def _resumed(code: int, output: str) -> list[int]:
    """Steps at which a run that went on from a checkpoint froze experts; it has exported what it trained."""
    assert code == 0 and not re.search(r"^\d+ emergence ", output, re.MULTILINE), output
    steps = [int(step) for step in re.findall(r"^(\d+) freeze ", output, re.MULTILINE)]
    assert steps and min(steps) > 16 and "'frozen'" in output, output
    (difference,) = re.findall(r"MocteBlocksForCausalLM from .*: logits differ by at most (\S+)", output)
    assert float(difference) < 1e-4, output
    return steps
