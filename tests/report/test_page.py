"""The page stands on its own, and its words and tables say what the logs say."""

import base64
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mocte_ds.ownership import put
from mocte_ds.report import write_report
from mocte_ds.report.figures import ALL
from mocte_ds.report.page import SECTIONS, page
from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Run
from mocte_ds.report.scores import scores
from mocte_ds.report.tables import scores_remark
from tests.report.parsed import Page
from tests.report.synthetic import DOMAINS, write_run

Logs = dict[str, Any]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def parsed(report: tuple[Path, dict[str, Any]]) -> Page:
    """The finished run's page."""
    return Page((report[0] / "index.html").read_text(encoding="utf-8"))


def bare(run: Run) -> Page:
    """A run's page without the time that drawing takes: every figure that it can have is an empty picture."""
    return Page(page(run, {name: (PNG, PNG) for name, kind in ALL.items() if kind.reason_missing(run) is None}))


def checks(logs: Logs) -> list[dict[str, Any]]:
    return [event for event in logs["events"] if event["event"] == "check"]


def test_nothing_is_loaded_from_outside(parsed: Page, report: tuple[Path, dict[str, Any]]) -> None:
    pictures = parsed.attributes("src") + parsed.attributes("srcset")
    assert len(pictures) == 2 * len(ALL)
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", picture) for picture in pictures)
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    assert [link.removeprefix("#") for link in parsed.attributes("href")] == list(SECTIONS)
    assert set(SECTIONS) <= set(ids)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not any(name.startswith("on") for _, attrs in parsed.elements for name in attrs)
    html = (report[0] / "index.html").read_text(encoding="utf-8")
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html


def test_the_page_shows_the_pictures_that_lie_beside_it(parsed: Page, report: tuple[Path, dict[str, Any]]) -> None:
    out, result = report
    assert sorted(path.name for path in out.glob("*.png")) == sorted(
        f"{name}{kind}.png" for name in ALL for kind in ("", "_narrow")
    )
    assert result["figures"] == {name: str(out / f"{name}.png") for name in ALL}
    assert list(parsed.captions) == [f"figure-{name}" for name in result["figures"]]
    for attribute, kind in (("src", ""), ("srcset", "_narrow")):
        for name, picture in zip(result["figures"], parsed.attributes(attribute), strict=True):
            data = base64.b64decode(picture.partition(",")[2])
            assert data == (out / f"{name}{kind}.png").read_bytes() and data.startswith(PNG)


def test_every_figure_has_a_caption_and_words_for_those_who_cannot_see_it(parsed: Page, run: Run) -> None:
    for name, kind in ALL.items():
        assert parsed.captions[f"figure-{name}"] == f"{kind.caption(run)} How to read it: {kind.reading}"
    assert all(len(text) > 60 for text in parsed.attributes("alt"))


def test_a_newcomer_finds_the_words_explained(parsed: Page) -> None:
    for word in ("emergence", "trainability λ", "freeze, thaw", "silhouette", "NMI, purity", "nat, perplexity", "FLOP"):
        assert word in parsed.text


def test_summary(parsed: Page, report: tuple[Path, dict[str, Any]], logs: Logs) -> None:
    last = logs["metrics"][-1]
    training, emergence, freezing = report[1]["summary"]
    assert all(sentence in parsed.text for sentence in (training, emergence, freezing))
    mean = last["validation"]["mean"]
    assert f"120 of 120 optimizer steps and seen {last['tokens']:,} tokens" in training
    assert f"{mean:.4f} nats per token at step 120 (perplexity {math.exp(mean):.2f})" in training
    assert "2 of 2 blocks: block 0 (layer 2) at step 12 because stable clusters were detected; " in emergence
    assert "block 1 (layer 3) at step 18 because the deadline passed without stable clusters" in emergence
    assert "1 of 6 experts is frozen at the end (2 freezes, 1 thaw)" in freezing
    ledger = logs["ledger"]
    own = sum(ledger[name] for name in ("routing", "sampling", "spectrum", "clusters", "trainability"))
    saved = ledger["wgrad_saved"]
    assert f"saved {100 * saved / (ledger['total'] + saved):.2f} % of the FLOPs" in freezing
    assert f"own work took {100 * own / ledger['total']:.2f} % (its checks " in freezing
    seconds = sum(sum(check["seconds"].values()) for check in checks(logs))
    wall = sum(row["seconds"] for row in logs["metrics"])
    assert f"(its checks {100 * seconds / wall:.1f} % of the wall time): a saving" in freezing
    assert (report[1]["steps"], report[1]["budget"], report[1]["tokens"]) == (120, 120, last["tokens"])
    assert (report[1]["emerged"], report[1]["frozen"], report[1]["missing"]) == ([0, 1], [[1, 1]], {})


