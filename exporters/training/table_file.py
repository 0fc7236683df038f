"""The text and label columns of a delimited file: delimiters, quotes, column names."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from melora_fx import MELoRAError

from .text_file import read_text_file

DELIMITERS = (",", ";", "\t", "|")
_MAX_CELL = 2**31 - 1
_SHOWN = 40


@dataclass(frozen=True)
class TextRows:
    """(text, label) of each row as they stand in the file, how many rows were read, and notes for the user."""

    rows: tuple[tuple[str, str], ...]
    num_read: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Record:
    """The cells of one row, and the lines that it stands on."""

    first_line: int
    cells: list[str]


@dataclass(frozen=True)
class _Lines:
    """A file's lines with their ends, those of the header and rows from `start` on."""

    path: Path
    lines: list[str]
    start: int


def read_text_rows(path: Path, text_column: str, label_column: str) -> TextRows:
    """The two columns of a file with a header, delimited by `,`, `;`, `|` or tabs: whichever gives both columns.

    A name matches a column exactly, or else without regard to case and surrounding white space. Cells are quoted as in
    CSV, over several lines where needed. In a file with tabs, quotes are plain characters if every line has as many
    cells as the header, and they do not all stand in pairs around cells. Rows with too few cells are left out, and a
    note counts them.

    Raises:
        MELoRAError: for a file that cannot be read or is empty, a missing or ambiguous column, a quote that is not
            closed, or a row with too many cells; names the line.
    """
    text, notes = read_text_file(path)
    lines = list(io.StringIO(text, newline=""))
    if not text.strip():
        raise MELoRAError(f"`{path}` is empty")
    said = re.fullmatch(r'"?sep=(.)"?', lines[0].strip("\r\n"))
    file = _Lines(path, lines, 1 if said else 0)
    names = (text_column, label_column)
    with _any_cell_size():
        delimiter = _choose_delimiter(file, names, (said[1],) if said else DELIMITERS)
        is_quoted = not (delimiter == "\t" and _quotes_are_plain(file))
        records = list(_records(file, delimiter, is_quoted))
    header, rows = records[0].cells, records[1:]
    columns = _find_columns(path, header, names)
    if delimiter == "\t" and not is_quoted:
        notes.append("quotes are read as plain characters: they are not in pairs around cells")
    kept = _drop_short(rows, header, notes)
    _refuse_long(path, kept, header, delimiter)
    found = [(record.cells[columns[0]], record.cells[columns[1]]) for record in kept]
    _refuse_swallowed_rows(path, kept, columns, delimiter)
    return TextRows(tuple(found), len(rows), tuple(notes))


