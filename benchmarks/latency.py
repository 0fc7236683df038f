"""What does an adapter cost at inference: merged, unmerged in each form, swappable, and as PEFT's model exported here?

Varies one factor at a time around a centre: batch 8 × 64 tokens, one thread, n = r = 8, query and value. All forms of a
cell run in turn, in an order drawn for every round, after their outputs have been compared. Graphs are loaded three
times, because a graph may be off by some per cent for as long as it stays loaded. Exports are kept in --cache. Writes
latency.csv, latency.md, and two pictures for each model: of its graphs, and of torch.

`--providers cuda`, `cuda graph` or `tensorrt` measures the graphs on that provider, `--device cuda` the torch cells on
that device.
"""

import functools
import hashlib
import random
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import melora_fx
from exporters import TorchRunner, compare
from exporters.measuring.machine import package_versions
from exporters.measuring.measure import Contender, measure
from melora_fx import MELoRAError

from .common.cases import Case, Row, measured_rows, run_cases
from .common.checkout import source_digest
from .common.models import EXAMPLE, build, token_arrays
from .common.needs import why_missing
from .deployment.latency_cells import QUICK, TARGETS, Cell, Form, cells
from .deployment.latency_report import write_report

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2}
"""Largest relative difference between forms whose outputs must be equal, by precision."""
MAX_ROUNDS = 200


def run(options: Namespace) -> int:
    workshop = Workshop(options.cache, options.device)
    cases = [
        Case(
            cell.name,
            functools.partial(measure_cell, cell, workshop, options.seconds),
            why_missing(cell.model, options.cache),
            options.device if cell.provider.startswith("torch") else cell.session["provider"],
        )
        for cell in (QUICK if options.quick else cells(options.providers.split(",")))
    ]
    return run_cases(options, cases, settings=f"seconds {options.seconds:g}", write_report=write_report)


class Workshop:
    """The exports and torch models of the cells. Exports are in a folder named after the sources and versions."""

    def __init__(self, cache: Path, device: str, backend: str = "inductor") -> None:
        self.cache = cache
        self.device = device
        self.backend = backend
        made_by = hashlib.sha256(f"{package_versions()} {source_digest()}".encode()).hexdigest()
        self.folder = cache / f"exports-{made_by[:12]}"
        self.torch_model = functools.lru_cache(maxsize=None)(self._torch_model)

    def contenders(self, cell: Cell, seed: int = 0) -> list[Contender]:
        """Returns the cell's forms in their order; `seed` decides the order in which they are loaded."""
        torch.set_num_threads(cell.threads)
        forms = list(cell.forms)
        random.Random(f"{cell.label} {seed}").shuffle(forms)
        loaded = {form.name: self._contender(cell, form) for form in forms}
        return [loaded[form.name] for form in cell.forms]

    def _contender(self, cell: Cell, form: Form) -> Contender:
        if cell.provider.startswith("torch"):
            compiled = cell.provider == "torch compile"
            facts = (cell.model, form.kind, cell.targets, cell.num_blocks, cell.rank)
            model = self.torch_model(*facts, cell.precision, compiled)
            return Contender(form.name, TorchRunner(model, threads=cell.threads))
        return self._graph(cell, form)

    def _graph(self, cell: Cell, form: Form) -> Contender:
        from exporters import OrtRunner  # needs packages that torch cells do not need
        from exporters.adapters.ort_adapter import swap_tensors
        from exporters.onnx_files.metadata import read_facts
        from melora_fx.saving.adapter_file import read_adapter

        path = self.exported(cell, form)
        runner = OrtRunner(path, **cell.session)
        if not form.gives_adapter:
            return Contender(form.name, runner, path)
        tensors = swap_tensors(read_adapter(path.with_suffix(".adapter")), read_facts(path))
        return Contender(form.name, runner.with_tensors(tensors), path, tensors)

    def exported(self, cell: Cell, form: Form) -> Path:
        """Returns the form's graph; if it is missing, exports it and saves its adapter in a folder next to it."""
        from exporters import export_onnx  # as above

        target = cell.target or TARGETS[cell.provider]
        what = [form.kind, *form.options.values(), cell.precision, target]
        what += [] if form.kind == "base" else [cell.targets, f"n{cell.num_blocks}", f"r{cell.rank}"]
        path = self.folder / cell.model / f"{'-'.join(what).replace(',', '')}.onnx"
        if not path.is_file():
            print(f"    exporting {path.stem} …", flush=True)
            model = build(cell.model, form.kind, self.cache, cell.targets, cell.num_blocks, cell.rank)
            if melora_fx.sites(model):
                melora_fx.save_adapter(model, path.with_suffix(".adapter"))
            options = form.options | ({"precision": cell.precision} if cell.precision != "fp32" else {})
            export_onnx(model, EXAMPLE, path, target=target, **options)  # unchecked ones may refuse a batch of one
        return path

    def inputs(self, cell: Cell) -> dict[str, Any]:
        """Returns token ids and a mask of ones; for torch cells as tensors on the device."""
        arrays = token_arrays(cell.batch, cell.sequence)
        if not cell.provider.startswith("torch"):
            return arrays
        return {name: torch.as_tensor(array, device=self.device) for name, array in arrays.items()}

    def _torch_model(
        self, name: str, kind: str, targets: str, num_blocks: int, rank: int, precision: str, compiled: bool
    ) -> Any:
        if compiled:
            model = self.torch_model(name, kind, targets, num_blocks, rank, precision, False)
            return torch.compile(model, dynamic=True, backend=self.backend)
        model = build(name, kind, self.cache, targets, num_blocks, rank).to(self.device)
        return model.half() if precision == "fp16" else model


def errors(cell: Cell, contenders: list[Contender], inputs: dict[str, Any]) -> dict[str, float]:
    """Returns the relative difference of each form from the form that it must equal.

    Raises:
        MELoRAError: if a difference is too large, or if the adapter changes nothing.
    """
    runners = {contender.form: contender.runner for contender in contenders}
    found = {form.name: compare(runners[form.name], runners[form.equals], inputs).max_rel_error for form in cell.forms}
    if wrong := {name: error for name, error in found.items() if not error <= TOLERANCE[cell.precision]}:
        raise MELoRAError(f"{cell.name}: forms that differ from those they must equal: {wrong}")
    if compare(runners["merged"], runners["base"], inputs).max_rel_error < 10 * TOLERANCE["fp32"]:
        raise MELoRAError(f"{cell.name}: the adapter changes nothing")
    return found


def measure_cell(cell: Cell, workshop: Workshop, seconds: float) -> list[Row]:
    """Measures a cell and returns its rows."""
    contenders = workshop.contenders(cell)
    inputs = workshop.inputs(cell)
    found = errors(cell, contenders, inputs)
    measured = measure(
        functools.partial(workshop.contenders, cell),
        inputs,
        provider=cell.provider,
        model=cell.model,
        batch=cell.batch,
        sequence=cell.sequence,
        rounds=MAX_ROUNDS,
        max_seconds=seconds,
    )
    rows = [replace(row, max_rel_difference=found[row.form]) for row in measured]
    return measured_rows(rows, asdict(cell))
