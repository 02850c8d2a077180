"""What the figures draw is what the logs say, recomputed here from the written logs alone."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mocte_ds.report.figures import ALL, drawn
from mocte_ds.report.figures.trainability import series
from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Run
from tests.report.synthetic import DOMAINS, write_run

Logs = dict[str, Any]


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [axis for axis in figure.axes if axis.get_title(loc="left") == title]
    return found


def points(line: Line2D) -> np.ndarray:
    """(n, 2) where a line goes through."""
    return np.stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)], axis=1)


def curve(axis: Axes, x: list, y: list) -> Line2D:
    """The one line of an axis that goes through given points."""
    wanted = np.array([x, y], dtype=float).T
    fits = [line for line in axis.lines if len(points(line)) == len(wanted) and np.allclose(points(line), wanted)]
    assert len(fits) == 1
    return fits[0]


def marks(axis: Axes, marker: str) -> list[tuple[float, float]]:
    """Places of the single marks of one kind."""
    found = [points(line) for line in axis.lines if line.get_marker() == marker]
    return [(float(place[0, 0]), float(place[0, 1])) for place in found if len(place) == 1]


def upright(axis: Axes) -> set[float]:
    """Places of the dashed lines."""
    found = [points(line) for line in axis.lines if line.get_linestyle() == "--"]
    return {float(place[0, 0]) for place in found if len(place) == 2}


def of_kind(logs: Logs, kind: str, block: int | None = None) -> list[dict[str, Any]]:
    return [e for e in logs["events"] if e["event"] == kind and block in (None, e.get("block"))]


def entries(logs: Logs, block: int) -> list[tuple[int, dict[str, Any]]]:
    """(tokens, what the check says of a block) of all checks."""
    return [(check["tokens"], check["blocks"][block]) for check in of_kind(logs, "check")]


def test_loss(run: Run, logs: Logs) -> None:
    figure = drawn(ALL["loss"], run, False)
    loss, strip = figure.axes
    rows = logs["metrics"]
    curve(loss, [row["tokens"] for row in rows], [row["loss"] for row in rows])
    validated = [row for row in rows if "validation" in row]
    assert len(validated) == 12
    for domain in [*DOMAINS, "mean"]:
        curve(loss, [row["tokens"] for row in validated], [row["validation"][domain] for row in validated])
    assert upright(loss) == {event["tokens"] for event in of_kind(logs, "emergence")}
    for kind, marker, height in (("emergence", "o", 2), ("freeze", "v", 1), ("thaw", "^", 0)):
        assert sorted(marks(strip, marker)) == sorted((event["tokens"], height) for event in of_kind(logs, kind))
    names = [label.get_text() for label in strip.get_yticklabels()]
    assert names == ["thaw (1)", "freeze (2)", "emergence (2)"]
    # The two emergences and the two freezes are too close to each other for names.
    assert sorted(text.get_text() for text in strip.texts) == ["2×", "2×", "b0e0"]


def test_clocks(run: Run, logs: Logs) -> None:
    figure = drawn(ALL["clocks"], run, True)
    rows, losses = logs["metrics"], [row["loss"] for row in logs["metrics"]]
    seconds = np.cumsum([row["seconds"] for row in rows])
    curve(panel(figure, "by tokens"), [row["tokens"] / 1e3 for row in rows], losses)
    curve(panel(figure, "by computation"), [row["flops"] / 1e14 for row in rows], losses)
    curve(panel(figure, "by wall time"), list(seconds), losses)
    at = [i for i, row in enumerate(rows) if "validation" in row]
    curve(panel(figure, "by wall time"), list(seconds[at]), [rows[i]["validation"]["mean"] for i in at])


def test_spectrum(run: Run, logs: Logs) -> None:
    figure = drawn(ALL["spectrum"], run, False)
    for block in (0, 1):
        axis = panel(figure, run.blocks[block])
        checks = entries(logs, block)
        birth = of_kind(logs, "emergence", block)[0]["tokens"]
        for entry in (checks[0][1], dict(checks)[birth], checks[-1][1]):
            values = np.array(entry["singular_values"]) / np.sqrt(entry["rows"] - 1)
            curve(axis, list(range(1, 9)), list(values))
        assert {text.get_text() for text in axis.texts} == {"first check", "emergence", "last check"}


def test_clusters(run: Run, logs: Logs) -> None:
    figure = drawn(ALL["clusters"], run, True)
    for block in (0, 1):
        count = panel(figure, run.blocks[block])
        index = figure.axes[figure.axes.index(count) + 1]
        checks = entries(logs, block)
        curve(count, [tokens for tokens, _ in checks], [entry["clusters"] for _, entry in checks])
        for good in (True, False):
            some = [(tokens, entry["clusters"]) for tokens, entry in checks if entry["found"] is good]
            assert curve(count, [x for x, _ in some], [y for _, y in some]).get_marker() == "o"
        for key in ("silhouette", "stability", "nmi", "purity"):
            known = [(tokens, entry[key]) for tokens, entry in checks if entry[key] is not None]
            if key == "silhouette":
                known = [(tokens, entry[key]) for tokens, entry in checks if entry["clusters"] > 1]
            x, y = [at for at, _ in known], [value for _, value in known]
            assert curve(index, x, y).get_alpha() == 0.3
            curve(index, x, [np.mean(y[max(0, i - 4) : i + 1]) for i in range(len(y))])
        assert upright(count) == upright(index) == {of_kind(logs, "emergence", block)[0]["tokens"]}
        thresholds = {points(line)[0, 1] for line in index.lines if line.get_linestyle() == ":"}
        assert thresholds == {0.35, 0.6}


def test_projection(run: Run, logs: Logs) -> None:
    figure = drawn(ALL["projection"], run, False)
    for block in (0, 1):
        last = of_kind(logs, "projection", block)[-1]
        places = np.array(last["points"])
        for what, of, prefix in (("cluster", np.array(last["cluster"]), "cluster "), ("domain", last["domain"], "")):
            axis = panel(figure, f"{run.blocks[block]}, by {what}")
            shown = {}
            for cloud in axis.collections:
                name, _, size = str(cloud.get_label()).rpartition(" ")
                shown[name] = np.array(cloud.get_offsets())
                assert size == f"({len(shown[name])})"
            assert set(shown) == {f"{prefix}{value}" for value in set(of)}
            for value in set(of):
                assert np.allclose(shown[f"{prefix}{value}"], places[np.array(of) == value])
            assert len(axis.get_legend().get_texts()) == len(shown) == len(axis.texts)


def test_domains(run: Run, logs: Logs) -> None:
    figure = drawn(ALL["domains"], run, False)
    for block in (0, 1):
        axis, (_, last) = panel(figure, run.blocks[block]), entries(logs, block)[-1]
        shares = np.array([last["domain_load"][name] for name in DOMAINS])
        assert np.allclose(axis.images[0].get_array(), 100 * shares)
        assert [label.get_text() for label in axis.get_yticklabels()] == DOMAINS
        texts = [text.get_text() for text in axis.texts]
        assert texts[:12] == [f"{100 * value:.0f}" for value in shares.flatten()]
        assert texts[12:] == [f"{100 * value:.0f} %" for value in shares.max(axis=1)] + ["purity"]


def test_load(run: Run, logs: Logs) -> None:
    figure = drawn(ALL["load"], run, False)
    for block in (0, 1):
        axis = panel(figure, run.blocks[block])
        load = np.array([row["expert_load"][block] for row in logs["metrics"]], dtype=float)
        pairs = load.reshape(60, 2, 3).sum(axis=1)
        total = pairs.sum(axis=1, keepdims=True)
        expected = np.divide(3 * pairs, total, out=np.full_like(pairs, np.nan), where=total > 0).T
        shown = np.ma.filled(axis.collections[0].get_array(), np.nan).reshape(3, 60)
        assert np.allclose(shown, expected, equal_nan=True)
        for kind, marker in (("freeze", "v"), ("thaw", "^")):
            events = of_kind(logs, kind, block)
            assert sorted(marks(axis, marker)) == sorted((event["tokens"], event["expert"]) for event in events)


def test_trainability(run: Run, logs: Logs) -> None:
    figure = drawn(ALL["trainability"], run, True)
    for block in (0, 1):
        axis, checks = panel(figure, run.blocks[block]), entries(logs, block)
        for expert in range(3):
            known = [(tokens, entry["experts"][expert]["lambda"]) for tokens, entry in checks]
            x, y = zip(*[(tokens, value) for tokens, value in known if value is not None], strict=True)
            curve(axis, list(x), list(y))
            curve(axis, list(x), [sum(y[max(0, i - 2) : i + 1]) / len(y[max(0, i - 2) : i + 1]) for i in range(len(y))])
        for kind, marker in (("freeze", "v"), ("thaw", "^")):
            events = of_kind(logs, kind, block)
            assert sorted(marks(axis, marker)) == sorted((event["tokens"], event["lambda"]) for event in events)
        assert upright(axis) == {of_kind(logs, "emergence", block)[0]["tokens"]}
    # Expert 0 of block 0 has thawed, expert 1 of block 1 has not.
    assert [text.get_text() for text in panel(figure, run.blocks[0]).texts] == ["e0", "e1", "e2"]
    assert "e1 frozen" in [text.get_text() for text in panel(figure, run.blocks[1]).texts]


def test_a_repeated_lambda_is_no_measurement(tmp_path: Path) -> None:
    logs = write_run(tmp_path, steps=60, budget=60, freezes=False)
    checks = of_kind(logs, "check")
    for check in checks[40:]:
        check["blocks"][0]["experts"][1]["lambda"] = checks[39]["blocks"][0]["experts"][1]["lambda"]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in logs["events"]))
    crippled = read_run(tmp_path)
    assert series(crippled, 0, 1)[0][-1] == checks[39]["tokens"]
    assert series(crippled, 0, 0)[0][-1] == checks[-1]["tokens"]


def test_optimizer(run: Run, logs: Logs) -> None:
    (axis,) = drawn(ALL["optimizer"], run, False).axes
    rows = logs["metrics"]
    curve(axis, [row["tokens"] for row in rows], [max(row["optimizer_bytes_by_rank"]) / 1e6 for row in rows])
    assert [text.get_text() for text in axis.texts] == ["ranks 0 and 1"]
    for kind, marker in (("freeze", "v"), ("thaw", "^")):
        after = [(e["tokens"], size / 1e6) for e in of_kind(logs, kind) for size in e["optimizer_bytes_by_rank_after"]]
        assert np.allclose(sorted(marks(axis, marker)), sorted(after))
    assert upright(axis) == {event["tokens"] for event in of_kind(logs, "emergence")}


def test_ranks_that_differ_have_lines_and_marks_of_their_own(tmp_path: Path) -> None:
    logs = write_run(tmp_path, steps=10, budget=60, ranks=3, emergences=False)
    for row in logs["metrics"]:
        row["optimizer_bytes_by_rank"] = [4_000_000, 8_000_000 if row["step"] <= 5 else 6_000_000, 4_000_000]
    freeze = {"event": "freeze", "step": 5, "block": 0, "expert": 1, "reason": "called"}
    before, after = (logs["metrics"][step]["optimizer_bytes_by_rank"] for step in (4, 5))
    event = {**freeze, "optimizer_bytes_by_rank_before": before, "optimizer_bytes_by_rank_after": after}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs["metrics"]))
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    (axis,) = drawn(ALL["optimizer"], read_run(tmp_path), False).axes
    assert {text.get_text() for text in axis.texts} == {"ranks 0 and 2", "rank 1"}
    assert marks(axis, "v") == [(logs["metrics"][4]["tokens"], 6.0)]


def test_flops(run: Run, logs: Logs) -> None:
    (axis,) = drawn(ALL["flops"], run, False).axes
    ledger = logs["ledger"]
    names = [label.get_text().replace(" ", "_") for label in axis.get_yticklabels()]
    shown = {names[int(height)]: share for share, height in marks(axis, "o")}
    wanted = {name: value / ledger["total"] for name, value in ledger.items() if name != "total"}
    wanted["wgrad_saved"] = 0.012 / 1.012  # of what would have been spent without freezing
    assert shown == pytest.approx(wanted)
    assert {"33.40 %", "32.90 %", "0.070 %", "0.00020 %", "1.19 %", "3.00 %"} <= {
        text.get_text() for text in axis.texts
    }


def test_a_cluster_number_that_no_run_has_takes_no_memory(tmp_path: Path) -> None:
    """A damaged log may have any number; only what has points is drawn, in the colour of its number."""
    logs = write_run(tmp_path)
    for event in of_kind(logs, "projection"):
        event["cluster"] = [10**12 if number == 1 else number for number in event["cluster"]]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in logs["events"]))
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    try:
        figure = drawn(ALL["projection"], read_run(tmp_path), False)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    for block in range(2):
        last = of_kind(logs, "projection", block)[-1]
        axis = panel(figure, f"{read_run(tmp_path).blocks[block]}, by cluster")
        legend = [text.get_text() for text in axis.get_legend().get_texts()]
        assert legend == [f"cluster {n} ({last['cluster'].count(n)})" for n in sorted(set(last["cluster"]))]
