"""What does an adapter cost at inference: merged, unmerged in each form, swappable, and as PEFT's model, exported here?

One factor at a time around a centre: batch 8 × 64 tokens, one thread, n = r = 8, query and value. A cell holds what is
compared: all forms run in turn, in an order drawn for every round, after their outputs have been found equal; graphs
are loaded three times, for one that stays loaded may be some per cent off for as long as it does. Exports are kept in
--cache. Writes latency.csv, latency.md, and pictures: for each model its graphs, and torch.

`--providers cuda`, `cuda graph` or `tensorrt` measures the graphs there, `--device cuda` the torch cells.
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
"""Largest relative difference, by precision, between forms that compute the same."""
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
    """Exports, kept in a folder that is named after the sources and versions that made them, and torch runners."""

    def __init__(self, cache: Path, device: str, backend: str = "inductor") -> None:
        self.cache = cache
        self.device = device
        self.backend = backend
        made_by = hashlib.sha256(f"{package_versions()} {source_digest()}".encode()).hexdigest()
        self.folder = cache / f"exports-{made_by[:12]}"
        self.torch_model = functools.lru_cache(maxsize=None)(self._torch_model)

    def contenders(self, cell: Cell, seed: int = 0) -> list[Contender]:
        """The cell's forms in their order, loaded in another, which `seed` decides."""
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
        from exporters import OrtRunner  # needs packages that the torch cells do without
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
        """The form's graph, and the adapter in it as a folder beside it; exported where it is not there yet."""
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
        """Token ids, and a mask of ones."""
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
    """The relative difference of each form from the one that it must equal.

    Raises:
        MELoRAError: where it is too large, or where the adapter changes nothing.
    """
    runners = {contender.form: contender.runner for contender in contenders}
    found = {form.name: compare(runners[form.name], runners[form.equals], inputs).max_rel_error for form in cell.forms}
    if wrong := {name: error for name, error in found.items() if not error <= TOLERANCE[cell.precision]}:
        raise MELoRAError(f"{cell.name}: not equal to what they must equal: {wrong}")
    if compare(runners["merged"], runners["base"], inputs).max_rel_error < 10 * TOLERANCE["fp32"]:
        raise MELoRAError(f"{cell.name}: the adapter changes nothing")
    return found


def measure_cell(cell: Cell, workshop: Workshop, seconds: float) -> list[Row]:
    """The rows of a cell."""
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
