"""A block of a page: where it stands, and the CSV file and the function that its lines are made of."""

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
        name: in the page's comment; each page has its own.
        csv: the file in benchmarks/results, without its ending; empty for what is computed without one.
        write: gives the lines of its rows.
    """

    page: str
    name: str
    csv: str
    write: Callable[[Rows], list[str]]


def lines_of(block: Block) -> list[str]:
    """The lines as the committed rows make them; one that says so where there are none yet.

    Raises:
        ValueError: for rows that `sound_rows` refuses, and where a row or a value is missing that the lines are of.
    """
    rows = sound_rows(RESULTS / f"{block.csv}.csv") if block.csv else []
    if block.csv and not rows:
        return [f"*`python -m benchmarks {block.csv}` has not been measured yet.*"]
    try:
        return block.write(rows)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        told = f"{block.csv}.csv lacks what `{block.name}` of {block.page} is made of: {error!r}"
        raise ValueError(told) from error


_KEYS = (("task", "arm", "seed", "epochs", "learning_rate", "settings"), ("case", "side", "site"))
"""What no two rows of a file have alike: of a study, and of another benchmark."""


def sound_rows(path: Path) -> Rows:
    """The rows of a file.

    Raises:
        ValueError: for a row of another length than the first line, one that is there twice, and a value that is not
            finite; by file and line.
    """
    rows = read_csv(path)
    key = next((names for names in _KEYS if rows and names[0] in rows[0]), ())
    seen: dict[tuple[str, ...], int] = {}
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {line}: other columns than the first line has")
        if wrong := [name for name, value in row.items() if value.lower() in ("nan", "inf", "-inf")]:
            raise ValueError(f"{path}, line {line}: {wrong[0]} is {row[wrong[0]]}")
        found = tuple(row.get(name, "") for name in key)
        if key and seen.setdefault(found, line) != line:
            raise ValueError(f"{path}, line {line}: as line {seen[found]}, {', '.join(filter(None, found))}")
    return rows


def blocks_in(page: str) -> dict[str, list[str]]:
    """The lines of each block in the text of a page, by name.

    Raises:
        ValueError: for a block without an end, and for two of one name.
    """
    names = [name for _, name, _ in _BLOCK.findall(page)]
    if page.count(_BEGINNING) != len(set(names)) or any(_BEGINNING in lines for _, _, lines in _BLOCK.findall(page)):
        raise ValueError(f"a block without `{END}`, with another comment before it, or twice: {', '.join(names)}")
    return {name: lines.splitlines() for _, name, lines in _BLOCK.findall(page)}


def with_blocks(page: str, made: Mapping[str, Sequence[str]]) -> str:
    """The text of a page with these lines in its blocks.

    Raises:
        ValueError: where the page has other blocks than `made`, and as `blocks_in`.
    """
    if other := set(blocks_in(page)) ^ set(made):
        raise ValueError(f"in the page or in the list alone: {', '.join(sorted(other))}")
    return _BLOCK.sub(lambda found: found[1] + "".join(f"{line}\n" for line in made[found[2]]) + END, page)


def without_blocks(page: str) -> str:
    """The text of a page, its blocks left out."""
    return _BLOCK.sub("", page)
