"""Options that several commands have, and how repeated ones are read."""

from pathlib import Path
from typing import Annotated

import typer

AdapterDir = Annotated[Path, typer.Argument(help="Adapter folder, as save_adapter writes it.")]
Targets = Annotated[
    list[str],
    typer.Option("--targets", help='Linears to adapt: names, globs, "re:…" or "all-linear"; may be repeated.'),
]
Rank = Annotated[int, typer.Option(help="Rank of one block.")]
NumBlocks = Annotated[int, typer.Option(help="Number of diagonal blocks.")]


def split_names(values: list[str]) -> list[str]:
    """Repeated and comma-separated names as one list; a regular expression keeps its commas."""
    return [name for value in values for name in ([value] if value.startswith("re:") else value.split(","))]


def split_numbers(option: str, values: list[str]) -> tuple[int, ...]:
    """Repeated and comma-separated numbers in one tuple; the error names the option."""
    try:
        return tuple(int(number) for value in values for number in value.split(","))
    except ValueError as error:
        raise ValueError(f"`{option}` (={','.join(values)!r}) must be numbers, as in 1,8") from error


def axis_sizes(values: list[str]) -> dict[str, int]:
    """NAME=SIZE, repeated, as one dict."""
    sizes = {}
    for value in values:
        name, _, size = value.partition("=")
        if not name or not size.isdigit():
            raise ValueError(f"`axis` (={value!r}) must be NAME=SIZE, as in past_length=0")
        sizes[name] = int(size)
    return sizes
