"""Writes decoding.csv as a Markdown table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common.origin import beside_graphs_of, written_by
from benchmarks.common.ratios import ratio_table
from exporters.measuring.plots import format_ms, plot_latency
from exporters.measuring.tables import markdown_table

from .decoding_cells import GOALS, MERGED, REFERENCE, SIDES, TIMES_FASTER_THAN_TORCH, TORCH

Row = Mapping[str, str]
Groups = Mapping[str, Mapping[str, Row]]
"""The rows of each case by side."""
ISSUE = "https://github.com/microsoft/onnxruntime-genai/issues/1661"


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Writes decoding.md and decoding.png into `folder`."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row["case"], {})[row["side"]] = row
    (folder / "decoding.md").write_text(_markdown(groups))
    panels = {
        case: ratio_table(sides, [side for side in sides if side != TORCH])  # its dot is far away
        for case, sides in groups.items()
    }
    title = f"{rows[0]['model']}, float32, one thread ({rows[0]['device']}), over the builder's base graph"
    plot_latency(panels, title, folder / "decoding.png")


def _markdown(groups: Groups) -> str:
    first = next(iter(groups.values()))[REFERENCE]
    rows = [row for sides in groups.values() for row in sides.values()]
    lines = [
        "# A token of an exported decoder",
        "",
        f"{written_by('decoding', rows)}; {beside_graphs_of(rows)}. {first['model']}, float32, one text, one thread.",
        "",
        "A number is the time relative to the base graph of onnxruntime-genai's builder: the median over "
        f"{first['processes']} processes, with p20 and p80. Each process loads all sides in an order of its own, and "
        f"runs them in turn. Our adapters have {first['num_blocks']} blocks; the LoRA of the others has the same total "
        "rank and the same updates. The logits of every side were compared with torch first. torch is the merged model "
        "in transformers' eager mode with its `DynamicCache`.",
        "",
        *_table(groups),
        "",
        *_notes(groups),
    ]
    return "\n".join(lines) + "\n"


def _table(groups: Groups) -> list[str]:
    """Returns a table with one line per case, ratios above their goal in bold, and the goals below."""
    names = [side.name for side in SIDES[1:] if any(side.name in sides for sides in groups.values())]
    lines = []
    for sides in groups.values():
        base = sides[REFERENCE]
        cells = [_ratio(sides.get(name)) for name in names]
        label = f"{base['targets']}, {base['total_rank']}"
        lines.append([label, _step(base), format_ms(float(base["median_ms"])), *cells, _times_faster(sides)])
    for targets in dict.fromkeys(sides[REFERENCE]["targets"] for sides in groups.values()):
        goals = [f"≤ {GOALS[name][targets]:.2f}" if name in GOALS else "" for name in names]
        lines.append([f"goal: {targets}", "", "", *goals, f"≥ {TIMES_FASTER_THAN_TORCH:.1f} ×"])
    headings = ["adapter, total rank", "step", f"{REFERENCE}, ms", *names, "merged, faster than torch"]
    return markdown_table(headings, lines, text_columns=2)


def _step(row: Row) -> str:
    return f"a token after {row['past']}" if int(row["past"]) else f"the first {row['new']}"


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{float(row['ratio']):.2f}"
    is_missed = row["goal"] and float(text) > float(row["goal"])
    bounds = f"({float(row['ratio_p20']):.2f}–{float(row['ratio_p80']):.2f})"
    return f"**{text}** {bounds}" if is_missed else f"{text} {bounds}"


def _times_faster(sides: Mapping[str, Row]) -> str:
    if TORCH not in sides or MERGED not in sides:
        return ""
    times = float(sides[TORCH]["ratio"]) / float(sides[MERGED]["ratio"])
    text = f"{times:.1f} ×"
    return text if times >= TIMES_FASTER_THAN_TORCH else f"**{text}**"


def _notes(groups: Groups) -> list[str]:
    lines = [
        "* Bold: misses its goal.",
        f"* *Olive*: the graphs of [onnxruntime-genai issue 1661]({ISSUE}), in which a LoRA of rank 8 slows generation "
        "by 30 % even if none is active. They are the builder's graphs with a LoRA, whose weights Olive's pass "
        "`ExtractAdapters` turns into optional inputs. The issue measured them with weights of 4 bits, an eighth of "
        "what is read here for each token.",
        "* *builder, LoRA baked in*: the graph of onnxruntime-genai's builder with the option `adapter_path`.",
        "* A step is one run of a session that gets the cache and writes the complete next one. The builder's graphs "
        "and ours can also run with one buffer for both.",
    ]
    if not any("Olive" in side for sides in groups.values() for side in sides):
        lines.append("* Olive's sides were left out: no olive-ai was found (`--olive PYTHON`).")
    return lines
