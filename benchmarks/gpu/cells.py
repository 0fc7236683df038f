"""Runs the cases of a part that measure something, one after another."""

import gc
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from .recorder import Recorder, in_a_line, say
from .rows import FAILED, LACKING, PASSED

LOST = 5
"""Exit code of a process that has lost the device: after an error in a kernel every later call fails too."""


class Cell(NamedTuple):
    """A case that measures.

    Attributes:
        name: the name of the case.
        seconds: the approximate duration on an H100; the case does not begin with less time left.
        measure: returns the sides, given whether this is a dry run, which builds all and times nothing. A side that
            failed has a `reason`.
        lacks: what to install for the case; empty if nothing is missing.
        lacks_to_run: what else to install, except for a dry run.
    """

    name: str
    seconds: float
    measure: Callable[[bool], list[dict[str, Any]]]
    lacks: str = ""
    lacks_to_run: str = ""


def run_cells(cells: Iterable[Cell], record: Recorder) -> None:
    """Measures one case after another."""
    by_name = {cell.name: cell for cell in cells}
    for name in record.in_order(by_name):
        cell = by_name[name]
        if lacks := cell.lacks or ("" if record.dry else cell.lacks_to_run):
            record.ends(name, LACKING, reason=lacks)
        elif record.begins(name, 0 if record.dry else cell.seconds):
            _run(cell, record)


def _run(cell: Cell, record: Recorder) -> None:
    start = time.perf_counter()
    try:
        sides = cell.measure(record.dry)
        reason = "; ".join(f"{side['side']}: {side['reason']}" for side in sides if "reason" in side)
        facts = {"seconds": round(time.perf_counter() - start, 1), "sides": sides}
        record.ends(cell.name, FAILED if reason else PASSED, **({"reason": reason} if reason else {}), **facts)
    except Exception as error:  # must not stop the other cases
        traceback.print_exc()
        record.ends(cell.name, FAILED, reason=in_a_line(error))
    if is_lost():
        raise SystemExit(LOST)
    torch.compiler.reset()
    gc.collect()  # models contain cycles: without this a cell's models stay while the next are built
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_lost() -> bool:
    """Returns whether this process has lost the device, and prints why."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        say(f"  the device is lost to this process: {in_a_line(error)}")
        return True
    return False
