"""Every tool that writes leaves the user's files as they are, byte for byte, and replaces what it wrote itself."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.data.stored_tokenizer import open_tokenizer
from mocte_ds.errors import MocteError
from mocte_ds.training.out_folder import require_out
from tests.convert.hf.test_import import CONFIGS, write_folder
from tests.data.conftest import corpus, tokenizer  # noqa: F401  fixtures
from tests.ownership.trees import tree
from tests.report.synthetic import write_run
from tools import evaluate, export_hf, import_hf, prepare_data, report, to_megatron, train_tokenizer


@dataclass(frozen=True)
class Tool:
    """A tool, called with the place that it writes to."""

    run: Callable[[Path], object]
    source: Path
    """What it reads."""
    name: str
    """A file that it writes, relative to that place; empty: the place is the file."""
    others: bool = False
    """Whether files of others may lie beside its own."""
    again: bool = True
    """Whether it replaces its own."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Path) -> SimpleNamespace:  # noqa: F811
    """A model in Hugging Face format, an import of it, and the logs of a run."""
    folder = tmp_path_factory.mktemp("made")
    model = write_folder(folder / "model", CONFIGS["llama"])
    import_hf.main([str(model), str(folder / "start")])
    write_run(folder / "run", steps=6, budget=12, emergences=False)
    return SimpleNamespace(model=model, start=folder / "start", run=folder / "run", corpus=corpus, tokenizer=tokenizer)


NAMES = [
    "train_tokenizer",
    "prepare_data",
    "import_hf",
    "export_hf",
    "to_megatron",
    "reshape",
    "report",
    "evaluate",
]


