"""What does an adapter cost at inference, merged and unmerged, compared with the base and PEFT, in float16?

As in latency, on random models. Graphs run on ONNX Runtime's CUDA provider, with and without a CUDA graph, and on
TensorRT.
"""

import functools
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.cases import Row
from benchmarks.common.needs import CACHE
from benchmarks.common.random_models import SMALL
from benchmarks.deployment.latency_cells import TARGETS
from benchmarks.deployment.latency_cells import Cell as LatencyCell
from benchmarks.latency import Workshop, errors, measure_cell

from .cells import Cell, run_cells
from .graphs import why_no_graph, why_no_session
from .recorder import Recorder

SECONDS = 6.0
"""Seconds of timing per cell, over three loads."""
ORIGIN = ("versions", "device", "commit", "time")
"""Columns that are already in the line of a case."""
_ALL = {"targets": "all-linear"}
_CELLS = {  # provider: (model, changes to the centre, seconds)
    "torch eager": [
        ("MiniLM-shaped", {"sequence": 128}, 15),
        ("MiniLM-shaped", {"sequence": 128, **_ALL}, 15),
        ("MiniLM-shaped", {"batch": 1, "sequence": 128}, 15),
        ("SmolLM2-shaped", {"batch": 4, "sequence": 512, **_ALL}, 20),
    ],
    "cuda": [
        ("MiniLM-shaped", {"sequence": 128}, 30),
        ("MiniLM-shaped", {"batch": 1, "sequence": 128}, 20),
        ("MiniLM-shaped", {"sequence": 128, **_ALL}, 30),
    ],
    "cuda graph": [("MiniLM-shaped", {"batch": 1, "sequence": 128}, 20)],
    "tensorrt": [("MiniLM-shaped", {"sequence": 128}, 90)],
    "torch compile": [
        ("MiniLM-shaped", {"sequence": 128}, 60),
        ("MiniLM-shaped", {"sequence": 128, **_ALL}, 60),
    ],
}


def run(record: Recorder) -> None:
    run_cells(cells(), record)


def cells() -> list[Cell]:
    return [
        Cell(cell.name, seconds, functools.partial(measure, cell), *_lacks(provider))
        for provider, of_provider in _CELLS.items()
        for model, changes, seconds in of_provider
        for cell in [LatencyCell(model, provider, precision="fp16", **changes)]
    ]


def _lacks(provider: str) -> tuple[str, str]:
    """Returns what to install to export graphs for a provider, and what to install to run them on it."""
    if provider.startswith("torch"):
        return "", ""
    return why_no_graph(), why_no_session(provider.partition(" ")[0])


@functools.cache
def _workshop(device: str, backend: str, cache: Path = CACHE) -> Workshop:
    cache.mkdir(parents=True, exist_ok=True)
    return Workshop(cache, device, backend)


def measure(cell: LatencyCell, dry: bool) -> list[Row]:
    """Returns the rows of a cell, one per form; a dry run exports graphs for their provider, and runs on the CPU."""
    if not dry:
        rows = measure_cell(cell, _workshop("cuda", "inductor"), SECONDS)
        return [{name: value for name, value in row.items() if name not in ORIGIN} for row in rows]
    small = replace(cell, model=cell.model + SMALL, batch=2, sequence=8)
    if not cell.provider.startswith("torch"):
        small = replace(small, provider="cpu", target=TARGETS[cell.provider])
    workshop = _workshop("cpu", "aot_eager")
    with torch.no_grad():
        contenders = workshop.contenders(small)
    found = errors(small, contenders, workshop.inputs(small))
    return [{"side": side, "max_rel_difference": error} for side, error in found.items()]
