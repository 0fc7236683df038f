"""Blocks about several processes: measured, and calculated on paper."""

from benchmarks.processes import processes_table
from benchmarks.training.scale_model import scale_table

from .block import Rows
from .words import listed, number, origin, paragraph


def measured(rows: Rows) -> list[str]:
    """Returns a sentence and the table of docs/SCALE.md, from processes.csv."""
    ours = [row for row in rows if row["side"].startswith("ours")]
    loss = max(number(row, "loss_difference") for row in ours)
    gradient = max(number(row, "gradient_difference") for row in ours)
    numbers = listed(list(dict.fromkeys(row["processes"] for row in rows)))
    modes = len(dict.fromkeys(row["mode"] for row in rows))
    return [
        *paragraph(
            f"With our adapters, losses differ from those of one process by {loss:.0e} at most, and gradients by "
            f"{gradient:.0e} of the largest one, in {modes} modes with {numbers} processes, on "
            f"{origin(rows, 'torch', 'transformers', 'peft')}:"
        ),
        "",
        *processes_table(rows),
    ]


def on_paper(rows: Rows) -> list[str]:
    """Returns the table of `scale_model`, which needs no rows."""
    return scale_table()
