"""Blocks about exported graphs."""

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.deployment.peers_report import overview
from exporters.measuring.tables import markdown_table

from .block import Row, Rows
from .words import by_case, machine, number, origin, paragraph, per_cent, span

LATENCIES = {
    "MiniLM-L6, 1 × 16, q,v": "MiniLM-L6, cpu: 1 × 16, q,v",
    "MiniLM-L6, 8 × 64, q,v": "MiniLM-L6, cpu: 8 × 64, q,v",
    "MPNet-base, 1 × 64, q,v": "MPNet-base, cpu: 1 × 64, q,v",
    "MiniLM-L6, 1 × 16, all-linear": "MiniLM-L6, cpu: 1 × 16, all-linear",
    "MiniLM-L6, 8 × 64, all-linear": "MiniLM-L6, cpu: 8 × 64, all-linear",
    "MPNet-base, 1 × 64, all-linear": "MPNet-base, cpu: 1 × 64, all-linear",
}
"""Row of the table in docs/SERVE.md → case in latency.csv."""
_LATENCY_SIDES = {
    "merged": "merged",
    "unmerged": "unmerged, block",
    "swap, no adapter": "swap, no adapter",
    "swap, one adapter": "swap, one adapter",
    "PEFT unmerged": "PEFT unmerged",
}
TOKENS = {
    "q,v, 8": "q,v, total rank 8, a token after 64",
    "all-linear, 8": "all-linear, total rank 8, a token after 64",
    "all-linear, 64": "all-linear, total rank 64, a token after 64",
}
"""Row of the table in docs/DECODERS.md → case in decoding.csv."""
_TOKEN_SIDES = {
    "merged": "merged",
    "unmerged": "unmerged",
    "swap, no adapter": "swap, none active",
    "swap, one adapter": "swap, active",
    "builder's LoRA": "builder, LoRA baked in",
    "Olive, no adapter": "Olive, none active",
    "Olive, one adapter": "Olive, active",
}


def latency(rows: Rows) -> list[str]:
    """Returns the table of docs/SERVE.md, from latency.csv."""
    cases = by_case(rows)
    found = [[cases[case][side] for side in _LATENCY_SIDES.values()] for case in LATENCIES.values()]
    widths = [
        (number(row, "p80_ms") - number(row, "p20_ms")) / number(cases[row["case"]]["base"], "median_ms")
        for of_case in found
        for row in of_case
    ]
    return [
        *paragraph(
            f"Time relative to the base graph on ONNX Runtime's CPU provider ({machine(rows)}), with one thread, 8 "
            f"blocks of rank 8, and PEFT's LoRA of rank 64 "
            f"([all {len(cases)} cells](../benchmarks/results/latency.md)):"
        ),
        "",
        *_ratios(["model, batch × tokens, adapted", *_LATENCY_SIDES], LATENCIES, found),
        "",
        _width(widths),
    ]


def decoding(rows: Rows) -> list[str]:
    """Returns the table of docs/DECODERS.md, from decoding.csv."""
    cases = by_case(rows)
    found = [[cases[case].get(side) for side in _TOKEN_SIDES.values()] for case in TOKENS.values()]
    widths = [number(row, "ratio_p80") - number(row, "ratio_p20") for of_case in found for row in of_case if row]
    return [
        *paragraph(
            f"Time of [one token](../benchmarks/results/decoding.md) of {rows[0]['model']} after 64, with a cache, "
            "relative to the base graph of onnxruntime-genai's builder: our adapters, the builder's own LoRA, and "
            f"Olive's ({machine(rows)}, one thread):"
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
        f"From p20 to p80, the runs of a cell spread over {median} of the base graph's time in the median, and over "
        f"{widest} at most."
    )


def peers(rows: Rows) -> list[str]:
    """Returns the table of docs/EXPORT.md, from peers.csv."""
    return [
        *paragraph(
            f"Medians over {span([number(row, 'processes') for row in rows], '.0f')} processes, each of which loads "
            f"all graphs, on {origin(rows, 'torch', 'transformers', 'onnxruntime')}:"
        ),
        "",
        *overview(rows),
    ]


def texts(rows: Rows) -> list[str]:
    """Returns a sentence of docs/DECODERS.md, from the last case of generation.csv."""
    written = [row for row in rows if row["case"] == rows[-1]["case"] and not row["side"].startswith("torch")]
    counts = [row["same_texts"].split(" of ") for row in written]
    same, of = (sum(int(count[index]) for count in counts) for index in (0, 1))
    return paragraph(
        f"**Measured** with {rows[-1]['case'].partition(',')[0]} on {origin(rows, 'torch', 'onnxruntime')}: of {of} "
        "texts that merged, unmerged and swappable graphs generated, in `generate` and in onnxruntime-genai, "
        f"{same} equal [torch's](../benchmarks/results/generation.md), token by token."
    )
