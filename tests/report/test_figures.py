"""Every figure has named axes with units, its sample size, a legend beside the data, and nothing that is cut off."""

import copy
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from mocte_ds.report.figures import ALL, drawn
from mocte_ds.report.figures.labels import label_clouds, push_apart
from mocte_ds.report.figures.layout import sheet
from mocte_ds.report.figures.palette import category_color, category_marker
from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Run
from tests.report.synthetic import write_run

BOTH = [(name, narrow) for name in ALL for narrow in (False, True)]
LABELS = {
    "loss": {"tokens seen (thousand)", "loss (nats per token)", "event (count)"},
    "clocks": {"tokens seen (thousand)", "training FLOPs (1e14)", "wall time (seconds)", "loss (nats per token)"},
    "spectrum": {"singular direction (rank)", "standard deviation\n(feature units, log)"},
    "clusters": {"tokens seen (thousand)", "clusters K\n(count)", "index (no unit)"},
    "projection": {"first direction (feature units)", "second direction\n(feature units)"},
    "domains": {"expert (number)", "domain", "load (% of the\ndomain's tokens)"},
    "load": {"tokens seen (thousand)", "expert (number)", "load (1 = even share)"},
    "trainability": {"tokens seen (thousand)", "trainability λ\n(per token)"},
    "optimizer": {"tokens seen (thousand)", "optimizer state (MB)"},
    "flops": {"share of all FLOPs (%, log)", "component"},
}
SAMPLES = {
    "loss": "n = 120 steps of 8,192 tokens; 12 validations of 4 domains, at most 8 × 128 tokens each",
    "clocks": "n = 120 steps of 8,192 tokens; 12 validations of 4 domains, at most 8 × 128 tokens each",
    "spectrum": "n = 2,048 sampled tokens per check and block",
    "clusters": "n = 412 to 418 documents per check; 60 checks",
    "projection": "n = 300 documents per block",
    "domains": "n = 1,536 sampled tokens per block",
    "load": "n = 102 to 108 steps with experts, every routed token; a column adds up 2 steps",
    "trainability": "n = 51 to 54 measurements per expert, each on at most 256 of its tokens per rank",
    "optimizer": "n = 120 steps on 2 ranks",
    "flops": "n = 120 steps, 2.520e+14 FLOPs in all",
}
LEGENDS = {
    "loss": ["training, every step", "emergence"],
    "clocks": ["training", "validation, mean of the domains"],
    "clusters": ["accepted", "not accepted", "each check", "mean of 5 checks", "least for emergence", "emergence"],
    "load": ["warm-up", "freeze", "thaw"],
    "trainability": ["each check", "mean of 3 checks", "emergence", "freeze", "thaw"],
    "optimizer": ["emergence", "freeze", "thaw"],
    "flops": ["the model's own work", "what MO-CTE adds", "saved by freezing", "beside training"],
}


@pytest.fixture(scope="module")
def figure(run: Run):  # noqa: ANN201
    """Draw a figure of the finished run by its name, each only once."""

    @cache
    def draw(name: str, narrow: bool) -> Figure:
        made = drawn(ALL[name], run, narrow)
        made.draw_without_rendering()
        return made

    return draw


def labels(figure: Figure) -> set[str]:
    return {text for axis in figure.axes for text in (axis.get_xlabel(), axis.get_ylabel()) if text}


def test_every_required_figure_exists() -> None:
    assert set(ALL) == set(LABELS) == set(SAMPLES)


@pytest.mark.parametrize(("name", "narrow"), BOTH)
def test_axes_have_names_and_units(figure, name: str, narrow: bool) -> None:  # noqa: ANN001
    made = figure(name, narrow)
    assert labels(made) == LABELS[name]
    # Panels that have no name of their own stand above or right of one that has it.
    for axis in made.axes:
        spec = axis.get_subplotspec()
        if spec is None:
            continue
        column = [other for other in made.axes if _column(other) == _column(axis)]
        assert any(other.get_xlabel() for other in column)
        assert any(other.get_ylabel() for other in made.axes if _row(other) == _row(axis))


