"""What the end-to-end tests share: tiny data, and a way to start the real `deepspeed` launcher."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mocte_ds.data import prepare, train_tokenizer
from mocte_ds.dist.shared_memory import SHARED_MEMORY
from tests.scripts import run_script
from tests.spawn import free_port

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 150.0
LAUNCHERS = {
    "deepspeed": "deepspeed --log_level error --master_port {port} --num_accelerators {processes}",
    "torchrun": "torchrun --master_port {port} --nproc-per-node {processes}",
    "accelerate": "accelerate launch --use_deepspeed --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--main_process_port {port} --num_processes {processes}",
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of made-up text with different words, tokenised."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {
        "letters": ["alpha", "beta", "gamma", "delta", "omega"],
        "numbers": ["one", "two", "three", "four", "five"],
    }
    rng = random.Random(0)
    (folder / "corpus").mkdir()
    for domain, vocabulary in words.items():
        lines = [json.dumps({"text": " ".join(rng.choices(vocabulary, k=60))}) for _ in range(80)]
        (folder / "corpus" / f"{domain}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer(folder / "corpus", folder / "tokenizer.model", 300)
    prepare(folder / "corpus", folder / "data", tokenizer, validation_share=0.2, workers=1, progress=False)
    return folder / "data"


def _run_values(prepared: Path, blocks: bool) -> dict:
    deepspeed = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5000},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    if blocks:
        deepspeed["mocte"] = {
            "modules": "model.layers.*.mlp",
            "num_experts": 4,
            "ep_size": 2,
            "check_every": 0.1,
            "router": {"kind": "token", "bias": False},
            "spectrum": {"rank": 4, "rows": 128, "documents": 64},
            "clusters": {"deadline": 0.3},
            "freeze": {"rows": 32, "iterations": 4},
            "checkpoint": {"async_save": True},
        }
    return {
        "model": {
            "preset": "quickstart",
            "vocab_size": 304,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
        },
        "data": {"prepared": str(prepared)},
        "training": {
            "steps": 20,
            "batch_tokens": 512,
            "micro_batch": 4,
            "learning_rate": 3e-3,
            "checkpoint_every": 6,
        },
        "evaluation": {"every": 5, "sequences_per_domain": 3},
        "deepspeed": deepspeed,
    }


@pytest.fixture
def run_file(prepared: Path, tmp_path: Path) -> Callable[[bool], Path]:
    """Writes a run file with or without blocks."""

    def write(blocks: bool) -> Path:
        path = tmp_path / f"{'blocks' if blocks else 'dense'}.yaml"
        path.write_text(yaml.safe_dump(_run_values(prepared, blocks)), encoding="utf-8")
        return path

    return write


def _buffers(port: object) -> list[Path]:
    """What a run with that port has in shared memory, or has left there."""
    return list(SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


class Launcher:
    """Starts scripts on two processes: through `deepspeed`, or forked where the start is not what is tested."""

    def start(
        self, *arguments: object, before: str = "", processes: int = 2, through: str = "deepspeed"
    ) -> subprocess.Popen:
        """Start in the repository's root; ``before`` is a shell command in front, e.g. a limit."""
        port = free_port()
        while _buffers(port):  # of a run that had this port and was killed
            port = free_port()
        program, *options = LAUNCHERS[through].format(port=port, processes=processes).split()
        command = [Path(sys.executable).parent / program, *options, *arguments]
        shell = ["bash", "-c", f'{before or ":"}; exec "$@"', "bash", *map(str, command)]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            shell,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen) -> tuple[int, str]:
        """Exit code and output; what hangs is ended."""
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"no end within {LIMIT:.0f} s:\n{output[-3000:]}")
        place = next(n for n, word in enumerate(process.args) if word in ("--master_port", "--main_process_port"))
        left = _buffers(process.args[place + 1])
        assert not left, f"the run left {left} in memory:\n{output[-3000:]}"
        return process.returncode, output

    def __call__(self, *arguments: object, before: str = "", through: str = "deepspeed") -> tuple[int, str]:
        """Start and wait."""
        return self.finish(self.start(*arguments, before=before, through=through))

    def pretrain(self, run: Path, out: Path, *more: object, **options: Any) -> tuple[int, str]:
        """launch/pretrain.py on two ranks without the launcher's own start; see :func:`tests.scripts.run_script`."""
        return run_script("launch/pretrain.py", "--run", run, "--out", out, *more, timeout=LIMIT, **options)


@pytest.fixture
def launch(deepspeed_op: Path) -> Launcher:
    """The launcher; the op that DeepSpeed compiles is there already."""
    return Launcher()


def read_log(folder: Path, name: str = "metrics") -> list[dict]:
    """Lines of a run's log."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and len(read_log(folder)) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached")
