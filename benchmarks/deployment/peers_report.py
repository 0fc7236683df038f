"""Writes peers.csv as a Markdown table and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.origin import beside_graphs_of, written_by
from benchmarks.common.ratios import ratio_table
from exporters.measuring.plots import format_ms, plot_latency
from exporters.measuring.tables import markdown_table

from .peers_graphs import MERGED, OURS

Row = Mapping[str, str]
Cells = Mapping[str, Mapping[str, Row]]
"""Shape → side → row."""
GOALS = {
    "keep q,v": 1.03,
    "keep all-linear": 1.10,
    "swap idle q,v": 1.02,
    "swap idle all-linear": 1.03,
}
"""Largest ratios to our merged graph. The goal of the merged graph itself: no cell above 1.00 of the fastest peer."""


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Writes peers.md and a picture for each model into `folder`."""
    models = _by_model(rows)
    (folder / "peers.md").write_text(_markdown(models))
    for model, cells in models.items():
        panels = {f"{model}, {shape}": ratio_table(sides, _drawn(sides)) for shape, sides in cells.items()}
        first = next(iter(next(iter(cells.values())).values()))
        title = f"{model}, float32, one thread ({first['device']}), over the fastest peer"
        plot_latency(panels, title, folder / f"peers-{model.lower()}.png", reference="the fastest peer")


def _by_model(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    models: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        models.setdefault(row["model"], {}).setdefault(row["shape"], {})[row["side"]] = row
    return models


def overview(rows: Sequence[Row]) -> list[str]:
    """Returns the short table, also for docs/EXPORT.md: a line for each shape of a model, then the geometric means."""
    return _overview(_by_model(rows))


def _overview(models: Mapping[str, Cells]) -> list[str]:
    lines = []
    for model, cells in models.items():
        for shape, sides in cells.items():
            ratios = [sides[MERGED]["ratio"], *(sides[side]["over_merged"] for side in GOALS)]
            lines.append([model, shape, _fastest(sides), *(f"{float(ratio):.2f}" for ratio in ratios)])
        means = [_mean([sides[MERGED] for sides in cells.values()], "ratio")]
        means += [_mean([sides[side] for sides in cells.values()], "over_merged") for side in GOALS]
        lines.append([f"**{model}**", f"**mean of {len(cells)}**", "", *(f"**{mean:.2f}**" for mean in means)])
    return markdown_table(["model", "batch × tokens", "fastest peer", "merged", *GOALS], lines, text_columns=3)


def _drawn(sides: Mapping[str, Row]) -> list[str]:
    """Returns the sides of a picture: the fastest peer first, then ours, then the other peers."""
    best = sides[MERGED]["reference"]
    return list(dict.fromkeys([best, *(side for side in OURS if side in sides), *sides]))


def _markdown(models: Mapping[str, Cells]) -> str:
    rows = [row for cells in models.values() for sides in cells.values() for row in sides.values()]
    lines = [
        "# Exported graphs compared with those of others",
        "",
        f"{written_by('peers', rows)}; {beside_graphs_of(rows)}. Plain sessions of ONNX Runtime with "
        "default options, float32, one thread.",
        "",
        "A number is the time relative to the fastest peer, whose own time is shown in milliseconds: the median over "
        f"{rows[0]['processes']} processes, each of which loads all sides and runs them in turn. *merged* and the "
        "sides below it are ours, all for the target `ort-cpu` except *portable*, which is merged too. The second "
        "number of unmerged and swappable graphs is the time relative to *merged*. Adapters have 8 blocks of rank 8; "
        "*idle* is swappable, without an adapter. Bold: a merged graph that is slower than the fastest peer, or "
        "another graph above its goal "
        f"({', '.join(f'{side} {goal:.2f}' for side, goal in GOALS.items())}).",
    ]
    lines += [
        "",
        "Overview, *merged* relative to the fastest peer, and unmerged and swappable graphs relative to *merged*:",
        "",
        *_overview(models),
    ]
    for model, cells in models.items():
        lines += ["", f"## {model}", "", *_table(cells), "", *_summary(cells)]
    return "\n".join(lines) + "\n"


def _table(cells: Cells) -> list[str]:
    sides = dict.fromkeys(side for rows in cells.values() for side in rows)
    peers = [side for side in sides if side not in OURS]
    lines = [["fastest peer", *(_fastest(rows) for rows in cells.values())]]
    lines += [
        [side, *(_cell(rows.get(side)) for rows in cells.values())]
        for side in (*peers, *(side for side in OURS if side in sides))
    ]
    return markdown_table(["", *cells], lines, text_columns=1)


def _fastest(rows: Mapping[str, Row]) -> str:
    best = rows[rows[MERGED]["reference"]]
    return f"{best['side']}, {format_ms(float(best['median_ms']))} ms"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    ratio, over_merged = f"{float(row['ratio']):.3f}", f"{float(row['over_merged']):.3f}"
    if row["side"] not in GOALS:
        return f"**{ratio}**" if row["side"] in OURS and float(ratio) > 1 else ratio
    return f"{ratio}; **{over_merged}**" if float(over_merged) > GOALS[row["side"]] else f"{ratio}; {over_merged}"


def _summary(cells: Cells) -> list[str]:
    merged = [rows[MERGED] for rows in cells.values()]
    over_best, over_plain = _mean(merged, "ratio"), _mean(merged, "over_plain")
    lines = [
        f"*merged*, geometric mean: {over_best:.3f} of the fastest peer, {over_plain:.3f} of optimum-onnx's plain "
        "export."
    ]
    means = [
        f"{side} {_mean([rows[side] for rows in cells.values()], 'over_merged'):.3f}"
        for side in GOALS
        if all(side in rows for rows in cells.values())
    ]
    return [*lines, f"Relative to *merged*: {', '.join(means)}."]


def _mean(rows: Sequence[Row], column: str) -> float:
    return float(np.exp(np.mean([np.log(float(row[column])) for row in rows])))
