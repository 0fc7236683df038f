"""Options that several commands share, and the parsers of option values that typer has no type for."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer


def names(text: str) -> list[str]:
    """Returns the comma-separated names in `text`; a regular expression ("re:…") keeps its commas."""
    return [text] if text.startswith("re:") else text.split(",")


def numbers(text: str) -> list[int]:
    """Returns the comma-separated whole numbers in `text`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be numbers, as in 1,8") from error


def decimals(text: str) -> list[float]:
    """Returns the comma-separated numbers in `text`, whole or not."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be numbers, as in 0.7,0.3") from error


def axis_size(text: str) -> tuple[str, int]:
    """Returns (name, size) of an axis from a string such as "past_length=0"."""
    name, _, size = text.partition("=")
    if not name or not size.isdigit():
        raise typer.BadParameter(f"{text!r} must be NAME=SIZE, as in past_length=0")
    return name, int(size)


def axis_range(text: str) -> tuple[str, tuple[int, int, int]]:
    """Returns (axis, (smallest, usual, largest size)) from "batch=1:8:32", or from "batch=8", which sets all three."""
    found = re.fullmatch(r"\s*([^=\s]+)\s*=\s*(\d+)(?::(\d+):(\d+))?\s*", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not AXIS=MIN:OPT:MAX, such as batch=1:8:32")
    axis, low, usual, high = found.groups()
    sizes = (int(low), int(usual or low), int(high or low))
    if not sizes[0] <= sizes[1] <= sizes[2] or sizes[2] == 0:
        raise typer.BadParameter(f"{text!r}: sizes must be the smallest, usual and largest, in this order")
    return axis, sizes


def share_or_file(text: str) -> float | Path:
    """Returns a share if `text` is a number, such as 0.2, and a path otherwise."""
    try:
        return float(text)
    except ValueError:
        return Path(text)


def named_in(table: Iterable[Any]) -> Callable[[], list[tuple[str, str]]]:
    """Returns a shell completion: the names in a table of `exporters.targets` with their descriptions."""
    return lambda: [(entry.name, entry.about) for entry in table]


AdapterDir = Annotated[Path, typer.Argument(help="Adapter folder, as written by save_adapter.")]
Targets = Annotated[
    list[Any],
    typer.Option(
        "--targets",
        parser=names,
        metavar="NAMES",
        help='Linear layers to adapt: comma-separated names or globs, "re:…" or "all-linear"; may be repeated.',
    ),
]
Rank = Annotated[int, typer.Option(help="Rank of each block.")]
NumBlocks = Annotated[int, typer.Option(help="Number of diagonal blocks.")]
