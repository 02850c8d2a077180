"""Damaged and tampered checkpoints by the dozen: the tools refuse them in our words, or read what is there."""

from pytest import mark

from tests.checkpoints.fuzz import fuzz, resume
from tests.spawn import spawn


@mark.parametrize("seed", [1, 2])
def test_whatever_is_wrong_is_told(written, tmp_path, seed):
    assert fuzz(written.folder / "ffn", tmp_path, seed, 12) == []


def test_an_engine_that_resumes_from_them(written, tmp_path):
    (wrong,) = spawn(resume, 1, str(written.folder / "ffn"), str(tmp_path), [1, 2], 30, timeout=150, deepspeed=True)
    assert wrong == []
