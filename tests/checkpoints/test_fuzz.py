"""Damaged and tampered checkpoints by the dozen: the tools refuse them in our words, or read what is there."""

from pytest import mark

from tests.checkpoints.fuzz import fuzz


@mark.parametrize("seed", [1, 2])
def test_whatever_is_wrong_is_told(written, tmp_path, seed):
    assert fuzz(written.folder / "ffn", tmp_path, seed, 12) == []
