"""What does an adapter cost at inference: merged, unmerged in each form, swappable, and as PEFT exports it?

    python benchmarks/latency.py [--only TEXT] [--seconds 10] [--providers cpu,"torch eager","torch compile"]

One factor at a time around a centre: batch 8 × 64 tokens, one thread, n = r = 8, query and value. A cell holds what is
compared: all forms run in turn, in an order drawn for every round, after their outputs have been found equal; graphs
are loaded three times, for one that stays loaded may be some per cent off for as long as it does. Cells that stand in
results/latency.csv are not measured again; --again does. Exports are kept in --cache. Writes
benchmarks/results/latency.csv, latency.md, and pictures: for each model its graphs, and torch.

MPNet-base needs its wheels in the cache folder; without them its cells are left out, which is said. `--providers cuda`
or `tensorrt` measures the graphs there, `--device cuda` the torch cells.
"""

import argparse
import csv
import functools
import hashlib
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from latency_cells import FORMS, TARGETS, Cell, Form, cells
from latency_models import EXAMPLE, MODELS, build
from latency_report import write_report

import exporters
import melora_fx
from exporters import OrtRunner, TorchRunner, compare, export_onnx
from exporters.adapters.ort_adapter import swap_tensors
from exporters.measuring.machine import package_versions
from exporters.measuring.measure import Contender, Measurement, measure
from exporters.measuring.tables import write_csv
from exporters.onnx_files.metadata import read_facts
from exporters.runtime.graph_inputs import make_inputs
from melora_fx import MELoRAError
from melora_fx.saving.adapter_file import read_adapter

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2}
"""Largest relative difference, by precision, between forms that compute the same."""
MAX_ROUNDS = 200


COLUMNS = [item.name for item in fields(Measurement)]
COLUMNS += [item.name for item in fields(Cell) if item.name not in COLUMNS]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier run."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cell_of(row: dict[str, str]) -> Cell:
    """The cell that a row belongs to."""
    types = {"model": str, "provider": str}
    return Cell(**{item.name: types.get(item.name, type(item.default))(row[item.name]) for item in fields(Cell)})


def is_done(cell: Cell, rows: list[dict[str, str]]) -> bool:
    """Whether every form of the cell has its row."""
    return {form.name for form in cell.forms} <= {row["form"] for row in rows if cell_of(row) == cell}


class Workshop:
    """Exports, kept in a folder that is named after the sources and versions that made them, and torch runners."""

    def __init__(self, cache: Path, device: str) -> None:
        digest = hashlib.sha256(package_versions().encode())
        files = [file for module in (melora_fx, exporters) for file in Path(module.__file__).parent.rglob("*.py")]
        for file in [*sorted(files), Path(build.__code__.co_filename)]:
            digest.update(file.read_bytes())
        self.cache = cache
        self.device = device
        self.folder = cache / f"exports-{digest.hexdigest()[:12]}"
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
            model = self.torch_model(cell.model, form.kind, cell.targets, cell.num_blocks, cell.rank, compiled)
            return Contender(form.name, TorchRunner(model, threads=cell.threads))
        path = self.exported(cell, form)
        runner = OrtRunner(path, provider=cell.provider, threads=cell.threads)
        if not form.gives_adapter:
            return Contender(form.name, runner, path)
        tensors = swap_tensors(read_adapter(path.with_suffix(".adapter")), read_facts(path))
        return Contender(form.name, runner.with_tensors(tensors), path, tensors)

    def exported(self, cell: Cell, form: Form) -> Path:
        """The form's graph, and the adapter in it as a folder beside it; exported where it is not there yet."""
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
            export_onnx(model, EXAMPLE, path, target=target, verify=False, **options)
        return path

    def inputs(self, cell: Cell) -> dict[str, Any]:
        """Made from the base graph, for torch too."""
        graph = self.exported(replace(cell, provider="cpu", target=""), FORMS[0])
        arrays = make_inputs(OrtRunner(graph), cell.batch, cell.sequence)
        if not cell.provider.startswith("torch"):
            return arrays
        return {name: torch.as_tensor(array, device=self.device) for name, array in arrays.items()}

    def _torch_model(self, name: str, kind: str, targets: str, num_blocks: int, rank: int, compiled: bool) -> Any:
        if compiled:
            model = self.torch_model(name, kind, targets, num_blocks, rank, False)
            return torch.compile(model, dynamic=True)
        return build(name, kind, self.cache, targets, num_blocks, rank).to(self.device)


