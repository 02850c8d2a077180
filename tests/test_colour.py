"""Colour stands on terminals alone."""

import io

import pytest

from mocte_ds.cli import run_cli
from mocte_ds.colour import paint
from mocte_ds.errors import MocteError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_where_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint("frozen", "cyan", Terminal()) == "\x1b[36mfrozen\x1b[0m" and paint("x", "bold", io.StringIO()) == "x"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert paint("frozen", "cyan", Terminal()) == "frozen"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_errors(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def fail() -> None:
        raise MocteError("the disk is full.")

    told = stream()
    monkeypatch.setattr("sys.stderr", told)
    with pytest.raises(SystemExit):
        run_cli(fail)
    word = "\x1b[31merror:\x1b[0m" if stream is Terminal else "error:"
    assert told.getvalue() == f"{word} the disk is full.\n"
