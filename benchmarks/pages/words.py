"""Parts of the sentences in blocks. None of them says which side is faster, because the rows may change."""

import re
import textwrap
from collections.abc import Iterable, Sequence

from .block import Row, Rows

WIDTH = 120
_IN_ONE_LINE = re.compile(r"\[[^]]*\]|`[^`]*`")
_SPACE = "\0"


def paragraph(text: str) -> list[str]:
    """Returns lines of a page's width; link names and code stay on one line."""
    kept = _IN_ONE_LINE.sub(lambda found: found[0].replace(" ", _SPACE), text)
    lines = textwrap.wrap(kept, WIDTH, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_SPACE, " ") for line in lines]


def machine(rows: Rows) -> str:
    """Returns the machines that the rows were measured on."""
    return " and ".join(dict.fromkeys(row["device"] or "an unknown machine" for row in rows))


def origin(rows: Rows, *packages: str) -> str:
    """Returns the machines that the rows were measured on, with the versions of melora_fx and of `packages`."""
    texts = [text.split(" ") for row in rows for text in row["versions"].split("; ") if text]
    found: dict[str, dict[str, None]] = {}
    for name, version in texts:
        found.setdefault(name, {})[version.partition("+")[0]] = None
    versions = [f"{name} {' and '.join(found[name])}" for name in ("melora_fx", *packages) if name in found]
    return machine(rows) + (f" ({', '.join(versions)})" if versions else "")


def by_case(rows: Rows) -> dict[str, dict[str, Row]]:
    """Returns case → side → row, in the order of the file."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["side"]] = row
    return cases


def number(row: Row, column: str) -> float:
    return float(row[column])


def ratio(row: Row, over: Row, column: str = "median_ms") -> float:
    return number(row, column) / number(over, column)


def span(values: Iterable[float], form: str) -> str:
    """Returns the smallest and the largest value, as "0.98 to 1.05", or one number if both are formatted alike."""
    found = sorted(values)
    low, high = format(found[0], form), format(found[-1], form)
    return low if low == high else f"{low} to {high}"


def listed(texts: Sequence[str]) -> str:
    """Returns "a, b and c"."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def duration(row: Row) -> str:
    """Returns the median with three digits, in milliseconds, or in seconds from one second on."""
    milliseconds = number(row, "median_ms")
    return f"{_three_digits(milliseconds)} ms" if milliseconds < 999.5 else f"{_three_digits(milliseconds / 1e3)} s"


def times(value: float) -> str:
    """Returns a ratio with two decimals below ten, and none from ten on."""
    return f"{value:.2f}" if value < 9.995 else f"{value:,.0f}"


def per_cent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"
