"""Loss spikes, the pace of ranks, and the text for Prometheus."""

from pathlib import Path

import numpy as np
import pytest

from mocte_ds.watch.pace import Pace
from mocte_ds.watch.prometheus import FILE, Prometheus, text_of
from mocte_ds.watch.spikes import LossSpikes


def test_spikes() -> None:
    rng = np.random.default_rng(0)
    losses = 4 * np.exp(-np.arange(400) / 150) + 2 + rng.normal(0, 0.02, 400)
    losses[[200, 300]] += 1.0
    spikes = LossSpikes(6.0)
    found = {step: told for step, loss in enumerate(losses) if (told := spikes.see(float(loss)))}
    assert list(found) == [200, 300], "a loss that falls, with noise, has no others"
    window = losses[268:300]
    spread = 1.4826 * np.median(np.abs(window - np.median(window)))
    assert found[300]["median"] == pytest.approx(np.median(window))
    assert found[300]["deviations"] == pytest.approx((losses[300] - np.median(window)) / spread)


def test_spikes_at_the_start_and_off() -> None:
    assert not any(map(LossSpikes(6.0).see, [3.0, 9.0, 3.0, 9.0]))
    spikes = LossSpikes(0.0)
    assert not any(spikes.see(loss) for loss in [3.0] * 70 + [99.0])


def test_pace() -> None:
    rows = np.random.default_rng(0).uniform(1, 2, (50, 3))
    rows[:, 1] += 1
    pace = Pace()
    told = [pace.see(row.tolist()) for row in rows]
    assert all(facts["slowest_rank"] == 1 for facts in told)
    assert told[7]["rank_seconds"] == pytest.approx(rows[7], abs=1e-4)
    summary = pace.percentiles()
    assert summary["rank_seconds_p50"] == pytest.approx(np.median(rows, axis=0), abs=1e-4)
    assert summary["rank_seconds_p95"] == pytest.approx(np.quantile(rows, 0.95, axis=0), abs=1e-4)
    assert summary["slowest_of_last"] == [0, 50, 0]


def test_prometheus(tmp_path: Path) -> None:
    row = {"step": 3, "loss": 2.5, "grad_norm": None, "validation": {'a "b"': 1.25}}
    lines = text_of(row, "run\\1").splitlines()
    assert 'mocte_loss{run="run\\\\1"} 2.5' in lines and not [line for line in lines if "grad_norm" in line]
    assert 'mocte_validation_loss{run="run\\\\1",domain="a \\"b\\""} 1.25' in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and all(line[0] == "#" or " " in line for line in lines)
    file = Prometheus(tmp_path)
    for step in range(3):
        file.step({"step": step}, last=step == 2)
        assert f"}} {2 if step == 2 else 0}.0" in (tmp_path / FILE).read_text()
