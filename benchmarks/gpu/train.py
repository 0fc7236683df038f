"""What does a training step cost relative to the frozen model's, here and in PEFT?

As in train_step, on random models. All sides of a cell are in memory at once and are timed in turn, step by step. The
MiniLM shape has adapters in its dense layers, the decoders in every linear. In float32 "ours" computes W + Δ if that is
faster.
"""

import traceback
from dataclasses import replace
from functools import partial

from benchmarks.common.cases import Row, timed_rows
from benchmarks.common.needs import CACHE, TRITON
from benchmarks.common.random_models import SMALL
from benchmarks.train_step import prepare_side, start_compiler, with_peaks
from benchmarks.training.train_cells import Cell as TrainCell
from benchmarks.training.train_sides import SEQUENCE, Setting
from exporters.measuring.timing import time_in_turn

from .cells import Cell, run_cells
from .recorder import Recorder, in_a_line

SECONDS = 10.0
"""Seconds of timing per cell."""
MAX_ROUNDS = 40
SIDES = ("frozen", "ours", "ours, plain nodes", "PEFT LoRA, equal rank", "PEFT LoRA, equal parameters")
COMPILED_SIDES = ("frozen", "ours", "PEFT LoRA, equal rank")
TRITON_SIDES = ("frozen", "ours", "ours, Triton")
"""Separate from the others, because a kernel that fails ends its whole process."""
_LLAMA = Setting("Llama-shaped, 1B", "all-linear", 8, "bfloat16")
_SMOLLM2 = Setting("SmolLM2-shaped", "all-linear", 8, "bfloat16")
_MINILM = Setting("MiniLM-shaped", "centre", 8, "bfloat16")
_CELLS = (  # setting, mode, tokens, sides, seconds
    (_LLAMA, "eager", 4096, SIDES, 45),
    (_MINILM, "eager", 8192, SIDES, 25),
    (_SMOLLM2, "eager", 4096, SIDES, 35),
    (replace(_MINILM, dtype="float32"), "eager", 8192, SIDES, 25),
    (_LLAMA, "eager", 4096, TRITON_SIDES, 35),
    (_MINILM, "eager", 8192, TRITON_SIDES, 25),
    (_MINILM, "compiled", 8192, COMPILED_SIDES, 60),
    (_LLAMA, "compiled", 4096, COMPILED_SIDES, 120),
    (_MINILM, "compiled", 8192, TRITON_SIDES, 60),
    (_SMOLLM2, "compiled", 4096, COMPILED_SIDES, 160),
)


def run(record: Recorder) -> None:
    run_cells(cells(), record)


def cells() -> list[Cell]:
    lacks = {TRITON_SIDES: TRITON.why_missing(CACHE)}
    return [
        Cell(cell.key + ", Triton" * (sides == TRITON_SIDES), seconds, partial(measure, cell), lacks.get(sides, ""))
        for setting, mode, tokens, sides, seconds in _CELLS
        for cell in [TrainCell(setting, mode, tokens=tokens, sides=sides)]
    ]


def measure(cell: TrainCell, dry: bool) -> list[Row]:
    """Returns a row for each side; the row of a side that fails has a `reason`, and the others continue."""
    device = "cuda"
    if dry:
        device = "cpu"
        model = cell.setting.model + SMALL
        cell = replace(cell, setting=replace(cell.setting, model=model), tokens=SEQUENCE[model])
    else:
        start_compiler(cell, device)
    steps, facts, failed = {}, {}, list[Row]()
    for side in cell.sides:
        try:
            steps[side], facts[side] = prepare_side(side, cell, device, "aot_eager" if dry else "inductor")
        except Exception as error:
            traceback.print_exc()
            failed.append({"side": side, "reason": in_a_line(error)})
    if dry or "frozen" not in steps:
        return [{"side": side} | found for side, found in facts.items()] + failed
    seconds = time_in_turn(steps, rounds=MAX_ROUNDS, warmup=2, max_seconds=SECONDS)
    return timed_rows(seconds, "frozen", with_peaks(facts, steps, device)) + failed
