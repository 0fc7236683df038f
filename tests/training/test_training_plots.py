"""The picture of a training: its content, read from matplotlib's own objects."""

from pathlib import Path

import pytest
from matplotlib import pyplot

from exporters.training.plots import plot_training


@pytest.mark.parametrize("evaluations", [[(1, 0.5)], [(0, 0.1), (2, 0.4), (4, 1.0)]], ids=["one", "three"])
def test_one_point_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluations: list[tuple[int, float]]
) -> None:
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plot_training([2.0, 1.5, 1.0, 0.7], evaluations, 0.25, tmp_path / "training.png")
    figure = pyplot.gcf()
    loss_axes, accuracy_axes = figure.axes
    (loss,) = loss_axes.get_lines()
    baseline, accuracy = accuracy_axes.get_lines()
    assert [tuple(point) for point in accuracy.get_xydata()] == evaluations
    assert accuracy.get_marker() == "o"
    assert list(loss.get_xdata()) == [1, 2, 3, 4]
    assert set(baseline.get_ydata()) == {0.25}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "training loss",
        "accuracy of the majority baseline",
        "held-out accuracy",
    ]
    figure.canvas.draw()
    assert not legend.get_window_extent().overlaps(loss_axes.get_tightbbox())
    monkeypatch.undo()
    pyplot.close("all")