def test_validation_table(parsed: Page, logs: Logs) -> None:
    found = [row["validation"] for row in logs["metrics"] if "validation" in row]
    for domain, row in zip([*DOMAINS, "mean"], parsed.rows("validation-table"), strict=True):
        first, last = found[0][domain], found[-1][domain]
        numbers = [f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}", f"{math.exp(last):.2f}", "12"]
        assert row == [domain, *numbers]


def test_blocks_table(parsed: Page, logs: Logs) -> None:
    for block, row in enumerate(parsed.rows("blocks-table")):
        entry = checks(logs)[-1]["blocks"][block]
        load = [sum(r["expert_load"][block][k] for r in logs["metrics"][-2:]) for k in range(3)]
        assert row == [
            f"block {block} (layer {2 + block})",
            f"step {(12, 18)[block]}",
            f"{100 * sum(entry['explained']):.1f} %",
            str(entry["clusters"]),
            *(f"{entry[key]:.2f}" for key in ("silhouette", "stability", "nmi", "purity")),
            # The check's own, of the probe tokens, where it has one.
            f"{3 * max(load) / sum(load):.2f}" if block else "1.75",
            ("0 of 3", "1 of 3")[block],
        ]


def test_purity_table(parsed: Page, logs: Logs) -> None:
    last = checks(logs)[-1]["blocks"]
    for domain, row in zip(DOMAINS, parsed.rows("purity-table"), strict=True):
        shares = [entry["domain_load"][domain] for entry in last]
        best = max((0, 1), key=lambda block: max(shares[block]))
        expert = shares[best].index(max(shares[best]))
        assert row == [
            domain,
            f"{100 * sum(map(max, shares)) / 2:.1f} %",
            f"{100 * max(shares[best]):.1f} %",
            f"block {best} (layer {2 + best}), expert {expert}",
        ]


def test_ledger_table(parsed: Page, logs: Logs) -> None:
    rows = {row[0]: row[2:] for row in parsed.rows("ledger-table")}
    ledger = logs["ledger"]
    assert set(rows) == set(ledger) - {"total"} | {"all"}
    assert rows["all"] == [f"{ledger['total']:.3e}", "100.00 %"]
    for name in ("forward", "dgrad", "wgrad", "trainability", "wgrad_saved", "validation"):
        # What was not spent is not part of what was.
        whole = ledger["total"] + (ledger["wgrad_saved"] if name == "wgrad_saved" else 0)
        assert rows[name] == [f"{ledger[name]:.3e}", f"{100 * ledger[name] / whole:.2f} %"]
    assert f"saved weight gradients worth {rows['wgrad_saved'][1]}" in parsed.captions["figure-flops"]
    assert f"saved {rows['wgrad_saved'][1]} of the FLOPs" in parsed.text, "one saving, one number"
    assert rows["clusters"][1] == "0.00020 %"
    assert "The log of steps counts the same sum" in parsed.text


def test_seconds_table(parsed: Page, logs: Logs) -> None:
    wall = sum(row["seconds"] for row in logs["metrics"])
    rows = {row[0]: row[1:] for row in parsed.rows("seconds-table")}
    for part in ("spectrum", "clusters", "trainability"):
        spent = sum(check["seconds"][part] for check in checks(logs))
        assert rows[part] == [f"{spent:.3g} s", f"{100 * spent / wall:.2f} %"]
    assert rows["training, its checks and validations"] == [f"{wall:.1f} s", "100.00 %"]
    assert rows["1 save, beside training"][0] == "0.25 s"


def test_events_table(parsed: Page, logs: Logs) -> None:
    happened = [event for event in logs["events"] if event["event"] in ("emergence", "freeze", "thaw")]
    for event, row in zip(happened, parsed.rows("events-table"), strict=True):
        who = f"block {event['block']} (layer {2 + event['block']})"
        who += f", expert {event['expert']}" if "expert" in event else ""
        assert row[:5] == [str(event["step"]), f"{event['step'] / 1.2:.1f} %", event["event"], who, event["reason"]]
        before, after = (sum(event[f"optimizer_bytes_by_rank_{when}"]) / 1e6 for when in ("before", "after"))
        assert f"optimizer {before:.2f} MB → {after:.2f} MB" in row[5]
        assert "lambda" not in event or f"λ {event['lambda']:.3g}" in row[5]
    assert "Also in the log: 60 check events, 4 projection events, 1 save event." in parsed.text


def test_scores_table(parsed: Page) -> None:
    assert parsed.rows("scores-table") == [
        ["copa_offline", "acc", "0.5700", "±0.0498", "0.50", "100"],
        ["piqa_offline", "acc", "0.5567", "±0.0116", "0.50", "1,838"],
        ["piqa_offline", "acc_norm", "0.5155", "±0.0117", "0.50", "1,838"],
        ["cloze_offline", "word_perplexity", "931.2500", "–", "–", "62"],
    ]
    assert "1 of 3 values with a known chance is more than two standard errors above it" in parsed.text
    assert "so that no skill is shown: copa_offline (acc) and piqa_offline (acc_norm). " in parsed.text
    assert "lm-eval 0.4.13" in parsed.text


