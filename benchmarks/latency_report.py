"""latency.csv as a Markdown table and as pictures, for benchmarks/latency.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters import Latency, LatencyTable
from exporters.measuring.plots import format_ms, plot_latency

Row = dict[str, str]


def write_report(rows: Sequence[tuple[Any, Row]], folder: Path) -> None:
    """Writes latency.md, and for each model latency-MODEL.png, latency-MODEL-torch.png.

    Args:
        rows: (cell, row of the CSV file), the cells in the order in which they are shown.
        folder: where to.
    """
    if not rows:
        return
    groups: dict[Any, list[Row]] = {}
    for cell, row in rows:
        groups.setdefault(cell, []).append(row)
    (folder / "latency.md").write_text(_markdown(groups))
    pictures: dict[tuple[str, str], dict[str, LatencyTable]] = {}
    for cell, found in groups.items():
        suffix = "-torch" if cell.provider.startswith("torch") else ""
        pictures.setdefault((cell.model, suffix), {})[cell.label] = _table(found)
    for (model, suffix), panels in pictures.items():
        title = f"{model}, n = 8 and r = 8, one thread unless said otherwise ({rows[0][1]['device']})"
        plot_latency(panels, title, folder / f"latency-{model.lower()}{suffix}.png")


def _table(rows: list[Row]) -> LatencyTable:
    return LatencyTable(tuple(map(_latency, rows)))


def _latency(row: Row) -> Latency:
    return Latency(
        name=row["form"],
        median_ms=float(row["median_ms"]),
        p20_ms=float(row["p20_ms"]),
        p80_ms=float(row["p80_ms"]),
        ratio=float(row["ratio"]),
        rounds=int(row["rounds"]),
        threads=int(row["threads"]),
    )


def _markdown(groups: dict[Any, list[Row]]) -> str:
    first = next(iter(groups.values()))[0]
    forms = list(dict.fromkeys(row["form"] for rows in groups.values() for row in rows))
    heads = ["model", "batch × tokens, targets", "base, ms", *forms[1:], "rounds"]
    lines = [
        "# Latency",
        "",
        f"Written by `benchmarks/latency.py` on {first['time'][:10]}: {first['device']}; {first['versions']}; "
        f"commit {first['commit'] or 'unknown'}. A number is the median over the base's on the same provider, with p20 "
        "and p80; n = 8 blocks of rank 8 and one thread unless said otherwise; PEFT's LoRA has the same total rank.",
        "",
        _line(heads),
        _line(["---", "---", *["---:"] * (len(heads) - 2)]),
    ]
    for cell, rows in groups.items():
        by_form = {row["form"]: row for row in rows}
        ratios = [_ratio(by_form.get(form), by_form[forms[0]]) for form in forms[1:]]
        base = by_form[forms[0]]
        lines.append(_line([cell.model, cell.label, format_ms(float(base["median_ms"])), *ratios, base["rounds"]]))
    lines += [
        "",
        "Peak memory at the shape / file size, MiB, of each graph:",
        "",
        _line(heads[:2] + forms),
    ]
    lines.append(_line(["---", "---", *["---:"] * len(forms)]))
    for cell, rows in groups.items():
        by_form = {row["form"]: row for row in rows}
        if any(row["file_size_mib"] for row in rows):
            lines.append(_line([cell.model, cell.label, *(_space(by_form.get(form)) for form in forms)]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(row: Row | None, base: Row) -> str:
    if row is None:
        return ""
    low, high = (float(row[name]) / float(base["median_ms"]) for name in ("p20_ms", "p80_ms"))
    return f"{float(row['ratio']):.2f} ({low:.2f}–{high:.2f})"


def _space(row: Row | None) -> str:
    return f"{float(row['peak_memory_mib'] or 'nan'):.0f} / {float(row['file_size_mib']):.0f}" if row else ""
