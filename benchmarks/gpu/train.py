"""What does a training step cost over the frozen model's, here and in PEFT?

As in train_step, on random models, all sides of which are in memory at once and take turns, step by step. MiniLM's
shape has adapters in its dense layers, the decoders in every linear. In float32 "ours" makes W + Δ if that is faster.
"""

import functools
from dataclasses import replace

from benchmarks.cases import Row, timed_rows
from benchmarks.needs import CACHE, TRITON
from benchmarks.random_models import SMALL
from benchmarks.train_cells import Cell as TrainCell
from benchmarks.train_sides import SEQUENCE, Setting
from benchmarks.train_step import prepare_all, with_peaks
from exporters.measuring.timing import time_in_turn

from .cells import Cell, run_cells
from .recorder import Recorder

SECONDS = 10.0
"""Of timing one cell."""
MAX_ROUNDS = 40
SIDES = ("frozen", "ours", "ours, Triton", "ours, plain nodes", "PEFT LoRA, equal rank", "PEFT LoRA, equal parameters")
COMPILED_SIDES = ("frozen", "ours", "ours, Triton", "PEFT LoRA, equal rank")
_CELLS = (  # model, targets, mode, dtype, tokens, seconds
    ("Llama-shaped, 1B", "all-linear", "eager", "bfloat16", 4096, 45),
    ("MiniLM-shaped", "centre", "eager", "bfloat16", 8192, 25),
    ("SmolLM2-shaped", "all-linear", "eager", "bfloat16", 4096, 35),
    ("MiniLM-shaped", "centre", "eager", "float32", 8192, 25),
    ("MiniLM-shaped", "centre", "compiled", "bfloat16", 8192, 80),
    ("Llama-shaped, 1B", "all-linear", "compiled", "bfloat16", 4096, 200),
    ("SmolLM2-shaped", "all-linear", "compiled", "bfloat16", 4096, 300),
)


def run(record: Recorder) -> None:
    run_cells(cells(), record)


def cells() -> list[Cell]:
    return [
        Cell(f"{model}, {mode}, {targets}, {dtype}, {tokens} tokens", seconds, functools.partial(measure, cell))
        for model, targets, mode, dtype, tokens, seconds in _CELLS
        for cell in [_cell(model, targets, mode, dtype, tokens)]
    ]


def _cell(model: str, targets: str, mode: str, dtype: str, tokens: int) -> TrainCell:
    sides = SIDES if mode == "eager" else COMPILED_SIDES
    if TRITON.why_missing(CACHE):
        sides = tuple(name for name in sides if name != "ours, Triton")
    return TrainCell(Setting(model, targets, 8, dtype), mode, tokens=tokens, sides=sides)


def measure(cell: TrainCell, dry: bool) -> list[Row]:
    """The rows of a cell, one a side."""
    if dry:
        model = cell.setting.model + SMALL
        small = replace(cell, setting=replace(cell.setting, model=model), tokens=SEQUENCE[model])
        _, facts = prepare_all(small, "cpu", "aot_eager")
        return [{"side": side} | found for side, found in facts.items()]
    steps, facts = prepare_all(cell, "cuda")
    seconds = time_in_turn(steps, rounds=MAX_ROUNDS, warmup=2, max_seconds=SECONDS)
    return timed_rows(seconds, "frozen", with_peaks(facts, steps, "cuda"))
