"""Rows as lines."""

from melora_fx.tables import table


def test_columns_are_aligned_and_long_names_lose_their_beginning() -> None:
    rows = [("site", "in", "why"), ("model.layers.0.up", "4", ""), ("up", "1024", "x")]
    assert table(rows) == [
        "site               in    why",
        "model.layers.0.up  4",
        "up                 1024  x",
    ]
    assert table(rows, right=(1,), max_width=20) == [
        "site         in  why",
        "…ers.0.up     4",
        "up         1024  x",
    ]
