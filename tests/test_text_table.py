"""Tables of text: columns that line up, and numbers that are not lost."""

import doctest

from mocte_ds import text_table as module
from mocte_ds.text_table import brief, is_number, percent, spread, text_table


def test_columns_line_up() -> None:
    table = text_table(["step", "mode"], [["4", "warmup"], ["1,000", "x"]], left=("mode",))
    assert table.splitlines() == [" step  mode", "    4  warmup", "1,000  x"]
    assert text_table(["a"], []) == "a"


def test_numbers() -> None:
    assert doctest.testmod(module).failed == 0
    assert [brief(x) for x in (0, 0.0, 1234.5, 1e9, 1e-9, -2.0)] == ["0", "0", "1,234", "1e+09", "1e-09", "-2"]
    assert [brief(x) for x in (None, "", float("nan"), [], {}, False)] == ["-", "-", "-", "-", "-", "no"]
    assert brief({"a": 1, "b": [0.5, None]}) == "a=1 b=0.5 -"
    assert [spread(x) for x in ([2, 0.5, None, "x"], [3, 3], [None], [])] == ["0.5..2", "3", "-", "-"]
    assert [percent(x) for x in (0.00512, 1, None)] == ["0.512 %", "100 %", "-"]
    assert [is_number(x) for x in (1, 1.5, True, "1", None, float("inf"))] == [True, True] + [False] * 4