@pytest.fixture
def tool(request: pytest.FixtureRequest, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """The tool of a name; drawing and scoring, which do not matter here, are left out."""
    monkeypatch.setattr("mocte_ds.report.write.png", lambda *_: b"a picture")
    monkeypatch.setattr("mocte_ds.evaluation.lm.evaluate", lambda *_, **__: {"tasks": {}})
    monkeypatch.setattr("mocte_ds.evaluation.lm.table", lambda _: "")
    words = {"--vocab-size": "340"}
    options = [word for pair in words.items() for word in pair]
    return {
        "train_tokenizer": Tool(
            lambda out: train_tokenizer.main([str(made.corpus), "--out", str(out), *options]), made.corpus, ""
        ),
        "prepare_data": Tool(
            lambda out: prepare_data.main(
                [str(made.corpus), "--out", str(out), "--tokenizer", str(made.tokenizer), "--workers", "1"]
            ),
            made.corpus,
            "tokenizer.model",
            others=True,
        ),
        "import_hf": Tool(lambda out: import_hf.main([str(made.model), str(out)]), made.model, "import.json"),
        "export_hf": Tool(lambda out: export_hf.main([str(made.start), str(out)]), made.start / "step0", "config.json"),
        "to_megatron": Tool(
            lambda out: to_megatron.main([str(made.start), str(out)]), made.start / "step0", "", again=False
        ),
        "reshape": Tool(lambda out: reshape(made.start, out, 1, 1), made.start / "step0", "step0", again=False),
        "report": Tool(
            lambda out: report.main([str(made.run), "--out", str(out)]), made.run, "index.html", others=True
        ),
        "evaluate": Tool(lambda out: evaluate.main([str(made.model), "--output", str(out)]), made.model, ""),
    }[request.param]


def refused(tool: Tool, out: Path, root: Path, sources: SimpleNamespace) -> None:
    """The tool ends with a message, and everything below the root and in its sources is what it was."""
    folders = [root, sources.model, sources.start, sources.run, sources.corpus]
    before = [tree(folder) for folder in folders]
    with pytest.raises(MocteError) as error:
        tool.run(out)
    assert [tree(folder) for folder in folders] == before
    assert "Traceback" not in str(error.value) and str(error.value)


@pytest.mark.parametrize("tool", NAMES, indirect=True)
def test_files_of_the_user(tool: Tool, made: SimpleNamespace, tmp_path: Path) -> None:
    """A file under a name of ours; a link or a folder in its place; the whole place a project of the user."""
    for number, kind in enumerate(("file", "link", "folder", "project")):
        root = tmp_path / str(number)
        out = root / "out"
        victim = out / tool.name if tool.name else out
        victim.parent.mkdir(parents=True)
        (root / "thesis").write_text("the only copy")
        if kind == "file":
            victim.write_text("the only copy")
        elif kind == "link":
            victim.symlink_to(root / "thesis")
        elif kind == "folder":
            victim.mkdir()
            (victim / "mine").write_text("the only copy")
        else:
            out.mkdir(exist_ok=True)
            for name in (".git/HEAD", "data/tokenizer.model", "run.json", "tokenizer/tokenizer.json", "latest"):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text("of a project, in words")
            if tool.name and tool.others:
                (out / tool.name).write_text("mine")
        refused(tool, out, root, made)


@pytest.mark.parametrize("tool", NAMES, indirect=True)
def test_what_is_read(tool: Tool, made: SimpleNamespace, tmp_path: Path) -> None:
    """The source itself, a place in it, around it, and each through a link."""
    link = tmp_path / "link"
    link.symlink_to(tool.source)
    for out in (tool.source, tool.source / "new" / "out", link, link / "out"):
        if tool.others and tool.source == made.run and out.name == "out":
            continue  # a report in its run's folder
        if tool.others and tool.source == made.run:
            (tool.source / "index.html").write_text("mine")
        refused(tool, out, tmp_path, made)
    (made.run / "index.html").unlink(missing_ok=True)


# An import holds no optimizer, so that it has nothing to reshape.
@pytest.mark.parametrize("tool", [name for name in NAMES if name != "reshape"], indirect=True)
def test_what_it_wrote_itself(tool: Tool, made: SimpleNamespace, tmp_path: Path) -> None:
    """Its own output is replaced; changed, or with a file more, it is the user's."""
    out = tmp_path / "new" / "out"
    tool.run(out)
    victim = out / tool.name if tool.name else out
    if not tool.again:
        return refused(tool, out, tmp_path, made)
    before = tree(tmp_path)
    tool.run(out)
    assert tree(tmp_path).keys() == before.keys()
    if tool.name:
        (out / "notes.txt").write_text("of the user")
        if tool.others:
            tool.run(out)
            assert (out / "notes.txt").read_text() == "of the user"
        else:
            refused(tool, out, tmp_path, made)
            (out / "notes.txt").unlink()
    victim.write_bytes(victim.read_bytes() + b" with my changes")
    if victim.name == "tokenizer.model":
        (out / "manifest.json").unlink()  # else nothing is to be done
    return refused(tool, out, tmp_path, made)


@pytest.fixture
def run_folder(made: SimpleNamespace, tmp_path: Path) -> Callable[..., None]:
    data = tmp_path / "data"
    prepare_data.main([str(made.corpus), "--out", str(data), "--tokenizer", str(made.tokenizer), "--workers", "1"])

    def check(out: Path, resumed: bool = False, done: int = 0) -> None:
        require_out(out, [data], open_tokenizer(data / "tokenizer.model"), resumed, done, 10)

    return check


def test_run_folders(run_folder: Callable[..., None], made: SimpleNamespace, tmp_path: Path) -> None:
    """A run beside files of others is fine; over them, in its data, or with a checkpoint of theirs in its way not."""
    data, out = tmp_path / "data", tmp_path / "out"
    for place in (data, data / "run"):
        with pytest.raises(MocteError, match="overlap"):
            run_folder(place)
    out.mkdir()
    (tmp_path / "link").symlink_to(data)
    with pytest.raises(MocteError, match="overlap"):
        run_folder(tmp_path / "link")
    shutil.copytree(data, out / "checkpoints" / "data")
    with pytest.raises(MocteError, match="overlap"):
        require_out(out, [out / "checkpoints" / "data"], open_tokenizer(made.tokenizer), False, 0, 10)
    shutil.rmtree(out / "checkpoints")
    (out / "notes.txt").write_text("of the user")
    run_folder(out)
    run_folder(tmp_path)  # the data lies in it
    for name in ("run.json", "metrics.jsonl", "tokenizer/tokenizer.json", "tokenizer.model"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("of the user")
        with pytest.raises(MocteError, match=f"{name} was not written by mocte-ds"):
            run_folder(out)
        if name == "run.json":
            run_folder(out, resumed=True)
        (out / name).unlink()
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
    (out / "checkpoints" / "step5").mkdir(parents=True)
    (out / "checkpoints" / "step5" / "notes.txt").write_text("of the user")
    with pytest.raises(MocteError, match="step5 is there and is not"):
        run_folder(out)
    run_folder(out, resumed=True, done=5)
    shutil.copytree(made.start / "step0", out / "checkpoints" / "step7")
    run_folder(out, resumed=True, done=5)


def test_a_log_that_the_user_changed_is_kept_at_a_resume(tmp_path: Path) -> None:
    from mocte_ds.training.telemetry import Telemetry

    log = Telemetry(tmp_path, True, 5, 0, None)
    log.close()
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)
    Telemetry(tmp_path, True, 5, 2, None).close()  # lines that a run adds are its own
    assert not list(tmp_path.glob("*.kept"))
    changed = "# my notes: the loss fell at once\n" + lines
    (tmp_path / "metrics.jsonl").write_text(changed)
    Telemetry(tmp_path, True, 5, 1, None).close()
    assert (tmp_path / "metrics.jsonl.kept").read_text() == changed
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