def _column(axis: Axes) -> int | None:
    spec = axis.get_subplotspec()
    return spec.colspan.start if spec else None


def _row(axis: Axes) -> int | None:
    spec = axis.get_subplotspec()
    return spec.rowspan.start if spec else None


@pytest.mark.parametrize(("name", "narrow"), BOTH)
def test_the_sample_size_stands_below(figure, name: str, narrow: bool) -> None:  # noqa: ANN001
    assert figure(name, narrow).get_supxlabel().replace("\n", " ") == SAMPLES[name]


@pytest.mark.parametrize(("name", "narrow"), BOTH)
def test_legends_say_what_is_there_and_cover_nothing(figure, name: str, narrow: bool) -> None:  # noqa: ANN001
    made = figure(name, narrow)
    assert [text.get_text() for legend in made.legends for text in legend.get_texts()] == LEGENDS.get(name, [])
    boxes = [legend.get_window_extent() for legend in made.legends]
    boxes += [axis.get_legend().get_window_extent() for axis in made.axes if axis.get_legend()]
    for box in boxes:
        assert not any(box.overlaps(axis.bbox) for axis in made.axes)


@pytest.mark.parametrize(("name", "narrow"), BOTH)
def test_no_text_is_cut_off(figure, name: str, narrow: bool) -> None:  # noqa: ANN001
    made = figure(name, narrow)
    width, height = made.bbox.width, made.bbox.height
    texts = [text for text in made.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_visible()]
    assert texts
    for text in texts:
        box = text.get_window_extent()
        if text.get_text() and not _is_hidden_tick(made, text):
            assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text.get_text()


def _is_hidden_tick(figure: Figure, text) -> bool:  # noqa: ANN001
    """Whether a text is the label of a tick outside of its axis, which is not drawn."""
    for axis in figure.axes:
        for one, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            for tick in one.get_major_ticks() + one.get_minor_ticks():
                if text in (tick.label1, tick.label2):
                    return not min(low, high) <= tick.get_loc() <= max(low, high)
    return False


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["loss", "clusters", "trainability", "spectrum", "projection"])
def test_names_beside_lines_and_clouds_do_not_overlap(figure, name: str, narrow: bool) -> None:  # noqa: ANN001
    for axis in figure(name, narrow).axes:
        # An annotation's own extent has its leader line in it.
        boxes = [Text.get_window_extent(text) for text in axis.texts]
        for place, box in enumerate(boxes):
            assert not any(_overlap(box, other) > 1.5 for other in boxes[place + 1 :])