@contextmanager
def _any_cell_size() -> Iterator[None]:
    before = csv.field_size_limit(_MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _records(file: _Lines, delimiter: str, is_quoted: bool) -> Iterator[_Record]:
    """The rows that are not empty lines, the header first."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    reader = csv.reader(file.lines[file.start :], delimiter=delimiter, strict=True, quoting=quoting)
    while True:
        first = file.start + reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise MELoRAError(_quote_error(file, first, delimiter)) from error
        if cells:
            yield _Record(first + 1, cells)


def _quote_error(file: _Lines, first: int, delimiter: str) -> str:
    """What is wrong with the quotes of the record that begins at a line (from 0)."""
    opened = None
    at_start = True
    for number, line in enumerate(file.lines[first:], first + 1):
        position = 0
        while position < len(line):
            character = line[position]
            if opened is None:
                if character == '"' and at_start:
                    opened = number
                at_start = character == delimiter
            elif character == '"':
                following = line[position + 1 : position + 2]
                if following == '"':
                    position += 1
                elif following and following not in (delimiter, "\r", "\n"):
                    return (
                        f"`{file.path}`: the quote that opens in line {opened} is not closed before a delimiter: in "
                        f"line {number} text follows a quote (a quote inside of a quoted cell is written twice)"
                    )
                else:
                    opened = None
            position += 1
    return f"`{file.path}`: the quote that opens in line {opened} is never closed"


def _choose_delimiter(file: _Lines, names: Sequence[str], delimiters: Sequence[str]) -> str:
    """The delimiter that splits the header into most columns, among those that find all the named ones."""
    headers: dict[str, list[str]] = {}
    for delimiter in delimiters:
        try:
            headers[delimiter] = next(_records(file, delimiter, True)).cells
        except (MELoRAError, StopIteration):
            continue
    if not headers:
        raise MELoRAError(_quote_error(file, file.start, delimiters[0]))
    most = max(headers, key=lambda delimiter: len(headers[delimiter]))
    fitting = [each for each in headers if all(_matches(headers[each], name) for name in names)]
    if not fitting:
        missing = ", ".join(repr(name) for name in names if not _matches(headers[most], name))
        shown = [name if len(name) <= _SHOWN else name[:_SHOWN] + "…" for name in headers[most]]
        raise MELoRAError(f"`{file.path}` has no column {missing}; its columns (the first line's cells) are {shown}")
    return max(fitting, key=lambda delimiter: len(headers[delimiter]))


def _matches(header: Sequence[str], name: str) -> list[int]:
    """The columns of that very name, or else of that name without regard to case and surrounding white space."""
    exact = [index for index, column in enumerate(header) if column == name]
    folded = name.strip().casefold()
    return exact or [index for index, column in enumerate(header) if column.strip().casefold() == folded]


def _find_columns(path: Path, header: Sequence[str], names: Sequence[str]) -> list[int]:
    found = []
    for name in names:
        columns = _matches(header, name)
        if len(columns) > 1:
            raise MELoRAError(f"`{path}` has several columns {name!r}: {[header[index] for index in columns]}")
        found += columns
    return found


def _quotes_are_plain(file: _Lines) -> bool:
    """Every line has as many cells as the header if quotes are plain, and not all can be read alone if they are not."""
    plain = [record.cells for record in _records(file, "\t", False)]
    if any(len(cells) != len(plain[0]) for cells in plain):
        return False
    for number in range(file.start, len(file.lines)):
        line = _Lines(file.path, [file.lines[number]], 0)
        try:
            list(_records(line, "\t", True))
        except MELoRAError:
            return True
    return False


def _drop_short(rows: Sequence[_Record], header: Sequence[str], notes: list[str]) -> list[_Record]:
    short = [record for record in rows if len(record.cells) < len(header)]
    if short:
        notes.append(
            f"{len(short)} of {len(rows)} rows are left out: they have fewer cells than the header's {len(header)} "
            f"(the first in line {short[0].first_line})"
        )
    return [record for record in rows if len(record.cells) >= len(header)]


def _refuse_long(path: Path, rows: Sequence[_Record], header: Sequence[str], delimiter: str) -> None:
    """Cells beyond the header's that are empty are a spreadsheet's, and do no harm."""
    long = [record for record in rows if any(record.cells[len(header) :])]
    if long:
        raise MELoRAError(
            f"`{path}`: line {long[0].first_line} has {len(long[0].cells)} cells and the header {len(header)} "
            f"({len(long)} such rows); a text with {delimiter!r} in it must stand in quotes"
        )


def _refuse_swallowed_rows(path: Path, rows: Sequence[_Record], columns: Sequence[int], delimiter: str) -> None:
    """A cell over several lines is no text if one of the lines is a whole row, with a label that the file has."""
    labels = {record.cells[columns[1]] for record in rows}
    for record in rows:
        for cell in record.cells:
            for number, line in enumerate(re.split(r"\r\n|\r|\n", cell)[:-1]):
                cells = line.split(delimiter)
                if len(cells) == len(record.cells) and cells[columns[1]] in labels - {""}:
                    raise MELoRAError(
                        f"`{path}`: the quote that opens in line {record.first_line} is not closed in its row: the "
                        f"cell goes on over other rows, such as {line[:_SHOWN]!r} in line {record.first_line + number}"
                    )
