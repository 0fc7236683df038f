"""Options that several commands have, and the parsers of what typer has no type for: each reads one option's text."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer


def names(text: str) -> list[str]:
    """Comma-separated names; a regular expression keeps its commas."""
    return [text] if text.startswith("re:") else text.split(",")


def numbers(text: str) -> list[int]:
    """Comma-separated numbers."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be numbers, as in 1,8") from error


def decimals(text: str) -> list[float]:
    """Comma-separated numbers that need not be whole."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be numbers, as in 0.7,0.3") from error


def axis_size(text: str) -> tuple[str, int]:
    """The size of an axis by its name."""
    name, _, size = text.partition("=")
    if not name or not size.isdigit():
        raise typer.BadParameter(f"{text!r} must be NAME=SIZE, as in past_length=0")
    return name, int(size)


def axis_range(text: str) -> tuple[str, tuple[int, int, int]]:
    """The smallest, usual and largest size of an axis by its name, from "batch=1:8:32", or "batch=8" for all three."""
    found = re.fullmatch(r"\s*([^=\s]+)\s*=\s*(\d+)(?::(\d+):(\d+))?\s*", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not AXIS=MIN:OPT:MAX, such as batch=1:8:32")
    axis, low, usual, high = found.groups()
    sizes = (int(low), int(usual or low), int(high or low))
    if not sizes[0] <= sizes[1] <= sizes[2] or sizes[2] == 0:
        raise typer.BadParameter(f"{text!r}: sizes must be the smallest, usual and largest, in this order")
    return axis, sizes


def share_or_file(text: str) -> float | Path:
    """A share, such as 0.2, or else a file."""
    try:
        return float(text)
    except ValueError:
        return Path(text)


def named_in(table: Iterable[Any]) -> Callable[[], list[tuple[str, str]]]:
    """What a shell completes to: the names in a table of `exporters.targets`, and what each is."""
    return lambda: [(entry.name, entry.about) for entry in table]


AdapterDir = Annotated[Path, typer.Argument(help="Adapter folder, as save_adapter writes it.")]
Targets = Annotated[
    list[Any],
    typer.Option(
        "--targets",
        parser=names,
        metavar="NAMES",
        help='Linears to adapt: names, globs, "re:…" or "all-linear"; may be repeated.',
    ),
]
Rank = Annotated[int, typer.Option(help="Rank of one block.")]
NumBlocks = Annotated[int, typer.Option(help="Number of diagonal blocks.")]
