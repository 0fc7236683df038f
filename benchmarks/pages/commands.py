"""Blocks about the reports of `melora-fx demo`, `melora-fx train` and the example of instruction tuning."""

from benchmarks.report_rows import EPOCH, FOLDED, LORA, MAJORITY
from exporters.measuring.tables import markdown_table

from .block import Row, Rows
from .words import listed, machine, number, origin, paragraph, per_cent

_TIMED = {"merged": "onnx merged", "unmerged": "onnx unmerged", "torch eager": "torch eager"}


def demo(rows: Rows) -> list[str]:
    """Returns the table of docs/QUICKSTART.md."""
    sides = {row["side"]: row for row in rows}
    epochs = _epochs(rows)
    last = list(epochs.values())[-1]
    before, after = _accuracy(epochs["0"]), f"{_accuracy(last)} after {list(epochs)[-1]} epochs"
    timed = {name: sides[side] for name, side in _TIMED.items()}
    graphs = [timed["merged"], timed["unmerged"]]
    ratios = [f"{name} {number(row, 'ratio'):.2f}" for name, row in timed.items()]
    table = [
        ["held-out accuracy", f"{before} before training, {after} (majority baseline {_accuracy(sides[MAJORITY])})"],
        [
            "trainable parameters",
            f"{int(last['parameters']):,} with the head; a LoRA of equal rank has "
            f"{int(sides[LORA]['adapter_parameters']):,} without the head",
        ],
        ["folded compared with unfolded", f"max abs error {_error(sides[FOLDED])} in the logits"],
        [
            "merged / unmerged ONNX compared with torch",
            f"max abs error {' / '.join(map(_error, graphs))}; the same label on "
            f"{per_cent(number(graphs[0], 'same_labels'))} of held-out texts",
        ],
        ["latency relative to the base graph", f"{listed(ratios)}, one thread, 8 × 21 tokens"],
    ]
    caption = (
        f"Results of one `melora-fx demo` on {machine(rows)} (MiniLM-L6, 1,370 English utterances on 12 topics, "
        "adapters in `query` and `value`, 8 blocks of rank 8):"
    )
    return [*paragraph(caption), "", *markdown_table(["", ""], table, text_columns=2)]


def train(rows: Rows) -> list[str]:
    """Returns the table of docs/TRAINING.md, and a sentence on what was trained."""
    epochs = _epochs(rows)
    last = list(epochs.values())[-1]
    majority = next(row for row in rows if row["side"] == MAJORITY)
    return [
        *markdown_table(["after epoch", *epochs], [["held-out accuracy", *map(_accuracy, epochs.values())]]),
        "",
        *paragraph(
            f"{int(last['parameters']):,} values are trained, {int(last['adapter_parameters']):,} of them in adapters. "
            f"The majority baseline is {_accuracy(majority)}. Run on {origin(rows, 'torch', 'transformers')}."
        ),
    ]


def tuning(rows: Rows) -> list[str]:
    """Returns the table of docs/TRAINING.md."""
    sides = {row["side"]: row for row in rows}
    names = ("base", "tuned")
    table = [
        ["held-out loss, nats per token of the answers", *(f"{number(sides[name], 'loss'):.3f}" for name in names)],
        ['correct, by the number after "The answer is"', *(per_cent(number(sides[name], "stated")) for name in names)],
        ["correct, by the last number", *(per_cent(number(sides[name], "last_number")) for name in names)],
    ]
    run_on = f"On 100 problems that were not trained on. Run on {origin(rows, 'torch', 'transformers', 'lm-eval')}."
    return [*markdown_table(["", *names], table), "", *paragraph(run_on)]


def _epochs(rows: Rows) -> dict[str, Row]:
    """Returns number → row."""
    return {row["side"].removeprefix(EPOCH): row for row in rows if row["side"].startswith(EPOCH)}


def _accuracy(row: Row) -> str:
    return per_cent(number(row, "accuracy"), 1)


def _error(row: Row) -> str:
    return f"{number(row, 'max_abs_error'):.1e}"
