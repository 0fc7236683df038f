"""What a training prints and plots."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from exporters.measuring.plots import import_pyplot

from .texts import Texts

console = Console()


def print_texts(texts: Texts) -> None:
    console.print(
        f"[bold]data[/]: {len(texts.train)} training and {len(texts.held_out)} held-out texts, "
        f"{len(texts.labels)} labels: {escape(', '.join(texts.labels))}"
    )
    for note in texts.notes:
        console.print(f"[bold]note[/]: {escape(note)}")


def plot_training(
    losses: Sequence[float], evaluations: Sequence[tuple[int, float]], majority_baseline: float, path: Path
) -> None:
    """Draws the training loss of each step, and the held-out accuracies (after that step) beside the baseline's."""
    pyplot = import_pyplot()
    figure, loss_axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    loss_axes.plot(losses, color="#b0b7bb", linewidth=1, label="training loss")
    loss_axes.set(xlabel="step", ylabel="training loss", title="Training the adapters and the head")
    accuracy_axes = loss_axes.twinx()
    steps, accuracies = zip(*evaluations, strict=True)
    accuracy_axes.plot(steps, accuracies, "o-", color="#2a7fc0", label="held-out accuracy")
    accuracy_axes.axhline(majority_baseline, color="#c0792a", linestyle="--", label="majority baseline")
    accuracy_axes.set(ylabel="held-out accuracy", ylim=(0, 1))
    loss_handles, loss_labels = loss_axes.get_legend_handles_labels()
    accuracy_handles, accuracy_labels = accuracy_axes.get_legend_handles_labels()
    loss_axes.legend(loss_handles + accuracy_handles, loss_labels + accuracy_labels, loc="center right", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
