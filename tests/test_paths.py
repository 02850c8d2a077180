"""Output paths that cannot be used are named before any work starts, in every tool."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from mocte_ds import paths
from mocte_ds.cli import run_cli
from mocte_ds.errors import MocteError

ROOT = Path(__file__).resolve().parents[1]
TOOLS: dict[str, list[str]] = {
    "train_tokenizer": ["--out", "OUT"],
    "prepare_data": ["--tokenizer", "none.model", "--out", "OUT"],
    "export_hf": ["checkpoints", "OUT"],
    "btm": ["cluster", "prepared", "OUT"],
    "import_hf": ["folder", "OUT"],
    "evaluate": ["model", "--output", "OUT"],
    "report": ["run", "--out", "OUT"],
    "zero_to_fp32": ["checkpoints", "OUT"],
    "reshape": ["checkpoints", "OUT", "--world-size", "2"],
    "to_megatron": ["checkpoints", "OUT"],
    "quickstart": ["--out", "OUT"],
    "study": [str(ROOT / "launch" / "studies" / "policies.yaml"), "--out", "OUT"],
}


def unusable(tmp_path: Path) -> dict[str, Path]:
    """Paths that neither a folder nor a file can be written to, by what is told of them."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    return {
        "file is a file": tmp_path / "file" / "below" / "it",
        "File name too long": tmp_path / ("x" * 300) / "out",
        "a link to nowhere": tmp_path / "link",
        "null": tmp_path / "a\0b",
    }


@pytest.mark.parametrize("require", [paths.require_folder_for, paths.require_file_for])
def test_unusable_paths(tmp_path: Path, require: Callable[[Path, str], None]) -> None:
    for told, path in unusable(tmp_path).items():
        with pytest.raises(MocteError, match=f"^--out .*{told}"):
            require(path, "--out")
    require(tmp_path / "new" / "out", "--out")
    assert not (tmp_path / "new").exists(), "nothing is made"


def test_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MocteError, match="is a file, and a folder is needed"):
        paths.require_folder_for(tmp_path / "file", "--out")
    paths.require_file_for(tmp_path / "file", "--out")
    paths.require_folder_for(tmp_path, "--out")
    with pytest.raises(MocteError, match="is a folder, and a file is needed"):
        paths.require_file_for(tmp_path, "--out")


def test_read_only_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may write everywhere, so the system's answer is given by hand."""
    monkeypatch.setattr(paths.os, "access", lambda path, mode: not mode & os.W_OK)
    for require in (paths.require_folder_for, paths.require_file_for):
        with pytest.raises(MocteError, match="cannot be written to"):
            require(tmp_path / "out", "--out")


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_names_an_unusable_output(tool: str, tmp_path: Path) -> None:
    for told, path in unusable(tmp_path).items():
        with pytest.raises(MocteError, match=told):
            import_module(f"tools.{tool}").main([str(path) if word == "OUT" else word for word in TOOLS[tool]])


def test_training_names_an_unusable_output(tmp_path: Path) -> None:
    run = ROOT / "launch" / "runs" / "quickstart.yaml"
    for told, path in unusable(tmp_path).items():
        with pytest.raises(MocteError, match=told):
            import_module("launch.pretrain").main(["--run", str(run), "--out", str(path)])
    with pytest.raises(MocteError, match="is a file, and a folder is needed"):
        import_module("launch.pretrain").main(["--run", str(run), "--out", str(tmp_path / "file")])


def test_no_tool_with_an_output_is_left_out() -> None:
    for path in (ROOT / "tools").glob("[a-z]*.py"):
        writes = any(word in path.read_text(encoding="utf-8") for word in ('"--out"', '"--output"', '"out"'))
        assert not writes or path.stem in TOOLS, f"{path.stem} writes somewhere and is not tried"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/log"), "/x/log: No space left on device; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "name another path"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "a shorter one"),
        (MocteError("what, where, what to do"), "what, where, what to do"),
    ],
)
def test_the_machines_errors_are_one_message(error: Exception, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    captured = capsys.readouterr().err
    assert ended.value.code == 2 and told in captured and captured.count("\n") == 1


def test_a_defect_keeps_its_stack_trace() -> None:
    def main() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "/ours")

    with pytest.raises(FileNotFoundError):
        run_cli(main)


@pytest.mark.parametrize(("text", "told"), [(b"\xe2", "takes text for ASCII"), (b"a", None)])
def test_a_python_that_reads_ascii(
    text: bytes, told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(text)

    def main() -> None:
        (tmp_path / "file").read_text(encoding="ascii")

    with pytest.raises(SystemExit) as end:
        run_cli(main)
    assert end.value.code == (2 if told else 0) and (told or "") in capsys.readouterr().err


def test_other_text_that_cannot_be_read_keeps_its_stack_trace() -> None:
    with pytest.raises(UnicodeDecodeError):
        run_cli(lambda: b"\xff".decode() and 0)


def test_another_broken_pipe_keeps_its_stack_trace() -> None:
    """That of a worker that was killed, say."""
    script = "import os\nfrom mocte_ds.cli import run_cli\nr, w = os.pipe()\nos.close(r)\n"
    script += "run_cli(lambda: os.write(w, b'x') and 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_a_reader_that_goes_away_ends_a_tool_without_a_word() -> None:
    """As in `mocte-ds study --list | head -1`; the output is larger than what a pipe holds."""
    script = "from mocte_ds.cli import run_cli\nrun_cli(lambda: [print('x' * 99) for _ in range(10000)] and 0)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    assert process.stdout.readline().startswith(b"xxx")
    process.stdout.close()
    complaint = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE and complaint == b""
