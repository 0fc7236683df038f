"""Blocks about exported graphs."""

import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.deployment.peers_graphs import MERGED
from benchmarks.deployment.peers_report import overview
from exporters.measuring.tables import markdown_table

from .block import Row, Rows
from .words import by_case, listed, machine, number, origin, paragraph, per_cent, span

LATENCIES = {
    "MiniLM-L6, 1 × 16, q,v": "MiniLM-L6, cpu: 1 × 16, q,v",
    "MiniLM-L6, 8 × 64, q,v": "MiniLM-L6, cpu: 8 × 64, q,v",
    "MPNet-base, 1 × 64, q,v": "MPNet-base, cpu: 1 × 64, q,v",
    "MiniLM-L6, 1 × 16, all-linear": "MiniLM-L6, cpu: 1 × 16, all-linear",
    "MiniLM-L6, 8 × 64, all-linear": "MiniLM-L6, cpu: 8 × 64, all-linear",
    "MPNet-base, 1 × 64, all-linear": "MPNet-base, cpu: 1 × 64, all-linear",
}
"""Row of the README's table → case of latency.csv."""
_LATENCY_SIDES = {
    "merged": "merged",
    "unmerged": "unmerged, block",
    "swap, none given": "swap, no adapter",
    "swap, one given": "swap, one adapter",
    "PEFT unmerged": "PEFT unmerged",
}
TOKENS = {
    "q,v, 8": "q,v, total rank 8, a token after 64",
    "all-linear, 8": "all-linear, total rank 8, a token after 64",
    "all-linear, 64": "all-linear, total rank 64, a token after 64",
}
"""Row of the README's table → case of decoding.csv."""
_TOKEN_SIDES = {
    "merged": "merged",
    "unmerged": "unmerged",
    "swap, none given": "swap, none active",
    "swap, one given": "swap, active",
    "builder's LoRA": "builder, LoRA baked in",
    "Olive, none given": "Olive, none active",
    "Olive, one given": "Olive, active",
}


def latency(rows: Rows) -> list[str]:
    """The README's table, of latency.csv."""
    cases = by_case(rows)
    found = [[cases[case][side] for side in _LATENCY_SIDES.values()] for case in LATENCIES.values()]
    widths = [
        (number(row, "p80_ms") - number(row, "p20_ms")) / number(cases[row["case"]]["base"], "median_ms")
        for of_case in found
        for row in of_case
    ]
    return [
        *paragraph(
            f"Time over the base graph's on ONNX Runtime's CPU ({machine(rows)}), one thread, 8 blocks of rank 8, "
            f"PEFT's LoRA of rank 64 ([all {len(cases)} cells](benchmarks/results/latency.md)):"
        ),
        "",
        *_ratios(["model, batch × tokens, adapted", *_LATENCY_SIDES], LATENCIES, found),
        "",
        _width(widths),
    ]


def decoding(rows: Rows) -> list[str]:
    """The README's table, of decoding.csv."""
    cases = by_case(rows)
    found = [[cases[case].get(side) for side in _TOKEN_SIDES.values()] for case in TOKENS.values()]
    widths = [number(row, "ratio_p80") - number(row, "ratio_p20") for of_case in found for row in of_case if row]
    return [
        *paragraph(
            f"[One token](benchmarks/results/decoding.md) of {rows[0]['model']} after 64, with a cache, over the base "
            "graph of onnxruntime-genai's builder, with the builder's own LoRA and Olive's beside ours "
            f"({machine(rows)}, one thread):"
        ),
        "",
        *_ratios(["adapted, total rank", *_TOKEN_SIDES], TOKENS, found),
        "",
        _width(widths),
    ]


def _ratios(headings: Sequence[str], labels: Iterable[str], found: Sequence[Sequence[Row | None]]) -> list[str]:
    lines = [
        [label, *(f"{number(row, 'ratio'):.2f}" if row else "" for row in of_case)]
        for label, of_case in zip(labels, found, strict=True)
    ]
    return markdown_table(headings, lines)


def _width(widths: Sequence[float]) -> str:
    median, widest = per_cent(statistics.median(widths)), per_cent(max(widths))
    return (
        f"From p20 to p80 a cell's runs spread over {median} of the base graph's time in the median, {widest} at most."
    )


def peers_in_short(rows: Rows) -> list[str]:
    """The README's sentence, of peers.csv: geometric means over the shapes of each model."""
    merged: dict[str, list[float]] = {}
    for row in rows:
        if row["side"] == MERGED:
            merged.setdefault(row["model"], []).append(number(row, "ratio"))
    means = [f"{np.exp(np.log(ratios).mean()):.2f} ({model})" for model, ratios in merged.items()]
    return paragraph(
        f"On a CPU ({machine(rows)}) our merged graph takes {listed(means)} of the time of the fastest graph that "
        "optimum-onnx, ONNX Runtime's optimizer, Olive or transformers makes: plain sessions, one thread, geometric "
        "means over batch sizes and lengths, GPT-2 without a cache "
        "([every cell](docs/EXPORT.md#beside-other-exporters))."
    )


def peers(rows: Rows) -> list[str]:
    """The table of docs/EXPORT.md, of peers.csv."""
    return [
        *paragraph(
            f"Medians of {span([number(row, 'processes') for row in rows], '.0f')} processes, each of which loads the "
            f"graphs anew, on {origin(rows, 'torch', 'transformers', 'onnxruntime')}:"
        ),
        "",
        *overview(rows),
    ]


def texts(rows: Rows) -> list[str]:
    """A sentence of docs/EXPORT.md, of generation.csv: of its last case."""
    written = [row for row in rows if row["case"] == rows[-1]["case"] and not row["side"].startswith("torch")]
    counts = [row["same_texts"].split(" of ") for row in written]
    same, of = (sum(int(count[index]) for count in counts) for index in (0, 1))
    return paragraph(
        f"**Measured** with {rows[-1]['case'].partition(',')[0]} on {origin(rows, 'torch', 'onnxruntime')}: of {of} "
        "texts that merged, unmerged and swapped graphs wrote, in `generate` and in onnxruntime-genai, "
        f"{same} are [torch's](../benchmarks/results/generation.md), token by token."
    )
