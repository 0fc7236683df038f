"""What do several processes send, store and wait for with adapters, relative to the frozen model, here and in PEFT?

A small random Llama with adapters in all seven linears of a layer; gloo, one thread per process. A case is one way to
spread the model over 2 or 4 processes, which hold all sides and train them in turn, step by step. The floor is the
frozen model, spread in the same way, with an input that requires a gradient. Columns:

* the largest difference of three losses from those of one process with the whole batch, and of the adapter's gradients,
  relative to the largest gradient
* the collectives of a step in one process, and their bytes
* the memory that one process uses for parameters, buffers and AdamW's states
* the peak memory of a step in one process

PEFT's LoRA has its own plan under tensor parallelism, because its layers are not `nn.Linear`: one factor of each linear
is whole on every process. Writes processes.csv and processes.md.
"""

import functools
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from exporters.measuring.tables import markdown_table

from .common.cases import Case, Row, run_apart, run_cases
from .common.origin import written_by
from .training.processes_cell import FROZEN
from .training.spread import MODES

CELL_TIMEOUT_S = 900
_CASES = [(mode, number) for mode in MODES for number in (2, 4) if (mode, number) != ("FSDP and TP", 2)]
_QUICK_CASES = [("FSDP by layer", 2), ("TP", 2)]
_HEADINGS = (
    *("mode", "processes", "side", "losses differ by", "gradients differ by", "collectives", "added", "bytes, kB"),
    *("added, kB", "held, MiB", "peak of a step, MiB", "step over frozen"),
)


def run(options: Namespace) -> int:
    cases = [
        Case(f"{mode}, {number} processes", functools.partial(_measure, mode, number, options))
        for mode, number in (_QUICK_CASES if options.quick else _CASES)
    ]
    return run_cases(
        options, cases, settings=f"rounds {options.rounds}, llama {options.llama}", write_report=write_report
    )


def _measure(mode: str, number: int, options: Namespace) -> list[Row]:
    which = json.dumps([mode, number, options.rounds, options.llama])
    return run_apart("training.processes_cell", which, timeout_s=CELL_TIMEOUT_S)


def write_report(rows: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Writes processes.md into `folder`."""
    lines = [
        "# Several processes",
        "",
        f"{written_by('processes', rows)}. Over gloo, on two cores, which four processes must share. "
        "Losses and gradients: the largest difference from one process with the whole batch; for gradients, relative "
        "to the largest gradient. Collectives and bytes: those of a step in one process; added: above the frozen "
        "model's. Held: parameters, buffers and AdamW's states of one process. Step over frozen: the ratio of the "
        "medians, with the frozen model spread in the same way.",
        "",
        *processes_table(rows),
    ]
    (folder / "processes.md").write_text("\n".join(lines) + "\n")


def processes_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    floors = {row["case"]: row for row in rows if row["side"] == FROZEN}
    return markdown_table(_HEADINGS, [_cells(row, floors[row["case"]]) for row in rows], text_columns=3)


def _cells(row: Mapping[str, str], floor: Mapping[str, str]) -> list[str]:
    def added(column: str) -> int:
        return int(row[column]) - int(floor[column])

    is_floor = row["side"] == FROZEN
    return [
        row["mode"],
        row["processes"],
        row["side"],
        f"{float(row['loss_difference']):.0e}",
        "" if is_floor else f"{float(row['gradient_difference']):.0e}",
        row["collectives"],
        "" if is_floor else f"{added('collectives'):+d}",
        f"{int(row['bytes']) / 1000:,.1f}",
        "" if is_floor else f"{added('bytes') / 1000:+,.1f}",
        row["held_mib"],
        row["peak_memory_mib"],
        f"{float(row['ratio']):.2f}",
    ]
