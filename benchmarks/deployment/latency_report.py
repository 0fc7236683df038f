"""Writes latency.csv as a Markdown table and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common.origin import written_by
from exporters import Latency, LatencyTable
from exporters.measuring.plots import format_ms, plot_latency
from exporters.measuring.tables import markdown_table

Row = Mapping[str, str]
_CELL = ("model", "batch × tokens, targets")


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Writes latency.md, and for each model latency-MODEL.png, latency-MODEL-torch.png."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    (folder / "latency.md").write_text(_markdown(groups))
    pictures: dict[tuple[str, str], dict[str, LatencyTable]] = {}
    for found in groups.values():
        suffix = "-torch" if found[0]["provider"].startswith("torch") else ""
        pictures.setdefault((found[0]["model"], suffix), {})[_label(found[0])] = table_of(found)
    for (model, suffix), panels in pictures.items():
        title = f"{model}, n = 8 and r = 8, one thread unless stated otherwise ({rows[0]['device']})"
        plot_latency(panels, title, folder / f"latency-{model.lower()}{suffix}.png")


def _label(row: Row) -> str:
    """Returns the name of the case without its model."""
    return row["case"].removeprefix(f"{row['model']}, ")


def table_of(rows: Sequence[Row]) -> LatencyTable:
    """Returns the rows of one case as `plot_latency` accepts them."""
    return LatencyTable(tuple(map(_latency, rows)))


def _latency(row: Row) -> Latency:
    return Latency(
        name=row["side"],
        median_ms=float(row["median_ms"]),
        p20_ms=float(row["p20_ms"]),
        p80_ms=float(row["p80_ms"]),
        ratio=float(row["ratio"]),
        rounds=int(row["rounds"]),
        threads=int(row["threads"]),
    )


def _markdown(groups: Mapping[str, Sequence[Row]]) -> str:
    rows = [row for cell in groups.values() for row in cell]
    sides = _sides(groups)
    space = []
    for cell in groups.values():
        by_side = {row["side"]: row for row in cell}
        if any(row["file_size_mib"] for row in cell):
            space.append([cell[0]["model"], _label(cell[0]), *(_space(by_side.get(side)) for side in sides)])
    lines = [
        "# Latency",
        "",
        f"{written_by('latency', rows)}. A number is the median relative to the base's on the same provider, with p20 "
        "and p80. n = 8 blocks of rank 8 and one thread unless stated otherwise; PEFT's LoRA has the same total rank.",
        "",
        *latency_table(groups),
        "",
        "Peak memory of each graph at the shape / its file size, in MiB:",
        "",
        *markdown_table([*_CELL, *sides], space, text_columns=2),
    ]
    return "\n".join(lines) + "\n"


def latency_table(groups: Mapping[str, Sequence[Row]]) -> list[str]:
    """Returns the lines of a Markdown table, one per case: the base's milliseconds and the others' ratios to them."""
    sides = _sides(groups)
    lines = []
    for rows in groups.values():
        by_side = {row["side"]: row for row in rows}
        base = by_side[sides[0]]
        ratios = [_ratio(by_side.get(side), base) for side in sides[1:]]
        lines.append([base["model"], _label(base), format_ms(float(base["median_ms"])), *ratios, base["rounds"]])
    return markdown_table([*_CELL, "base, ms", *sides[1:], "rounds"], lines, text_columns=2)


def _sides(groups: Mapping[str, Sequence[Row]]) -> list[str]:
    return list(dict.fromkeys(row["side"] for rows in groups.values() for row in rows))


def _ratio(row: Row | None, base: Row) -> str:
    if row is None:
        return ""
    low, high = (float(row[name]) / float(base["median_ms"]) for name in ("p20_ms", "p80_ms"))
    return f"{float(row['ratio']):.2f} ({low:.2f}–{high:.2f})"


def _space(row: Row | None) -> str:
    return f"{float(row['peak_memory_mib'] or 'nan'):.0f} / {float(row['file_size_mib']):.0f}" if row else ""