def errors(cell: Cell, contenders: list[Contender], inputs: dict[str, Any]) -> dict[str, float]:
    """The relative difference of each form from the one that it must equal.

    Raises:
        MELoRAError: where it is too large, or where the adapter changes nothing.
    """
    runners = {contender.form: contender.runner for contender in contenders}
    found = {form.name: compare(runners[form.name], runners[form.equals], inputs).max_rel_error for form in cell.forms}
    if wrong := {name: error for name, error in found.items() if not error <= TOLERANCE[cell.precision]}:
        raise MELoRAError(f"{cell.model}, {cell.label}: not equal to what they must equal: {wrong}")
    if compare(runners["merged"], runners["base"], inputs).max_rel_error < 10 * TOLERANCE["fp32"]:
        raise MELoRAError(f"{cell.model}, {cell.label}: the adapter changes nothing")
    return found


def measure_cell(cell: Cell, workshop: Workshop, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a cell."""
    contenders = workshop.contenders(cell)
    inputs = workshop.inputs(cell)
    found = errors(cell, contenders, inputs)
    rows = measure(
        functools.partial(workshop.contenders, cell),
        inputs,
        provider=cell.provider,
        model=cell.model,
        batch=cell.batch,
        sequence=cell.sequence,
        rounds=MAX_ROUNDS,
        max_seconds=seconds,
    )
    for row in rows:
        yield asdict(cell) | asdict(row) | {"max_rel_difference": found[row.form]}


def why_missing(model: str, cache: Path) -> str:
    """Why the model is not there; empty where it is."""
    try:
        MODELS[model].folder(cache)
    except MELoRAError as error:
        return str(error)
    return ""


def available(chosen: list[Cell], cache: Path) -> list[Cell]:
    """The cells whose model is there; says which is not, and why."""
    reasons = {model: why_missing(model, cache) for model in dict.fromkeys(cell.model for cell in chosen)}
    for model, reason in reasons.items():
        if reason:
            print(f"left out: {model}: {reason}")
    return [cell for cell in chosen if not reasons[cell.model]]


def measured_or_error(cell: Cell, workshop: Workshop, seconds: float) -> list[dict[str, Any]] | str:
    """The rows of a cell, or why there are none: one form that fails must not cost the other cells."""
    try:
        return list(measure_cell(cell, workshop, seconds))
    except MELoRAError as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells whose model or label holds this text")
    parser.add_argument("--seconds", type=float, default=10.0, help="timing of one cell, of three loads")
    parser.add_argument("--providers", default="cpu,torch eager,torch compile", help="cuda and tensorrt too")
    parser.add_argument("--device", default="cpu", help="of the torch cells")
    parser.add_argument("--again", action="store_true", help="measure cells that have been measured, too")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "melora_fx")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    chosen = [cell for cell in cells(arguments.providers.split(",")) if arguments.only in f"{cell.model}, {cell.label}"]
    arguments.cache.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows, failed = measure_cells(available(chosen, arguments.cache), arguments)
    found = [(cell_of(row), row) for row in rows]
    order = [cell for provider in dict.fromkeys(cell.provider for cell, _ in found) for cell in cells([provider])]
    write_report([item for cell in order for item in found if item[0] == cell], arguments.out)
    print(f"{time.perf_counter() - start:.0f} s, {failed} cells failed; see {arguments.out}")
    sys.exit(bool(failed))


def measure_cells(chosen: list[Cell], arguments: argparse.Namespace) -> tuple[list[dict[str, str]], int]:
    """(all rows, how many cells failed); what is done is on disk after each."""
    start = time.perf_counter()
    table = arguments.out / "latency.csv"
    rows = read_rows(table)
    failed = 0
    workshop = Workshop(arguments.cache, arguments.device)
    for index, cell in enumerate(chosen, start=1):
        print(f"[{index}/{len(chosen)}, {time.perf_counter() - start:.0f} s] {cell.model}, {cell.label}", flush=True)
        if is_done(cell, rows) and not arguments.again:
            print("    measured before")
            continue
        measured = measured_or_error(cell, workshop, arguments.seconds)
        if isinstance(measured, str):
            print(f"    failed: {measured}")
            failed += 1
            continue
        rows = [row for row in rows if cell_of(row) != cell]
        rows += [{name: "" if value is None else str(value) for name, value in row.items()} for row in measured]
        write_csv(rows, COLUMNS, table)
        print(f"    {measured[0]['median_ms']:.2f} ms; " + ", ".join(f"{r['form']} {r['ratio']:.2f}" for r in measured))
    return rows, failed


if __name__ == "__main__":
    main()
