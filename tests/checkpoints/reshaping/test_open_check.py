"""A check that has measured and not decided stays behind in another layout, and that is said."""

import torch

from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.reshaping.rank_layout import RankLayout
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.checkpoints.reshaping.reshaped import Reshaped
from mocte_ds.checkpoints.reshaping.saved import SavedCheckpoint
from mocte_ds.ownership.manifest import Manifest
from tests.checkpoints.damage import seal
from tools import reshape as tool


def test_it_is_said_that_a_check_is_left_out(written, tmp_path, capsys):
    folder = written.copy("ffn", tmp_path / "in")
    content = torch.load(folder / STATE_FILE, weights_only=True)
    for check, told in ((None, False), ({"step": 8}, True)):
        content["mocte"]["check"] = check
        torch.save(content, folder / STATE_FILE)
        seal(folder)
        there = SavedCheckpoint(folder, Manifest.read(folder))
        for layout, said in ((RankLayout(1, 1), told), (there.layout, False)):
            note = Reshaped(there, layout).note(batch=there.batch) or ""
            assert ("measured and not decided" in note) == said
        out = tmp_path / f"out {told}"
        assert tool.main([str(folder), str(out), "--world-size", "1"]) == 0
        captured = capsys.readouterr()
        assert ("not decided; it is left out" in captured.out) == told and "checking" in captured.err
        assert torch.load(out / folder.name / STATE_FILE, weights_only=True)["mocte"]["check"] is None
        same = reshape(folder, tmp_path / f"same {told}", there.layout.world_size, there.layout.ep_size)
        kept = torch.load(tmp_path / f"same {told}" / folder.name / STATE_FILE, weights_only=True)["mocte"]["check"]
        assert kept == check and not same["open_check"]
