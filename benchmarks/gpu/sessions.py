"""Do graphs compute on CUDA and TensorRT what torch computes on the CPU in float32?

A random model with an adapter in every linear is exported in each form and run. The name of each side says what is
compared. Timing is a part of its own.
"""

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import melora_fx
from benchmarks.common.cases import Row
from benchmarks.common.models import EXAMPLE, build, token_arrays
from benchmarks.common.needs import CACHE
from benchmarks.common.random_models import SMALL
from exporters import OrtRunner, TorchRunner, export_onnx, write_ort_adapter
from exporters.onnx_runtime import Arrays
from melora_fx import MELoRAError

from .cells import Cell, run_cells
from .graphs import why_no_graph, why_no_session
from .recorder import Recorder

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest difference from torch, relative to the largest value. The adapter's effect is over ten times as large."""
SHAPES = ((8, 128), (1, 16), (3, 77))
"""Batch sizes and numbers of tokens of the inputs."""
SMALL_SHAPES = ((2, 8), (1, 5))


class Graph(NamedTuple):
    """The graph that a case exports and runs."""

    model: str
    provider: str
    adapter: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.model}, {self.provider}, {self.adapter}, {self.precision}"

    @property
    def target(self) -> str:
        return "tensorrt" if self.provider == "tensorrt" else "ort-cuda"


def _graphs() -> Iterator[tuple[Graph, float]]:
    """Yields each graph with its approximate duration in seconds."""
    for model in ("MiniLM-shaped", "SmolLM2-shaped"):
        for adapter in ("fold", "keep", "swap"):
            yield Graph(model, "cuda", adapter, "fp16"), 25
    for adapter in ("fold", "swap"):
        yield Graph("MiniLM-shaped", "cuda", adapter, "fp32"), 20
    for precision in ("fp16", "fp32"):
        for adapter in ("fold", "keep"):
            yield Graph("MiniLM-shaped", "tensorrt", adapter, precision), 60


def run(record: Recorder) -> None:
    run_cells(cells(), record)


def cells() -> list[Cell]:
    lacks = {provider: why_no_session(provider) for provider in ("cuda", "tensorrt")}
    return [
        Cell(graph.name, seconds, functools.partial(measure, graph), why_no_graph(), lacks[graph.provider])
        for graph, seconds in _graphs()
    ]


def measure(graph: Graph, dry: bool) -> list[Row]:
    """Returns a row for each comparison; in a dry run the graph runs on the CPU.

    Raises:
        MELoRAError: if a difference is too large; names all that are.
    """
    model = build(graph.model + (SMALL if dry else ""), "unmerged", CACHE, "all-linear", 8, 8)
    _strengthen(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        options: dict[str, Any] = {"adapter": graph.adapter, "target": graph.target, "precision": graph.precision}
        export_onnx(model, EXAMPLE, path, verify=False, **options)
        melora_fx.save_adapter(model, path.with_name("adapter"))
        shapes = SMALL_SHAPES if dry else SHAPES
        provider = "cpu" if dry else graph.provider
        rows = [*_beside_torch(graph, model, path, provider, shapes), *_beside_itself(graph, path, provider, shapes[0])]
    if far := [f"{row['side']}: {row['difference']:.1e}" for row in rows if not row["difference"] <= row["tolerance"]]:
        raise MELoRAError(f"differences above their tolerance: {', '.join(far)}")
    return rows


@torch.no_grad()
def _strengthen(model: nn.Module) -> None:
    """Makes the adapter so large that its absence shows in half precision."""
    for site in melora_fx.sites(model).values():
        site.lora_b.mul_(10)
    adapted = TorchRunner(model).run(token_arrays(*SMALL_SHAPES[0]))
    with melora_fx.disabled(model):
        base = TorchRunner(model).run(token_arrays(*SMALL_SHAPES[0]))
    assert _difference(base, adapted)["difference"] > 10 * TOLERANCE["fp16"]


def _beside_torch(
    graph: Graph, model: nn.Module, path: Path, provider: str, shapes: Sequence[tuple[int, int]]
) -> Iterator[Row]:
    """Compares the graph with the model on the CPU in float32, at each shape, with each adapter that it accepts."""
    runner = OrtRunner(path, provider=provider, shapes=_ranges(shapes) if provider == "tensorrt" else None)
    nodes = runner.describe()["nodes"]
    adapters: dict[str, Path | None] = {"adapter": None}
    if graph.adapter == "swap":
        file = path.with_suffix(".onnx_adapter")
        write_ort_adapter(path.with_name("adapter"), path, file)
        adapters = {"no adapter": None, "adapter folder": path.with_name("adapter"), "adapter file": file}
    for shape, (name, adapter) in itertools.product(shapes, adapters.items()):
        inputs = token_arrays(*shape)
        with melora_fx.disabled(model) if name == "no adapter" else contextlib.nullcontext():
            expected = TorchRunner(model).run(inputs)
        found = runner.run(inputs, adapter)
        side = f"{shape[0]} × {shape[1]}, {name}, beside torch"
        yield {"side": side, **_difference(found, expected), "tolerance": TOLERANCE[graph.precision], "nodes": nodes}


def _beside_itself(graph: Graph, path: Path, provider: str, shape: tuple[int, int]) -> Iterator[Row]:
    """Compares the other ways to run the graph on the same provider."""
    inputs = token_arrays(*shape)
    fixed = _ranges([shape]) if provider == "tensorrt" else None
    runner = OrtRunner(path, provider=provider, shapes=fixed)
    expected = runner.run(inputs)
    tolerance = TOLERANCE[graph.precision]
    unbound = OrtRunner(path, provider=provider, shapes=fixed, io_binding=False)
    yield {"side": "without IO binding", **_difference(unbound.run(inputs), expected), "tolerance": tolerance}
    on_device = runner.run_on_device(runner.to_device(inputs))
    arrays = {name: value.numpy() for name, value in on_device.items()}
    yield {"side": "left on the device", **_difference(arrays, expected), "tolerance": tolerance}
    if provider == "cuda" and graph.adapter != "swap":
        options = {"enable_cuda_graph": True}
        replayed = OrtRunner(path, provider=provider, shapes=_ranges([shape]), provider_options=options)
        found = [replayed.run(inputs) for _ in range(3)][-1]
        yield {"side": "in a CUDA graph", **_difference(found, expected), "tolerance": tolerance}


def _ranges(shapes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int, int]]:
    """Returns the argument `shapes` of `OrtRunner` that allows all these shapes."""
    by_axis = {"batch": [batch for batch, _ in shapes], "sequence": [sequence for _, sequence in shapes]}
    return {axis: (min(sizes), sizes[0], max(sizes)) for axis, sizes in by_axis.items()}


def _difference(found: Arrays, expected: Arrays) -> Row:
    """Returns the largest difference relative to the largest value, over all outputs; NaN if an output has NaN."""
    differences = [
        np.abs(found[name].astype(np.float64) - value).max() / np.abs(value).max() for name, value in expected.items()
    ]
    return {"difference": float(np.max(differences))}
