"""Plots a training."""

import os
from collections.abc import Sequence
from pathlib import Path

from exporters.measuring.plots import import_pyplot

_ACCURACY_COLOR = "#2a7fc0"


def plot_training(
    losses: Sequence[float],
    evaluations: Sequence[tuple[int, float]],
    majority_baseline: float,
    path: str | os.PathLike[str],
) -> None:
    """Plots the training loss of each step, and the held-out accuracy with the majority baseline.

    Args:
        losses: training losses of steps 1, 2, …
        evaluations: (steps done, held-out accuracy between 0 and 1) of each point; (0, …) is before the training.
        majority_baseline: held-out accuracy of always answering the most frequent label.
        path: the file to write, with a suffix that matplotlib knows, such as .png.

    Raises:
        MELoRAError: if matplotlib is not installed.
    """
    pyplot = import_pyplot()
    figure, loss_axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    steps = range(1, len(losses) + 1)
    marker = "." if len(losses) == 1 else ""
    loss_axes.plot(steps, losses, marker=marker, color="#b0b7bb", linewidth=1, label="training loss")
    loss_axes.set(xlabel="step", ylabel="training loss", title="Training the adapters and the head")
    loss_axes.set_xlim(-0.03 * len(losses), 1.03 * len(losses))
    loss_axes.xaxis.get_major_locator().set_params(integer=True)
    accuracy_axes = loss_axes.twinx()
    accuracy_axes.axhline(majority_baseline, color="#c0792a", linestyle="--", label="accuracy of the majority baseline")
    accuracy_axes.plot(
        [step for step, _ in evaluations],
        [accuracy for _, accuracy in evaluations],
        "o-",
        color=_ACCURACY_COLOR,
        label="held-out accuracy",
        clip_on=False,
    )
    accuracy_axes.set(ylim=(0, 1))
    accuracy_axes.set_ylabel("held-out accuracy", color=_ACCURACY_COLOR)
    accuracy_axes.tick_params(axis="y", colors=_ACCURACY_COLOR)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(Path(path), dpi=150)
    pyplot.close(figure)
