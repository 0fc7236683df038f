"""Pictures: their content, read from matplotlib's own objects."""

from pathlib import Path

import pytest
from matplotlib import pyplot

from exporters import Latency, LatencyTable
from exporters.measuring.plots import format_ms, plot_latency


def table(**ratios: float) -> LatencyTable:
    return LatencyTable(
        tuple(Latency(name, 10 * ratio, 9.9 * ratio, 10.5 * ratio, ratio, 9, 1) for name, ratio in ratios.items())
    )


def test_one_panel_a_table_on_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plot_latency({"one": table(base=1, merged=1.02), "two": table(base=1, other=2.5)}, "title", tmp_path / "a.png")
    figure = pyplot.gcf()
    first, second = (axes for axes in figure.axes if axes.get_visible())
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["one", "two"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["base", "merged", "other"]
    assert first.get_xlim() == second.get_xlim()
    low, high = first.get_xlim()
    assert low < 0.99
    assert high > 2.5 * 1.05
    assert [text.get_text() for text in first.texts] == ["1.00 ×  10.0 ms", "≈1.02 ×  10.2 ms"]
    assert [line.get_markerfacecolor() for line in first.get_lines() if line.get_marker() == "o"][1:] == ["white"]
    assert [text.get_text() for text in second.texts] == ["1.00 ×  10.0 ms", "2.50 ×  25.0 ms"]
    assert "title" in figure.get_suptitle()
    assert "hollow dot and ≈: within noise" in figure.get_suptitle()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.undo()
    pyplot.close("all")


def test_long_names_and_clear_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plot_latency({"one": table(**{"a" * 40: 1, "other": 2})}, "title", tmp_path / "a.svg")
    figure = pyplot.gcf()
    assert figure.axes[0].get_xlabel() == "time ÷ time of the first"
    assert figure.get_figwidth() > 9
    assert "noise" not in figure.get_suptitle()
    monkeypatch.undo()
    pyplot.close("all")


def test_the_scale_says_what_times_are_divided_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    panels = {"one": table(base=1, merged=1.1), "two": table(other=1, merged=1.2)}
    plot_latency(panels, "title", tmp_path / "a.svg", reference="the fastest")
    assert {axes.get_xlabel() for axes in pyplot.gcf().axes} == {"time ÷ time of the fastest"}
    monkeypatch.undo()
    pyplot.close("all")


def test_a_missing_panel_leaves_a_gap(tmp_path: Path) -> None:
    plot_latency({str(index): table(base=1, merged=1.1) for index in range(4)}, "four", tmp_path / "four.svg")
    assert (tmp_path / "four.svg").stat().st_size > 1000
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1234")]
)
def test_three_digits_or_more(value: float, text: str) -> None:
    assert format_ms(value) == text
