"""The whole job on real input: rewrite, train, save, export, fold, compare, time. `melora-fx demo` runs it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

import melora_fx
from exporters.export import export_onnx
from exporters.measuring.compare import compare
from exporters.measuring.latency import LatencyTable, measure_latency
from exporters.measuring.plots import import_pyplot, plot_latency
from exporters.onnx_runtime import import_onnxruntime
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import Runner, TorchRunner
from exporters.training.plots import plot_training
from exporters.training.texts import read_texts
from melora_fx import MELoRAConfig
from melora_fx.files import writing

from .base import head_names, load_base
from .batches import Batches, compute_accuracy, compute_logits
from .data import load_topics
from .report import console, print_code, print_results, print_texts
from .training import train

_SEED = 0


@dataclass(frozen=True)
class DemoOptions:
    """What the command line gives. `model`: a Hugging Face folder; None is MiniLM-L6 from its pip package."""

    out: Path
    data: Path | None = None
    text: str = "text"
    label: str = "label"
    model: Path | None = None
    targets: tuple[str, ...] = ("query", "value")
    config: MELoRAConfig = field(default_factory=MELoRAConfig)
    quick: bool = False

    @property
    def model_name(self) -> str:
        """What results and pictures call the model."""
        return str(self.model or "all-MiniLM-L6-v2")


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs the job, prints what it does, and writes its results into `options.out`.

    Returns:
        what it has also written as report.json.

    Raises:
        MELoRAError, ValueError: for data, a model, targets or a folder that cannot be used, before training starts.
    """
    _check_requirements(options.out)
    torch.manual_seed(_SEED)
    texts = read_texts(options.data, options.text, options.label) if options.data else load_topics()
    model, tokenizer = load_base(options.model, texts.labels)
    batches = Batches(tokenizer, texts)
    print_texts(texts)

    results: dict[str, Any] = {"model": options.model_name}
    results |= _rewrite(model, batches, options)

    console.rule("train")
    history = train(model, batches, num_epochs=1 if options.quick else 5, seed=_SEED)
    melora_fx.save_adapter(model, options.out / "adapter")
    results |= {"accuracy_after": history.evaluations[-1][1], "majority_baseline": texts.majority_baseline}
    evaluations = [(0, results["accuracy_before"]), *history.evaluations]
    plot_training(history.losses, evaluations, texts.majority_baseline, options.out / "training.png")

    graphs = _export(model, batches, options)
    results |= _fold(model, graphs, batches)

    latency = _time(model, graphs, batches, options)
    results["latency"] = {row.name: {"median_ms": row.median_ms, "ratio": row.ratio} for row in latency.rows}
    (options.out / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    print_results(results, options.out)
    return results


def _check_requirements(out: Path) -> None:
    """Refuses what would otherwise fail only after the training: missing packages, a folder that cannot be written."""
    import_onnxruntime()
    import_pyplot()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write-test"
        probe.touch()
        probe.unlink()


def _rewrite(model: nn.Module, batches: Batches, options: DemoOptions) -> dict[str, Any]:
    """Adds the adapters, and shows the plan, one site's graph before and after, and what is trained."""
    console.rule("match")
    report = melora_fx.match(model, list(options.targets), options.config)
    print(report)
    site = report.sites[0].name
    print_code(f"before: {site}", fx.symbolic_trace(model.get_submodule(site)).code)
    accuracy_before = compute_accuracy(TorchRunner(model.eval()), batches)

    melora_fx.rewrite(model, list(options.targets), options.config, keep_trainable=head_names(model))
    sites = melora_fx.sites(model)
    print_code(f"after: {site}", sites[site].code)

    num_total = sum(parameter.numel() for parameter in model.parameters())
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_adapter = sum(parameter.numel() for parameter in melora_fx.adapter_parameters(model).values())
    num_lora = sum(each.config.total_rank * (each.in_features + each.out_features) for each in sites.values())
    console.print(
        f"trainable: {num_trainable:,} of {num_total:,} parameters, {num_adapter:,} in adapters and "
        f"the rest in the head; the adapters of a LoRA of the same rank ({options.config.total_rank}) would have "
        f"{num_lora:,}"
    )
    return {
        "num_sites": len(report.sites),
        "trainable_parameters": num_trainable,
        "lora_equal_rank_parameters": num_lora,
        "accuracy_before": accuracy_before,
    }


def _export(model: nn.Module, batches: Batches, options: DemoOptions) -> dict[str, Path]:
    """The model as three graphs by name: without its adapters, with them beside the weights, and merged."""
    console.rule("export")
    graphs = {name: options.out / f"{name}.onnx" for name in ("base", "unmerged", "merged")}
    inputs = batches.example()
    with melora_fx.disabled(model):
        export_onnx(model, inputs, graphs["base"], adapter="keep", verify=False)
    print(export_onnx(model, inputs, graphs["unmerged"], adapter="keep", verify=not options.quick))
    print(export_onnx(model, inputs, graphs["merged"]))
    return graphs


def _fold(model: nn.Module, graphs: dict[str, Path], batches: Batches) -> dict[str, float]:
    """Folds the model, and compares it with itself before and with its graphs, on all held-out texts."""
    unmerged = OrtRunner(graphs["unmerged"])
    unmerged_errors = [compare(unmerged, TorchRunner(model), inputs).max_abs_error for inputs in batches.held_out()]
    unfolded_logits = compute_logits(TorchRunner(model), batches)
    melora_fx.fold(model)
    folded_logits = compute_logits(TorchRunner(model), batches)
    merged_logits = compute_logits(OrtRunner(graphs["merged"]), batches)
    return {
        "fold_max_abs_error": float(np.abs(folded_logits - unfolded_logits).max()),
        "merged_max_abs_error": float(np.abs(merged_logits - folded_logits).max()),
        "unmerged_max_abs_error": max(unmerged_errors),
        "label_agreement": float((merged_logits.argmax(-1) == folded_logits.argmax(-1)).mean()),
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
