"""Blocks about folds."""

import statistics
from collections.abc import Sequence

from exporters.measuring.tables import markdown_table

from .block import Row, Rows
from .words import by_case, duration, listed, machine, number, origin, paragraph, per_cent, ratio, span, times

OURS = ("fold", "fold_checkpoint", "melora-fx fold", "fold_onnx")
_OTHER_VERBS = ("check_fold", "folded, in and out")
PEFT_MERGE, PEFT_DISK = "PEFT merge_adapter", "PEFT: load, merge_and_unload, save"
_FOLDED = {
    "memory": "264M parameters of Llama linears",
    "disk": "1.1B parameters, 3 shards",
    "onnx": "MiniLM-L6",
}


def short(rows: Rows) -> list[str]:
    """Returns sentences of docs/FOLD.md, from fold_speed.csv."""
    cases = by_case(rows)
    memory = [sides for name, sides in cases.items() if name.startswith("memory")]
    medians = [number(sides["fold"], "median_ms") for sides in memory]
    over_ours = [
        number(sides[PEFT_MERGE], column) / median
        for sides, median in zip(memory, medians, strict=True)
        for column in ("p20_ms", "p80_ms")
    ]
    threads = listed(sorted({sides["fold"]["threads"] for sides in memory}))
    disk = [sides for name, sides in cases.items() if name.startswith("disk")]
    ours, peft = ([sides[side] for sides in disk] for side in ("fold_checkpoint", PEFT_DISK))
    command = next(sides for sides in disk if "melora-fx fold" in sides)
    graph = next(sides for name, sides in cases.items() if name.startswith("onnx"))
    return paragraph(
        f"On {machine(rows)}, folding 264M parameters takes {span(medians, '.0f')} ms in float32 and bfloat16, with "
        f"{threads} threads. PEFT's `merge_adapter` at equal rank takes {span(over_ours, '.0f')} times as long (p20 to "
        f"p80 of its runs over our median). Folding a checkpoint of 1.1B parameters takes {_over_copy(ours)} times as "
        f"long as copying its folder, and {span([number(row, 'peak_mib') for row in ours], '.0f')} MiB of memory. "
        "PEFT's load, merge and save takes "
        f"{_over_copy(peft)} times as long as the copy, and "
        f"{span([number(row, 'peak_mib') / 1024 for row in peft], '.1f')} GiB. The command `melora-fx fold` takes "
        f"{duration(command['melora-fx fold'])}, the function {duration(command['fold_checkpoint'])}. On MiniLM-L6 "
        f"`fold_onnx` takes {duration(graph['fold_onnx'])}, an export {duration(graph['export_onnx'])}."
    )


def _over_copy(rows: Sequence[Row]) -> str:
    values = [number(row, "ratio") for row in rows]
    return span(values, ".0f" if min(values) >= 10 else ".2f")


def table(rows: Rows) -> list[str]:
    """Returns the table of docs/FOLD.md, from fold_speed.csv: each of our sides, and the sides it is compared with."""
    lines = []
    for sides in by_case(rows).values():
        others = [row for side, row in sides.items() if side not in (*OURS, *_OTHER_VERBS)]
        for row in (sides[side] for side in OURS if side in sides):
            beside = [f"{other['side']} {duration(other)} ({times(ratio(other, row))} ×)" for other in others]
            what = f"`{row['side']}`, {_FOLDED[row['part']]}, {row['dtype']}"
            peak = "" if row["peak_mib"] == "0" else row["peak_mib"]  # 0 for a command: its own process is not measured
            lines.append([what, duration(row), "; ".join(beside), row["threads"], row["gib_per_s"], peak])
    headings = ["", "median", "compared with (over ours)", "threads", "GiB/s read and written", "peak, MiB"]
    caption = f"Medians of interleaved runs on {origin(rows, 'torch', 'transformers', 'onnxruntime', 'peft')}:"
    return [*paragraph(caption), "", *markdown_table(headings, lines, text_columns=3)]


def rounding(rows: Rows) -> list[str]:
    """Returns the sentences of docs/FOLD.md, from the last case of fold_rounding.csv."""
    rows = [row for row in rows if row["case"] == rows[-1]["case"]]
    shares = {
        side: [row for row in rows if row["site"] and row["side"] == side]
        for side in ("ours", "PEFT", "PEFT safe_merge")
    }
    ours = [number(row, "rounded_away") for row in shares["ours"]]
    ways = {row["side"]: row for row in rows if row["loss_float32"]}
    change = number(ways["merged, ours"], "loss_float32") - number(ways["adapter unmerged"], "loss_float32")
    by_training = number(ways["adapter unmerged"], "loss_float32") - number(ways["base"], "loss_float32")

    def beside_ours(side: str) -> str:
        ratios = [number(row, "ratio") for row in shares[side]]
        row = ways[f"merged, {side}"]
        differing, merged = (f"{int(row[name]):,}" for name in ("differing_weights", "merged_weights"))
        return f"{span(ratios, '.4f')} times as much as ours at a site, and {differing} of {merged} weights differ"

    median, worst = per_cent(statistics.median(ours)), per_cent(max(ours))
    return paragraph(
        f"{rows[0]['case'].partition(',')[0]} in bfloat16, every linear adapted, after {rows[0]['steps']} steps of "
        f"training, on {origin(rows, 'torch', 'peft')}: the median site loses {median} of its update and the worst "
        f"{worst}. The held-out loss, computed in float32, changes by {change:+.0e}; training changed it by "
        f"{by_training:+.2f}. PEFT's default merge, which also rounds once, loses {beside_ours('PEFT')}; with "
        f"`safe_merge=True`, which rounds twice, it loses {beside_ours('PEFT safe_merge')} "
        "([the report](../benchmarks/results/fold_rounding.md))."
    )
