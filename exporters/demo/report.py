"""What the demo prints and plots."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from exporters.measuring.plots import import_pyplot
from exporters.training.texts import Texts
from melora_fx.tables import table

console = Console()


def print_texts(texts: Texts) -> None:
    console.print(
        f"[bold]data[/]: {len(texts.train)} training and {len(texts.held_out)} held-out texts, "
        f"{len(texts.labels)} labels: {', '.join(texts.labels)}"
    )
    for note in texts.notes:
        console.print(f"[bold]note[/]: {escape(note)}")


def print_code(title: str, code: str) -> None:
    """A graph's code without its empty lines."""
    console.print(f"[bold]{title}[/]")
    print("\n".join(line for line in code.splitlines() if line.strip()))


def print_results(results: Mapping[str, Any], out: Path) -> None:
    """The results of `run_demo` as a table, and the files in its folder."""
    console.rule("result")
    rows = [
        ("held-out accuracy", f"{results['accuracy_before']:.1%} → {results['accuracy_after']:.1%}"),
        ("majority baseline", f"{results['majority_baseline']:.1%}"),
        ("trainable parameters", f"{results['trainable_parameters']:,} with the head"),
        ("a LoRA of equal rank", f"{results['lora_equal_rank_parameters']:,} in its adapters alone"),
    ]
    for name, key in (("folded", "fold"), ("merged ONNX", "merged"), ("unmerged ONNX", "unmerged")):
        rows.append((f"{name} against torch", f"max abs error {results[f'{key}_max_abs_error']:.1e}"))
    rows.append(("same label, merged ONNX and torch", f"{results['label_agreement']:.1%} of held-out texts"))
    for name, row in results["latency"].items():
        rows.append((name, f"{row['median_ms']:.1f} ms, {row['ratio']:.2f} × the base graph"))
    print("\n".join(table(rows)))
    console.print(f"[bold]files in {out}[/]")
    for file in sorted(file for file in out.rglob("*") if file.is_file()):
        print(f"  {os.path.relpath(file, out)}  {file.stat().st_size:,} bytes")


def plot_training(losses: Sequence[float], accuracies: Sequence[float], majority_baseline: float, path: Path) -> None:
    """Draws the training loss of each step, and the held-out accuracy after each epoch beside the baseline's."""
    pyplot = import_pyplot()
    figure, loss_axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    loss_axes.plot(losses, color="#b0b7bb", linewidth=1, label="training loss")
    loss_axes.set(xlabel="step", ylabel="training loss", title="Training the adapters and the head")
    accuracy_axes = loss_axes.twinx()
    steps_per_epoch = len(losses) // len(accuracies)
    epoch_ends = [steps_per_epoch * (epoch + 1) for epoch in range(len(accuracies))]
    accuracy_axes.plot(epoch_ends, accuracies, "o-", color="#2a7fc0", label="held-out accuracy")
    accuracy_axes.axhline(majority_baseline, color="#c0792a", linestyle="--", label="majority baseline")
    accuracy_axes.set(ylabel="held-out accuracy", ylim=(0, 1))
    loss_handles, loss_labels = loss_axes.get_legend_handles_labels()
    accuracy_handles, accuracy_labels = accuracy_axes.get_legend_handles_labels()
    loss_axes.legend(loss_handles + accuracy_handles, loss_labels + accuracy_labels, loc="center right", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
