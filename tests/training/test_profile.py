"""--profile: which steps, and which part of the model an operation belongs to, forward and backward."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mocte_ds.errors import ConfigError
from mocte_ds.training.profile import UNNAMED, Profile, parts_text, read_steps
from mocte_ds.watch import HEART, part, phase


class Small(nn.Module):
    """Two layers and a head that takes nearly all of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.ReLU()}) for _ in range(2))
        self.head = nn.Linear(8, 20000)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["second"](layer["first"](x))
        with part("inside"):
            x = x * 2
        return self.head(x)


@pytest.mark.parametrize(("text", "steps"), [("20", range(20, 21)), ("3-5", range(3, 6)), ("1-30", range(1, 31))])
def test_steps(text: str, steps: range) -> None:
    assert read_steps(text, 30) == steps


@pytest.mark.parametrize("text", ["", "0", "x", "5-3", "3-", "-3", "30-31", "1-2-3", "1.5"])
def test_no_steps(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--profile {text}: .*between 1 and 30"):
        read_steps(text, 30)


def test_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(512, 8)
    profile = Profile(range(2, 4), model, tmp_path, 0, "a test")
    found, calls = [], 0
    for step in range(1, 5):
        profile.begin(step)
        marked = HEART.mark is not None
        assert marked == (step in (2, 3))
        with phase("forward"):
            loss = model(x).sum()
        with phase("backward"):
            loss.backward()
        if step == 3:
            time.sleep(0.05)
        calls += marked
        found.append(profile.end(step))
    assert HEART.mark is None and not any(module._forward_hooks for module in model.modules())
    result = found.pop(2)
    assert found == [None] * 3 and calls == result["steps"] == 2
    parts = result["parts"]
    assert {"first", "second", "inside", "head", "forward", "backward", UNNAMED} == parts.keys()
    assert sum(map(sum, parts.values())) == pytest.approx(result["seconds"])
    assert parts[UNNAMED][0] >= 0.05
    # A product's backward pass is two products; sum's node belongs to the phase around the model.
    assert all(parts[name][0] > 0 and parts[name][1] > 0 for name in ("first", "second", "inside", "head", "forward"))
    assert min(parts["head"]) > 3 * max(*parts["first"], *parts["second"], *parts["inside"])
    assert parts["backward"][0] == 0
    rows = parts_text(result).splitlines()
    assert len(rows) >= 8 and rows[0].split()[:2] == ["part", "forward"]
    with gzip.open(tmp_path / "profile" / "rank-0.json.gz", "rt", encoding="utf-8") as trace:
        names = [event.get("name") for event in json.load(trace)["traceEvents"]]
    assert names.count("mocte: head") == names.count("aten::addmm") / 3 == 2


class Slow(TorchDispatchMode):
    """As the counters of FLOPs, with more time in Python after each operation, that which begins a mark included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        time.sleep(0.005)
        return result


def test_time_in_python_around_operations_counts_once(tmp_path: Path) -> None:
    model, x = Small(), torch.randn(512, 8)
    profile = Profile(range(1, 2), model, tmp_path, 0, "a test")
    profile.begin(1)
    with phase("forward"), Slow():
        model(x)
    found = profile.end(1)
    assert found is not None
    assert sum(map(sum, found["parts"].values())) == pytest.approx(found["seconds"])


class Sent(torch.autograd.Function):
    """Its backward pass has a mark of its own, as an exchange has, and is long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with phase("sent"):
            return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with phase("sent"):
            for _ in range(50):
                gradient = gradient.clone()
            return gradient


def test_marks_within_the_backward_pass_are_backward(tmp_path: Path) -> None:
    model, x = Small(), torch.randn(512, 8)
    for name in ("backward", "any other"):  # a device's gradients are made in a thread without marks of the main one
        profile = Profile(range(1, 2), model, tmp_path, 0, "a test")
        profile.begin(1)
        loss = Sent.apply(model(x)).sum()
        with phase(name):
            loss.backward()
        found = profile.end(1)
        assert found is not None
        forward, backward = found["parts"]["sent"]
        assert backward > 5 * forward > 0


def test_a_run_that_ends_within_the_range_writes_what_it_has(tmp_path: Path) -> None:
    profile = Profile(range(2, 9), Small(), tmp_path, 0, "a test")
    for step in (1, 2, 3):
        profile.begin(step)
        found = profile.end(step, stops=step == 3)
        assert (found is not None) == (step == 3)
    assert found["steps"] == 2 and HEART.mark is None
    assert (tmp_path / "profile" / "rank-0.json.gz").is_file()
    assert Profile(range(5, 6), Small(), tmp_path, 0, "a test").end(3, stops=True) is None


def test_a_step_that_was_skipped_and_comes_again_is_one_step(tmp_path: Path) -> None:
    profile = Profile(range(2, 4), Small(), tmp_path, 0, "a test")
    for step in (2, 2, 3, 3, 3):
        profile.begin(step)
    found = profile.end(3)
    assert found is not None and found["steps"] == 2


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "rank-0.json.gz").write_text("somebody's")
    profile = Profile(range(1, 2), Small(), tmp_path, 0, "a test")
    profile.begin(1)
    assert profile.end(1)
    assert "no trace of rank 0 was written" in caplog.text and "rank-0.json.gz" in caplog.text
    assert (tmp_path / "profile" / "rank-0.json.gz").read_text() == "somebody's"
