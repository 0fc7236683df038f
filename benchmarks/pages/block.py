"""A block of a page: its place, its CSV file, and the function that returns its lines."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.checkout import ROOT
from exporters.measuring.tables import read_csv

Row = Mapping[str, str]
Rows = Sequence[Row]
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end -->"
_BLOCK = re.compile(rf"(<!-- figures (\S+): python -m benchmarks\.pages -->\n)(.*?)^{END}$", re.DOTALL | re.MULTILINE)
_BEGINNING = "<!-- figures "


class Block(NamedTuple):
    """An entry of the list.

    Attributes:
        page: path in the checkout.
        name: the name in the page's comment, unique in the page.
        csv: the file in benchmarks/results, without its ending; empty if the lines are computed without one.
        write: returns the lines, given the rows.
    """

    page: str
    name: str
    csv: str
    write: Callable[[Rows], list[str]]


def lines_of(block: Block) -> list[str]:
    """Returns the lines for the committed rows; a line that says so if there are none yet.

    Raises:
        ValueError: if `sound_rows` refuses the rows, or if a row or a value that the lines need is missing.
    """
    rows = sound_rows(RESULTS / f"{block.csv}.csv") if block.csv else []
    if block.csv and not rows:
        return [f"*`python -m benchmarks {block.csv}` has not been measured yet.*"]
    try:
        return block.write(rows)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        told = f"{block.csv}.csv lacks what the block `{block.name}` of {block.page} needs: {error!r}"
        raise ValueError(told) from error


_KEYS = (("task", "arm", "seed", "epochs", "learning_rate", "settings"), ("case", "side", "site"))
"""The columns that identify a row: in the file of a study, and in that of another benchmark."""


def sound_rows(path: Path) -> Rows:
    """Returns the rows of a file.

    Raises:
        ValueError: if a row is not as long as the first line or is there twice, or if a value is not finite. Names the
            file and the line.
    """
    rows = read_csv(path)
    key = next((names for names in _KEYS if rows and names[0] in rows[0]), ())
    seen: dict[tuple[str, ...], int] = {}
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {line}: other columns than in the first line")
        if wrong := [name for name, value in row.items() if value.lower() in ("nan", "inf", "-inf")]:
            raise ValueError(f"{path}, line {line}: {wrong[0]} is {row[wrong[0]]}")
        found = tuple(row.get(name, "") for name in key)
        if key and seen.setdefault(found, line) != line:
            raise ValueError(f"{path}, line {line}: same row as line {seen[found]}: {', '.join(filter(None, found))}")
    return rows


def blocks_in(page: str) -> dict[str, list[str]]:
    """Returns the lines of each block in the text of a page, by name.

    Raises:
        ValueError: if a block has no end or another command, or if two have the same name.
    """
    names = [name for _, name, _ in _BLOCK.findall(page)]
    if page.count(_BEGINNING) != len(set(names)) or any(_BEGINNING in lines for _, _, lines in _BLOCK.findall(page)):
        raise ValueError(f"a block without its own `{END}`, with another command or twice; found {', '.join(names)}")
    return {name: lines.splitlines() for _, name, lines in _BLOCK.findall(page)}


def with_blocks(page: str, made: Mapping[str, Sequence[str]]) -> str:
    """Returns the text of a page with these lines in its blocks.

    Raises:
        ValueError: if the page has other blocks than `made`, or as in `blocks_in`.
    """
    if other := set(blocks_in(page)) ^ set(made):
        raise ValueError(f"only in the page or only in the list: {', '.join(sorted(other))}")
    return _BLOCK.sub(lambda found: found[1] + "".join(f"{line}\n" for line in made[found[2]]) + END, page)


def without_blocks(page: str) -> str:
    """Returns the text of a page without its blocks."""
    return _BLOCK.sub("", page)
