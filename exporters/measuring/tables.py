"""Writes rows as CSV files and as Markdown, and reads the CSV files."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melora_fx.files import write_atomically, writing


def write_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Writes rows as a CSV file, in place of an old one. At any time the old file or the complete new one is there.

    Raises:
        MELoRAError: if the file cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    with writing(Path(path)):
        write_atomically(Path(path), write)


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Returns the rows of a file that `write_csv` wrote; none if there is no file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, text_columns: int = 1) -> list[str]:
    """Returns the lines of a table. Columns after the first `text_columns` contain numbers and are right-aligned."""
    rule = ["---"] * text_columns + ["---:"] * (len(headings) - text_columns)
    lines = [headings, rule, *rows]
    return [f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines]