def _overlap(one, other) -> float:  # noqa: ANN001
    """Pixels that two boxes share in the direction in which they share less."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    return min(wide, min(one.y1, other.y1) - max(one.y0, other.y0))


def test_names_are_pushed_apart_no_further_than_needed() -> None:
    placed = push_apart(np.array([10.0, 0.0, 9.0, 50.0]), 6.0)
    assert placed == pytest.approx([12.5, 0.0, 6.5, 50.0])
    assert push_apart(np.array([]), 6.0).size == 0


def test_names_of_clouds_in_the_same_place_are_lifted_over_each_other() -> None:
    figure = sheet(False, 3.0, "n = 9")
    axis = figure.subplots()
    clouds = [(np.zeros((3, 2)), name, category_color(i)) for i, name in enumerate(["one", "two", "three"])]
    axis.set_xlim(-1, 1)
    axis.set_ylim(-1, 1)
    label_clouds([(axis, clouds)])
    boxes = sorted((Text.get_window_extent(text) for text in axis.texts), key=lambda box: box.y0)
    assert [_overlap(low, high) for low, high in pairwise(boxes)] == pytest.approx([0, 0], abs=0.01)
    assert boxes[0].y0 == pytest.approx(axis.transData.transform((0, 0))[1] - boxes[0].height / 2, abs=1)


def test_a_hundred_categories_look_different() -> None:
    assert len({(category_color(i), category_marker(i)) for i in range(100)}) == 100


def test_captions_tell_what_the_run_did(run: Run) -> None:
    captions = {name: kind.caption(run) for name, kind in ALL.items()}
    assert "2 emergences, 2 freezes and 1 thaw" in captions["loss"]
    assert "Emergences: b0, b1. Freezes: b0e0, b1e1. Thaws: b0e0." in captions["loss"]
    assert "2 freezes, 1 thaw" in captions["trainability"]
    # 72 % at every check, by the way in which these logs are made.
    assert (
        "hold 72.0 % of the features' variance at the first check, 72.0 % at emergence and 72.0 %"
        in captions["spectrum"]
    )
    dense = sum(run.metrics[11]["optimizer_bytes_by_rank"]) / 1e6
    assert f"before there are moments, {dense:.2f} MB with them while the model was dense" in captions["optimizer"]
    assert "983,040 tokens" in captions["clocks"] and "1 min 30 s" not in captions["clocks"]
    assert "90.0 s of wall time" in captions["clocks"]
    for name, kind in ALL.items():
        assert kind.title and kind.reading and "nan" not in captions[name], name


def test_the_spectrum_at_emergence_is_told(run: Run) -> None:
    """Those of block 0 and block 1, which emerge at steps 12 and 18, are the highest of the run."""
    events = copy.deepcopy(run.events)
    for event in events:
        for entry in event.get("blocks") or []:
            if event["step"] == (12, 18)[entry["block"]]:
                entry["explained"] = [0.8 + 0.1 * entry["block"]]
    told = ALL["spectrum"].caption(Run(run.folder, run.metrics, events, facts=run.facts))
    assert "hold 72.0 % of the features' variance at the first check, 80.0 % to 90.0 % at emergence and 72.0 %" in told


def test_a_dense_run_has_the_figures_that_need_no_blocks(dense: Run) -> None:
    found = {name for name, kind in ALL.items() if kind.reason_missing(dense) is None}
    assert found == {"loss", "clocks", "optimizer", "flops"}
    for name in set(ALL) - found:
        assert "dense run" in str(ALL[name].reason_missing(dense))
    for name in found:
        for narrow in (False, True):
            assert len(labels(drawn(ALL[name], dense, narrow))) == len(LABELS[name])


def test_an_early_run_says_what_has_not_come_yet(early: Run) -> None:
    reasons = {name: kind.reason_missing(early) for name, kind in ALL.items()}
    assert {name for name, reason in reasons.items() if reason is None} == {
        *("loss", "clocks", "spectrum", "clusters", "optimizer")
    }
    assert "neither has come yet" in str(reasons["projection"])
    assert "no block routes tokens yet" in str(reasons["domains"]) and reasons["domains"] == reasons["load"]
    assert "not emerged yet" in str(reasons["trainability"])
    assert "ledger" in str(reasons["flops"])
    for name, reason in reasons.items():
        if reason is None:
            assert "n = " in drawn(ALL[name], early, True).get_supxlabel()
            assert ALL[name].caption(early)


@pytest.mark.slow
def test_many_blocks_and_domains_fit(tmp_path: Path) -> None:
    write_run(tmp_path, blocks=7, experts=12, steps=40, budget=40, domains=[f"domain{i}" for i in range(12)])
    crowd = read_run(tmp_path)
    for name, panels in (("projection", 14), ("domains", 7), ("load", 7), ("trainability", 7)):
        made = drawn(ALL[name], crowd, True)
        made.draw_without_rendering()
        blocks = [axis for axis in made.axes if axis.get_title(loc="left").startswith("block")]
        assert len(blocks) == panels
        assert all(axis.bbox.width > 300 and axis.bbox.height > 100 for axis in blocks)