def test_scores_below_chance_are_said_to_be(run: Run) -> None:
    made = Run(run.folder, run.metrics, evaluation={"tasks": {"a": {"acc": 0.3, "acc_stderr": 0.05, "chance": 0.5}}})
    assert "Below chance by more than two standard errors: a (acc). " in scores_remark(made)
    assert "no skill" not in scores_remark(made)


def test_words_stand_after_the_figures(parsed: Page) -> None:
    places = parsed.attributes("id")
    assert places.index("words") < places.index("figure-loss") < places.index("figure-flops") < places.index("glossary")
    assert parsed.text.index("How to read it") < parsed.text.index("Unit of the loss, per token")


def test_results_that_lm_eval_itself_wrote_are_read(run: Run) -> None:
    raw = {
        "results": {"piqa": {"alias": "piqa", "acc,none": 0.5267, "acc_stderr,none": 0.0116, "em,strict": 0.1}},
        "n-samples": {"piqa": {"original": 1838, "effective": 100}},
    }
    found = scores(Run(run.folder, run.metrics, evaluation=raw))
    assert [(s.task, s.metric, s.value, s.error, s.chance, s.items) for s in found] == [
        ("piqa", "acc", 0.5267, 0.0116, None, 100),
        ("piqa", "em (strict)", 0.1, None, None, 100),
    ]
    assert scores(Run(run.folder, run.metrics, evaluation={"tasks": 3})) == []


def test_facts_table(parsed: Page, logs: Logs) -> None:
    rows = dict(parsed.rows("facts-table"))
    assert rows["command"] == logs["facts"]["command"]
    assert rows["tokens of an optimizer step, all ranks"] == "8,192"
    assert rows["parameters of the dense model"] == "4,218,112"
    assert rows["freeze policy"] == "trainability"
    assert rows["versions"] == "python 3.11.2, torch 2.13, deepspeed 0.19.8"
    assert '"manifest_sha256"' in parsed.text


def test_text_of_the_logs_is_shown_and_not_run(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    logs = write_run(tmp_path, steps=20, budget=60, domains=[evil, "b&c"])
    event = {"event": "stop", "step": 19, "reason": evil}
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write(json.dumps(event) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({**logs["facts"], "command": evil}))
    made = bare(read_run(tmp_path))
    assert "script" not in {tag for tag, _ in made.elements}
    assert [row[0] for row in made.rows("validation-table")] == [evil, "b&c", "mean"]
    assert dict(made.rows("facts-table"))["command"] == evil
    assert made.rows("events-table")[-1][2:5] == ["stop", "run", evil]


def test_a_dense_run(dense: Run) -> None:
    made = bare(dense)
    assert "This is a dense run: it has no blocks, so no experts can emerge." in made.text
    assert made.text.count("Not drawn: this is a dense run") == 6
    assert "not been evaluated on tasks yet" in made.text
    assert "blocks with experts" not in made.text
    assert set(made.tables) == {"validation-table", "ledger-table", "facts-table"}


def test_an_early_run(early: Run) -> None:
    made = bare(early)
    assert "6 of 120 optimizer steps (5.0 % of its budget: it is still going or was stopped)" in made.text
    assert "nothing has been validated yet" in made.text
    assert "No experts have emerged: every block has run its dense FFN" in made.text
    for absent in ("projection", "domains", "load", "trainability", "flops"):
        assert f"figure-{absent}" in made.attributes("id") and f"figure-{absent}" not in made.captions
    assert "Nothing has happened yet" in made.text and "not written its ledger yet" in made.text


@pytest.mark.slow
def test_a_run_that_was_cut_off_and_damaged(tmp_path: Path) -> None:
    write_run(tmp_path, steps=40, budget=60, experts=2)
    for name in ("metrics", "events"):
        log = tmp_path / f"{name}.jsonl"
        lines = log.read_text().splitlines()
        log.write_text("\n".join([*lines[:5], "\x00\x00garbage", *lines[6:-1], lines[-1][:50]]))
    (tmp_path / "run.json").write_text("")
    put(tmp_path / "report", {"flops.png": b"old"}, "report")
    (tmp_path / "ledger.json").unlink()
    result = write_report(tmp_path, progress=False)
    assert list(result["missing"]) == ["flops"] and not (tmp_path / "report" / "flops.png").exists()
    assert result["steps"] == 39 and result["budget"] is None
    made = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    for note in result["notes"]:
        assert note in made.text
    assert any("metrics.jsonl: 2 line(s)" in note and "(line 6, 40)" in note for note in result["notes"])
    assert "no readable run.json" in made.text


@pytest.mark.slow
def test_a_report_can_be_made_again_and_moved(
    whole: tuple[Path, Logs], report: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(report[0], tmp_path / "moved")
    write_report(whole[0], tmp_path / "moved", progress=False)
    for path in report[0].iterdir():
        assert (tmp_path / "moved" / path.name).read_bytes() == path.read_bytes()
