"""Writes train_step.csv as a Markdown table and as a bar chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.origin import written_by
from exporters.measuring.plots import import_pyplot
from exporters.measuring.tables import markdown_table

_COLORS = {
    "ours": "#2a7fc0",
    "ours, plain nodes": "#9cc4e4",
    "ours, Triton": "#20848c",
    "PEFT LoRA, equal rank": "#c0792a",
    "PEFT LoRA, equal parameters": "#e3b98a",
    "PEFT BD-LoRA": "#8e5ea2",
    "authors' loop": "#b5383c",
    "full fine-tuning": "#5f6b6d",
}
_HEADINGS = (
    *("model", "mode", "cell", "side", "step, ms", "p20–p80", "ratio", "saved, MiB", "peak, MiB", "parameters"),
    *("compile, s", "breaks", "recompiles"),
)

Row = Mapping[str, str]


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Writes train_step.md and train_step.png into `folder`."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    (folder / "train_step.md").write_text(_markdown(groups))
    plot_steps(groups, folder / "train_step.png")


def label(row: Row) -> str:
    """Returns the name of a cell without its model and mode."""
    is_minilm = row["model"].startswith("MiniLM")
    centre = "every dense layer" if is_minilm else "q,k,v,o"
    facts = [centre if row["targets"] == "centre" else row["targets"], f"{row['tokens']} tokens"]
    if row["rank"] != "8":
        facts.append(f"rank {row['rank']}")
    if row["dtype"] != "float32":
        facts.append(row["dtype"])
    if float(row["dropout"]):
        facts.append(f"dropout {row['dropout']}")
    if row["memory"]:
        facts.append(f"memory {row['memory']}")
    if row["threads"] != "1":
        facts.append(f"{row['threads']} threads")
    return ", ".join(facts)


def _markdown(groups: Mapping[str, list[Row]]) -> str:
    rows = [row for cell in groups.values() for row in cell]
    lines = [
        "# Training steps",
        "",
        f"{written_by('train_step', rows)}. Ratio: the median of a step over that of the frozen model with an input "
        "that requires a gradient. Saved: what autograd saves for the backward pass, above the frozen model's. Peak: "
        "the memory that one step takes, above the frozen model's.",
        "",
        *steps_table(groups),
    ]
    return "\n".join(lines) + "\n"


def steps_table(groups: Mapping[str, list[Row]]) -> list[str]:
    """Returns the lines of a Markdown table. `groups`: the rows of each cell, the frozen model's first."""
    cells = [_cells(row, rows[0]) for rows in groups.values() for row in rows]
    return markdown_table(_HEADINGS, cells, text_columns=4)


def _cells(row: Row, floor: Row) -> list[str]:
    return [
        row["model"],
        row["mode"],
        label(row),
        row["side"],
        f"{float(row['median_ms']):.1f}",
        f"{float(row['p20_ms']):.1f}–{float(row['p80_ms']):.1f}",
        f"{float(row['ratio']):.3f}",
        _difference(row, floor, "saved_mib"),
        _difference(row, floor, "peak_memory_mib"),
        f"{int(row['parameters']):,}",
        row["compile_s"],
        row["graph_breaks"],
        row["recompiles"],
    ]


def _difference(row: Row, floor: Row, column: str) -> str:
    if not row[column] or not floor[column]:
        return ""
    return f"{float(row[column]) - float(floor[column]):.1f}"


def plot_steps(groups: Mapping[str, list[Row]], path: Path) -> None:
    """Draws one panel for each model and mode: bars of what a step costs above the floor, in per cent of the floor."""
    pyplot = import_pyplot()
    panels: dict[str, list[list[Row]]] = {}
    for rows in groups.values():
        panels.setdefault(f"{rows[0]['model']}, {rows[0]['mode']}", []).append(rows)
    heights = [sum(len(rows) for rows in cells) + len(cells) for cells in panels.values()]
    figure, grid = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, 1.2 + 0.17 * sum(heights) + 0.5 * len(panels)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axes, (title, cells) in zip(grid[:, 0], panels.items(), strict=True):
        _draw(axes, title, cells)
    names = {row["side"] for rows in groups.values() for row in rows}
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for name, color in _COLORS.items() if name in names]
    figure.legend(handles, [name for name in _COLORS if name in names], loc="outside upper center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(axes: Any, title: str, cells: Sequence[Sequence[Row]]) -> None:
    line = 0.0
    ticks: dict[float, str] = {}
    for rows in cells:
        sides = [row for row in rows if row["side"] in _COLORS]
        ticks[line + (len(sides) - 1) / 2] = label(rows[0])
        for row in sides:
            over = 100 * (float(row["ratio"]) - 1)
            axes.barh(line, min(max(over, 0), 130), color=_COLORS[row["side"]], height=0.9)
            axes.annotate(
                f"{over:.0f} %",
                (min(max(over, 0), 130), line),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
            line += 1
        line += 1
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8.5)
    axes.set(xlim=(0, 140), ylim=(line - 0.5, -1), xlabel="time of a step above the frozen model's, %")
    axes.spines[["top", "right"]].set_visible(False)
