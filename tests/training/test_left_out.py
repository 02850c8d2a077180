"""A loss that is not a number: the batch is left out from the next start on, and only where that is wanted."""

import math
from pathlib import Path

import numpy as np
import pytest

from mocte_ds.data import BlendedLoader
from mocte_ds.dist.mesh import ALONE
from mocte_ds.errors import CheckpointError, ConfigError, NonFiniteLoss
from mocte_ds.training.left_out import FILE, LeftOut
from mocte_ds.training.watch_section import WatchSection
from mocte_ds.training.watching import Watch
from tests.e2e.conftest import prepared  # noqa: F401  fixture

DATA = "the corpus, seed 1"


def watch(out: Path, limit: int) -> Watch:
    return Watch(
        WatchSection(leave_out=limit, stalled_after=0),
        out,
        4,
        LeftOut(out, DATA, ALONE),
        ALONE,
    )


def test_off_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="the loss of step 3 is nan .sequences 8 to 11 .*Lower training") as found:
        watch(tmp_path, 0).require_finite("loss", math.nan, 3, 12)
    assert found.value.exit_code == 2 and not (tmp_path / FILE).exists()
    watch(tmp_path, 0).require_finite("loss", 1.0, 3, 12)


def test_left_out_from_the_next_start_on(tmp_path: Path) -> None:
    for number, end in enumerate((12, 40), start=1):
        with pytest.raises(NonFiniteLoss, match=rf"leaves these sequences out \({number} of 2 batches") as found:
            watch(tmp_path, 2).require_finite("gradient norm", math.inf, 3, end)
        assert found.value.exit_code == 1, "launchers start again"
    assert LeftOut(tmp_path, DATA, ALONE).starts == [8, 36]
    with pytest.raises(NonFiniteLoss, match="2 batches were left out already") as found:
        watch(tmp_path, 2).require_finite("loss", math.nan, 3, 20)
    assert found.value.exit_code == 2 and LeftOut(tmp_path, DATA, ALONE).starts == [8, 36]


def test_of_other_data(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss):
        watch(tmp_path, 1).require_finite("loss", math.nan, 3, 12)
    with pytest.raises(ConfigError, match="left_out.json names batches of other data.*seed 1.*seed 2"):
        LeftOut(tmp_path, "the corpus, seed 2", ALONE)


@pytest.mark.parametrize("text", ["{", "[]", '{"batches": [1.5]}', '{"batches": [-4]}', '{"batches": 3}'])
def test_a_damaged_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="left_out.json is damaged"):
        LeftOut(tmp_path, DATA, ALONE)


def test_the_loader_passes_over_them(prepared: Path) -> None:  # noqa: F811
    """The others come in the order that they have anyway, on every rank."""

    def batches(rank: int, left_out: tuple[int, ...], count: int) -> list[np.ndarray]:
        loader = BlendedLoader(prepared, "train", 16, 4, rank, 2, 1, left_out=left_out)
        turns = zip(range(2 * count), iter(loader), strict=False)
        return [batch["input_ids"].numpy() for _, batch in turns]

    for rank in range(2):
        every, some = batches(rank, (), 5), batches(rank, (4, 8), 3)
        expected = [batch for place, batch in enumerate(every) if place // 2 not in (1, 2)]
        assert len(some) == 6 and all(map(np.array_equal, some, expected))


def test_skipped_batches_are_left_out_together(tmp_path: Path) -> None:
    streak = [
        {"what": "loss", "ranks": [1], "domains": ["code"], "step": 8, "sequences": [first, first + 3]}
        for first in (12, 20)
    ]
    for limit, code, gone in ((0, 2, []), (2, 1, [12, 20])):
        with pytest.raises(NonFiniteLoss, match="the loss on rank 1 .code; sequences 20 to 23. is not finite") as found:
            watch(tmp_path, limit).give_up(streak)
        assert "after 1 skipped in a row (watch.skip_nonfinite; sequences 12 to 15)" in str(found.value)
        assert found.value.exit_code == code and LeftOut(tmp_path, DATA, ALONE).starts == gone
    unknown = [{key: value for key, value in streak[0].items() if key != "sequences"}, streak[1]]
    with pytest.raises(NonFiniteLoss, match=r"after 1 skipped in a row \(watch.skip_nonfinite; sequences unknown\)"):
        watch(tmp_path, 0).give_up(unknown)
    later = [{**facts, "sequences": [first, first + 3]} for facts, first in zip(streak, (20, 40), strict=True)]
    with pytest.raises(NonFiniteLoss, match="2 batches were left out already; .* no room for 2 more") as found:
        watch(tmp_path, 2).give_up(later)
    assert found.value.exit_code == 2
    with pytest.raises(NonFiniteLoss, match="3 of 3 batches"):
        watch(tmp_path, 3).give_up(later)
    assert LeftOut(tmp_path, DATA, ALONE).starts == [12, 20, 40], "one that is left out already is not again"
