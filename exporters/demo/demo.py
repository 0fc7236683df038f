"""Runs the whole workflow on real input, for `melora-fx demo`: train, save, export, fold, compare, time."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx, nn

import melora_fx
from exporters.export import export_onnx
from exporters.measuring.latency import LatencyTable, measure_latency
from exporters.measuring.plots import plot_latency
from exporters.onnx_runtime import import_onnxruntime
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import Runner, TorchRunner
from exporters.training.batches import Batches, accuracy_of, compute_logits
from exporters.training.report import console
from exporters.training.train import (
    Training,
    TrainOptions,
    check_requirements,
    fit,
    prepare,
    print_summary,
    read_texts_of,
    write_report,
)

from .data import load_topics
from .report import print_code, print_results

_CHECKPOINTS = "demo-checkpoints"
"""Another name than that of `melora-fx train`, which may use the same folder. Removed after the training."""


@dataclass(frozen=True)
class DemoOptions:
    """The options of the command line.

    Attributes:
        train: the options of the training; without `data` the demo's own texts are read.
        quick: times fewer rounds.
        model_name: the name of the model in results and plots.
    """

    train: TrainOptions
    model_name: str
    quick: bool = False

    @property
    def out(self) -> Path:
        return self.train.out


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs the workflow, prints its progress, and writes its results into `options.out`.

    Returns:
        the content of report.json.

    Raises:
        MELoRAError, ValueError: if the data, the model, the targets or the folder cannot be used, before training
            starts.
    """
    import_onnxruntime()
    check_requirements(options.out)
    console.rule("match")
    asked = replace(options.train, restart=True)
    texts = read_texts_of(asked) if asked.data else load_topics()
    training = prepare(asked, texts, checkpoints=_CHECKPOINTS)
    print(training.matched)
    model, batches = training.base.model, training.batches
    site, lowering = training.matched.sites[0].name, training.matched.sites[0].lowering
    print_code(f"before: {site}", fx.symbolic_trace(model.get_submodule(site)).code)
    graphs = {name: options.out / f"{name}.onnx" for name in ("base", "unmerged", "merged")}
    export_onnx(model, batches.example(), graphs["base"])  # a model that cannot be exported fails before the training

    console.rule("train")
    results = fit(training) | {"model": options.model_name}
    shutil.rmtree(training.checkpoints.folder)
    print_summary(results)
    title = f'after: {site}, in plain operations; a step computes it with the lowering "{lowering}"'
    print_code(title, melora_fx.sites(model)[site].code)

    _export(training, graphs)
    results |= _fold(model, graphs, batches)
    latency = _time(model, graphs, batches, options)
    results["latency"] = {row.name: {"median_ms": row.median_ms, "ratio": row.ratio} for row in latency.rows}
    write_report(results, options.out)
    print_results(results, options.out)
    return results


def _export(training: Training, graphs: dict[str, Path]) -> None:
    """Exports the trained model as two graphs: unmerged, with its adapters next to the weights, and merged."""
    console.rule("export")
    model, inputs = training.base.model, training.batches.example()
    print(export_onnx(model, inputs, graphs["unmerged"], adapter="keep"))
    print(export_onnx(model, inputs, graphs["merged"]))


def _fold(model: nn.Module, graphs: dict[str, Path], batches: Batches) -> dict[str, float]:
    """Folds the model, and compares it on all held-out texts with the unfolded model and with the graphs."""
    unfolded = compute_logits(TorchRunner(model), batches)
    unmerged = compute_logits(OrtRunner(graphs["unmerged"]), batches)
    melora_fx.fold(model)
    folded = compute_logits(TorchRunner(model), batches)
    merged = compute_logits(OrtRunner(graphs["merged"]), batches)
    return {
        "fold_max_abs_error": float(np.abs(folded - unfolded).max()),
        "merged_max_abs_error": float(np.abs(merged - folded).max()),
        "unmerged_max_abs_error": float(np.abs(unmerged - unfolded).max()),
        "label_agreement": float((merged.argmax(-1) == folded.argmax(-1)).mean()),
        "accuracy_merged": accuracy_of(merged, batches),
    }


def _time(model: nn.Module, graphs: dict[str, Path], batches: Batches, options: DemoOptions) -> LatencyTable:
    """Times the graphs and the folded model against each other, and writes latency.csv and latency.png."""
    console.rule("time")
    runners: dict[str, Runner] = {f"onnx {name}": OrtRunner(path, threads=1) for name, path in graphs.items()}
    runners["torch eager"] = TorchRunner(model, threads=1)
    inputs = batches.example()
    rounds = 10 if options.quick else 40
    table = measure_latency(runners, inputs, rounds=rounds)

    shape = " × ".join(str(size) for size in next(iter(inputs.values())).shape)
    console.print(f"batch × tokens: {shape}, one thread, {rounds} interleaved rounds")
    print(table)
    table.to_csv(options.out / "latency.csv")
    plot_latency({f"{shape} tokens": table}, f"{options.model_name}, one thread", options.out / "latency.png")
    return table
