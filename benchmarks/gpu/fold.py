"""How fast is a fold in the device's memory, compared with PEFT's merge and a copy of the blocks? As in fold_speed."""

import functools
from argparse import Namespace

import torch

from benchmarks.common.cases import Row
from benchmarks.fold_speed import in_memory

from .cells import Cell, run_cells
from .recorder import Recorder

ROUNDS = 15
TIMES = ("median_ms", "p20_ms", "p80_ms", "ratio", "reference", "rounds", "gib_per_s")


def run(record: Recorder) -> None:
    run_cells(cells(), record)


def cells() -> list[Cell]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [
        Cell(f"memory, {str(dtype).removeprefix('torch.')}", 20, functools.partial(measure, dtype)) for dtype in dtypes
    ]


def measure(dtype: torch.dtype, dry: bool) -> list[Row]:
    """Returns a row for each way to merge."""
    if not dry:
        return in_memory(dtype, Namespace(quick=False, rounds=ROUNDS, threads=torch.get_num_threads()), "cuda")
    rows = in_memory(dtype, Namespace(quick=True, rounds=1, threads=1))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
