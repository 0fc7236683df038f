"""Rows as CSV files, and as Markdown."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melora_fx.files import write_atomically, writing


def write_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Writes rows in place of the file: either the old file or the whole new one is there.

    Raises:
        MELoRAError: where the file cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    with writing(Path(path)):
        write_atomically(Path(path), write)


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a file that `write_csv` wrote; none where there is no file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, text_columns: int = 1) -> list[str]:
    """The lines of a table; columns of numbers, those after the first `text_columns`, end at the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(headings) - text_columns)
    lines = [headings, rule, *rows]
    return [f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines]
