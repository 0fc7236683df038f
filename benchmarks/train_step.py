"""What does a training step cost, relative to the frozen model's, for MELoRA here and for its alternatives?

Varies one factor at a time around a centre: the attention's projections and, in MiniLM, every dense layer; 8 blocks of
rank 8; float32; one thread. A cell is one such setting. It runs in its own process, which holds all sides of the cell
and times them in turn, step by step. The floor is a step of the frozen model with an input that requires a gradient.
The optimizer is fused AdamW. The cell of a tiny model shows what Python costs: nothing else takes time there. Columns:

* saved_mib: what autograd saves for the backward pass (eager; distinct storages without parameters, buffers and input)
* peak_memory_mib: the peak memory of a step above the memory in use before it
* parameters: the number of trained parameters
* compile_s: seconds that the first step of a compiled model takes longer than the second, without a cache on disk
* graph_breaks, recompiles: those of a compiled model; graphs compiled in its second step

Writes train_step.csv, train_step.md and train_step.png.
"""

import functools
import json
import sys
import time
import warnings
from argparse import Namespace

import torch
import transformers
from torch import nn

from exporters.measuring.timing import time_in_turn

from .common.cases import Case, Row, run_apart, run_cases, timed_rows
from .common.needs import why_missing
from .training.step_cost import Step, make_step, peak_memory_mib, saved_mib
from .training.train_cells import Cell, all_cells, quick_cells
from .training.train_report import write_report
from .training.train_sides import SEQUENCE, make_side

STEPS_PER_ROUND = 2
CELL_TIMEOUT_S = 1800
"""A cell takes up to three minutes on a quiet machine."""

KEEP_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"), str(2**30))
"""With them glibc returns no memory to the system between steps, which avoids page faults; no effect without glibc."""


def run(options: Namespace) -> int:
    cases = [
        Case(
            cell.key,
            functools.partial(measure_apart, cell, options),
            "" if options.quick else why_missing(cell.setting.model, options.cache),
            options.device,
        )
        for cell in cells_of(options.quick, options.llama)
    ]
    settings = f"rounds {options.rounds}, llama {options.llama}"
    return run_cases(options, cases, settings=settings, write_report=write_report)


def cells_of(quick: bool, llama: str) -> list[Cell]:
    hidden, intermediate, layers, heads = map(int, llama.split(","))
    return quick_cells() if quick else all_cells((hidden, intermediate, layers, heads))


def measure_apart(cell: Cell, options: Namespace) -> list[Row]:
    """Runs `measure` in its own process."""
    which = json.dumps([options.quick, options.llama, cell.key, options.rounds, options.device])
    environment = KEEP_MEMORY if cell.keeps_memory else {}
    return run_apart("train_step", which, timeout_s=CELL_TIMEOUT_S, environment=environment)


def measure(cell: Cell, rounds: int, device: str) -> list[Row]:
    torch.set_num_threads(cell.threads)
    steps, facts = prepare_all(cell, device)
    num_steps = rounds * STEPS_PER_ROUND * (20 if cell.setting.model == "Tiny" else 1)
    seconds = time_in_turn(steps, rounds=num_steps)
    return timed_rows(seconds, "frozen", with_peaks(facts, steps, device))


def prepare_all(cell: Cell, device: str) -> tuple[dict[str, Step], dict[str, Row]]:
    """Returns the step of each side, and its columns that are not times."""
    start_compiler(cell, device)
    prepared = {name: prepare_side(name, cell, device) for name in cell.sides}
    return {name: step for name, (step, _) in prepared.items()}, {name: found for name, (_, found) in prepared.items()}


def start_compiler(cell: Cell, device: str) -> None:
    """Resets the compiler and compiles once, so that no side pays for its start or reuses earlier compilations."""
    if cell.mode == "compiled":
        torch._dynamo.reset()
        torch._inductor.config.force_disable_caches = True  # type: ignore[attr-defined]
        torch.compile(nn.Linear(8, 8, device=device))(torch.randn(2, 8, device=device)).sum().backward()


def prepare_side(name: str, cell: Cell, device: str, backend: str = "inductor") -> tuple[Step, Row]:
    """Builds the model of a side on the device and runs `prepare` on it. `backend`: that of `torch.compile`."""
    with torch.device(device):
        model = make_side(name, cell.setting)
    step, found = prepare(model.to(device), cell, device, backend)
    return step, facts_of(cell) | found


def with_peaks(facts: dict[str, Row], steps: dict[str, Step], device: str) -> dict[str, Row]:
    """Returns `facts` with the peak memory of each side's step."""
    return {name: facts[name] | {"peak_memory_mib": peak_memory_mib(step, device)} for name, step in steps.items()}


def facts_of(cell: Cell) -> Row:
    """Returns the columns that all sides of a cell share, and empty ones for values that some sides lack."""
    names = ("targets", "num_blocks", "rank", "dtype", "dropout")
    return {
        "model": cell.setting.model,
        "mode": cell.mode,
        **{name: getattr(cell.setting, name) for name in names},
        "memory": "kept" if cell.keeps_memory else "",
        "threads": cell.threads,
        "tokens": cell.tokens,
    } | dict.fromkeys(("saved_mib", "peak_memory_mib", "parameters", "compile_s", "graph_breaks", "recompiles"))


def prepare(model: nn.Module, cell: Cell, device: str, backend: str) -> tuple[Step, Row]:
    """Builds the training step of one side and runs it twice; returns the step and the columns measured so far."""
    length = SEQUENCE[cell.setting.model]
    width = model.config.hidden_size  # type: ignore[union-attr]
    dtype = getattr(torch, cell.setting.dtype)
    torch.manual_seed(0)
    embeddings = torch.randn(cell.tokens // length, length, width, device=device).mul_(0.5).to(dtype).requires_grad_()
    is_compiled = cell.mode == "compiled"
    step, num_parameters = make_step(model, embeddings, torch.compile(model, backend=backend) if is_compiled else None)
    facts: Row = {"parameters": num_parameters}
    if not is_compiled:
        facts["saved_mib"] = saved_mib(model, embeddings)
    torch._dynamo.utils.counters.clear()  # a reset would compile the sides before this one again
    start = time.perf_counter()
    step()
    first_s = time.perf_counter() - start
    counters = torch._dynamo.utils.counters
    num_graphs = counters["stats"]["unique_graphs"]
    start = time.perf_counter()
    step()
    if is_compiled:
        facts |= {
            "compile_s": round(first_s - (time.perf_counter() - start), 1),
            "graph_breaks": sum(counters["graph_break"].values()),
            "recompiles": counters["stats"]["unique_graphs"] - num_graphs,
        }
    return step, facts


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _quick, _llama, _key, _rounds, _device = json.loads(sys.argv[1])
    (_cell,) = [cell for cell in cells_of(_quick, _llama) if cell.key == _key]
    print(json.dumps(measure(_cell, _rounds, _device)))
