"""Tables in the pages of docs/, each between two comments."""

from collections.abc import Iterable
from pathlib import Path


def lines_between(page: Path, start: str, end: str) -> list[str]:
    """Returns the lines of a page between the two comments."""
    return page.read_text().partition(start)[2].partition(end)[0].strip().splitlines()


def replace_between(page: Path, start: str, lines: Iterable[str], end: str) -> None:
    """Replaces the lines of a page between the two comments."""
    before, _, rest = page.read_text().partition(start)
    page.write_text("\n".join([before + start, *lines, end]) + rest.partition(end)[2])
