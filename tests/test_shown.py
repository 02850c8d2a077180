"""Names and paths in messages."""

import pytest

from mocte_ds.shown import name_shown, path_shown


@pytest.mark.parametrize("length", [10, 61, 121, 400])
def test_paths_stay_whole(length: int) -> None:
    path = "/" + "f" * (length - 1)
    assert path_shown(path) == path


@pytest.mark.parametrize(("path", "shown"), [("", "''"), ("a\nb", r"'a\nb'"), ("a\x1b[2Jb", r"'a\x1b[2Jb'")])
def test_paths_that_would_not_be_readable_are_quoted(path: str, shown: str) -> None:
    assert path_shown(path) == shown


def test_what_no_file_system_has_is_cut() -> None:
    assert len(path_shown("a" * 100_000)) < 1_100


def test_names_are_cut() -> None:
    assert name_shown("a" * 60) == "a" * 60
    assert len(name_shown("a" * 1_000)) < 140
