"""The benchmark of `prepare` measures each row in a process of its own."""

import os

from benchmarks.prepare import in_child, make_tables, measure, peak_memory_mb


def test_a_row_knows_nothing_of_the_memory_of_others(tmp_path):
    card = make_tables(tmp_path, users=40, events=400, items=60)
    grown = bytearray(700 << 20)  # touched: this process holds more than any row
    grown[::4096] = b"x" * len(grown[::4096])
    assert in_child(os.getpid) != os.getpid()
    row = in_child(measure, card, tmp_path / "out", 1)
    assert row["events"] == 400 and 50 < row["peak_memory_mb"] < 700 < peak_memory_mb()
