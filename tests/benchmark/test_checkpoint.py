"""The benchmark of checkpoints: sizes against arithmetic, memory that is really used, refusals."""

import json
import resource
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mocte_ds.benchmark import checkpoint, load
from mocte_ds.benchmark.measure.disk import measure_disk
from mocte_ds.benchmark.measure.memory import Peak
from mocte_ds.errors import MocteError
from tests.spawn import spawn
from tools.benchmark import main

D, WIDTH, LAYERS, EXPERTS, VOCAB = 32, 96, 2, 4, 1024
SIZES = {"d": D, "width": WIDTH, "layers": LAYERS, "experts": EXPERTS, "context": 16, "repeats": 1, "device": "cpu"}


def arguments(folder: Path, *options: Any) -> list[str]:
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", size)]
    return [str(word) for word in ("checkpoint", *sizes, "--folder", folder, *options)]


def test_a_small_run(tmp_path, capsys, monkeypatch) -> None:
    # Processes that have imported everything already; their own start is tested with the benchmark of freezing.
    monkeypatch.setattr(checkpoint, "run_ranks", partial(spawn, deepspeed=True))
    assert main(arguments(tmp_path, "--json", "--time-limit", 60)) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    expert = 3 * D * WIDTH
    trained = 2 * VOCAB * D + LAYERS * (4 * D * D + 2 * D) + D + LAYERS * EXPERTS * expert
    size = numbers["checkpoint"]["bytes"]
    # Weights in bf16, three numbers in fp32 of each that trains; what else lies there is small but for the sizes here.
    assert numbers["checkpoint"]["parameters"] == trained
    assert 14 * trained < size < 14 * trained + 200_000
    assert numbers["exported_as"] == "MixtralForCausalLM"
    parts, disk = numbers["parts"], numbers["disk"]
    assert list(parts) == ["save", "save beside training", "load", "reshape", "export"]
    for name, part in parts.items():
        assert part["bytes_per_second"] == pytest.approx(part["bytes"] / part["seconds"])
        assert part["of_disk"] == pytest.approx(part["bytes_per_second"] / disk["read" if name == "load" else "write"])
        assert len(part["times"]) == SIZES["repeats"] and part["seconds"] == min(part["times"])
        memory = part["memory"]
        assert memory["peak_bytes"] >= memory["before_bytes"] > 50e6
        assert memory["of_checkpoint"] == pytest.approx(memory["added_bytes"] / size)
        assert part["bytes"] == size or name in ("reshape", "export")
    assert abs(parts["reshape"]["bytes"] - size) < 100_000
    # The weights, each once, and the file of the blocks' states.
    assert 2 * trained < parts["export"]["bytes"] < 2 * trained + 100_000
    for name in ("reshape", "export"):
        assert 0 < parts[name]["cpu_seconds"] and 0 < parts[name]["start_up_seconds"]
    beside = parts["save beside training"]
    assert 0 < beside["in_step"] < beside["seconds"] and beside["steps_beside"] >= 0 and beside["step"] > 0
    text = load("checkpoint").text(numbers)
    assert "export: " in text and " s of processor time" in text
    assert "2 ranks, ep_size 2, bf16" in text and "save beside training" in text and "of the step" in text


def test_peak_is_of_the_time_since_its_start() -> None:
    first = np.ones(40_000_000)  # 320 MB
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del first
    peak = Peak()
    assert peak.to_dict()["peak_bytes"] < largest - 200e6
    second = np.ones(20_000_000)
    kept = peak.to_dict()["kept_bytes"]
    del second
    found = peak.to_dict()
    assert 150e6 < found["added_bytes"] < 220e6 and kept > 150e6 and found["kept_bytes"] < 50e6
    assert found["peak_bytes"] == found["before_bytes"] + found["added_bytes"]


def test_disk_is_written_by_all_ranks_together(tmp_path) -> None:
    found = spawn(measure_disk, 2, str(tmp_path), 50_000_000, 2)
    assert [rank["bytes"] for rank in found] == [5 << 22] * 2 and not list(tmp_path.iterdir())
    assert all(seconds > 0 for rank in found for seconds in rank["seconds"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", 0), "--ranks 0"),
        (("--ep", 3), "ep_size"),
        (("--folder", "nowhere"), "--folder nowhere is not a folder"),
        (("--width", 2**24), "needs about"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, message, tmp_path) -> None:
    with pytest.raises(MocteError, match=message):
        main(arguments(tmp_path, *options))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1_000_000))
    with pytest.raises(MocteError, match=r"needs 6 MB in .* for all parts, and 1 MB are free"):
        main(arguments(tmp_path))
    assert not list(tmp_path.iterdir())
