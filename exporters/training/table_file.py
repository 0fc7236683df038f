"""Reads the text and label columns of a delimited file: delimiters, quotes, column names."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from melora_fx import MELoRAError

from .text_file import counted, read_text_file

DELIMITERS = (",", ";", "\t", "|")
_MAX_CELL = 2**31 - 1
_SHOWN = 40
_MAX_NAMES = 20


@dataclass(frozen=True)
class TextRows:
    """The (text, label) of each row as written in the file, the number of rows read, and notes for the user."""

    rows: tuple[tuple[str, str], ...]
    num_read: int
    notes: tuple[str, ...]


class _Record(NamedTuple):
    """The cells of one row, and the number of its first line, from 1."""

    first_line: int
    cells: list[str]


@dataclass(frozen=True)
class _Lines:
    """The lines of a file with their line ends; the header and the rows begin at index `start`."""

    path: Path
    lines: list[str]
    start: int


class _QuoteError(MELoRAError):
    """A quote that is not closed where it should be."""


def read_text_rows(path: Path, text_column: str, label_column: str) -> TextRows:
    """Reads two columns of a file with a header, delimited by `,`, `;`, `|` or tabs: whichever yields both columns.

    A name matches a column exactly or, if none does, ignoring case and surrounding white space. Cells are quoted as in
    CSV and may span several lines. In a file with tabs, quotes are plain characters if the file cannot be read as
    quoted and every line has as many cells as the header. Rows with too few cells are left out, and a note counts them.

    Raises:
        MELoRAError: if the file cannot be read or is empty, a column is missing or ambiguous, a quote is not closed, or
            a row has too many cells; names the line.
    """
    text, notes = read_text_file(path)
    if not text.strip():
        raise MELoRAError(f"`{path}` is empty")
    lines = list(io.StringIO(text, newline=""))
    said = re.fullmatch(r'"?sep=(.)"?', lines[0].strip("\r\n"))  # Excel names the delimiter in a line above the header
    file = _Lines(path, lines, 1 if said else 0)
    names = (text_column, label_column)
    with _any_cell_size():
        delimiter = _choose_delimiter(file, names, (said[1],) if said else DELIMITERS)
        try:
            found = _read(file, names, delimiter, is_quoted=True)
        except _QuoteError as error:
            if delimiter != "\t":
                raise
            _refuse_uneven_lines(file, error)
            found = _read(file, names, delimiter, is_quoted=False)
            notes.append("quotes are read as plain characters: they are not in pairs around cells")
    return TextRows(found.rows, found.num_read, (*notes, *found.notes))


def _read(file: _Lines, names: Sequence[str], delimiter: str, is_quoted: bool) -> TextRows:
    header, *rows = _records(file, delimiter, is_quoted)
    num_cells = len(header.cells)
    columns = _find_columns(file.path, header.cells, names)
    kept = [record for record in rows if len(record.cells) >= num_cells]
    _refuse_swallowed_rows(file.path, kept, columns, delimiter)
    _refuse_long(file.path, kept, num_cells, delimiter)
    notes = []
    if short := [record for record in rows if len(record.cells) < num_cells]:
        notes.append(
            f"left out: {len(short)} of {counted(len(rows), 'row')}, with fewer cells than the header's {num_cells} "
            f"(the first in line {short[0].first_line})"
        )
    text, label = columns
    return TextRows(tuple((record.cells[text], record.cells[label]) for record in kept), len(rows), tuple(notes))


@contextmanager
def _any_cell_size() -> Iterator[None]:
    before = csv.field_size_limit(_MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _records(file: _Lines, delimiter: str, is_quoted: bool) -> Iterator[_Record]:
    """Yields the rows that are not empty lines, the header first."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    reader = csv.reader(file.lines[file.start :], delimiter=delimiter, strict=True, quoting=quoting)
    while True:
        first = file.start + reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _QuoteError(_quote_error(file, first, delimiter)) from error
        if cells:
            yield _Record(first + 1, cells)


def _refuse_uneven_lines(file: _Lines, error: _QuoteError) -> None:
    """Raises MELoRAError if the lines of a file with tabs do not all have as many cells as the header.

    Quotes cannot be plain characters then. The message extends that of `error` and names the first such line.
    """
    header, *rows = _records(file, "\t", False)
    odd = [record.first_line for record in rows if len(record.cells) != len(header.cells)]
    if odd:
        raise MELoRAError(
            f"{error}; in a file with tabs, quotes would be plain characters if each line had as many cells as the "
            f"header, but line {odd[0]} has not"
        ) from error


def _quote_error(file: _Lines, first: int, delimiter: str) -> str:
    """Returns what is wrong with the quotes of the record that begins at line `first` (from 0)."""
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
                        f"line {number} text follows a quote (a quote inside a quoted cell must be written twice)"
                    )
                else:
                    opened = None
            position += 1
    return f"`{file.path}`: the quote that opens in line {opened} is never closed"


def _choose_delimiter(file: _Lines, names: Sequence[str], delimiters: Sequence[str]) -> str:
    """Returns the delimiter that splits the header into the most columns, of those that yield all the named ones."""
    headers: dict[str, list[str]] = {}
    for delimiter in delimiters:
        try:
            headers[delimiter] = next(_records(file, delimiter, True)).cells
        except (MELoRAError, StopIteration):
            continue
    most = max(headers, key=lambda delimiter: len(headers[delimiter]), default=None)
    if most is None or (len(headers[most]) == 1 and len(headers) < len(delimiters)):
        broken = next(delimiter for delimiter in delimiters if delimiter not in headers)
        raise _QuoteError(_quote_error(file, file.start, broken))
    fitting = [each for each in headers if all(_matches(headers[each], name) for name in names)]
    if not fitting:
        missing = ", ".join(repr(name) for name in names if not _matches(headers[most], name))
        raise MELoRAError(
            f"`{file.path}` has no column {missing}; its columns, from the first line: {_show(headers[most])}"
        )
    return max(fitting, key=lambda delimiter: len(headers[delimiter]))


def _show(header: Sequence[str]) -> str:
    """Lists the column names, long and many ones cut: a file without a header has whole texts there."""
    names = [repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "…") for name in header[:_MAX_NAMES]]
    return ", ".join(names) + (f" and {len(header) - _MAX_NAMES} more" if len(header) > _MAX_NAMES else "")


def _matches(header: Sequence[str], name: str) -> list[int]:
    """Returns the columns with exactly this name or, if there are none, ignoring case and surrounding white space."""
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


def _refuse_long(path: Path, rows: Sequence[_Record], num_cells: int, delimiter: str) -> None:
    """Raises MELoRAError for rows longer than the header. Empty extra cells, which spreadsheets write, are allowed."""
    long = [record for record in rows if any(record.cells[num_cells:])]
    if long:
        raise MELoRAError(
            f"`{path}`: line {long[0].first_line} has {len(long[0].cells)} cells and the header {num_cells} "
            f"({counted(len(long), 'such row')}); a text with {delimiter!r} in it must be in quotes, and every "
            "column needs a name"
        )


def _refuse_swallowed_rows(path: Path, rows: Sequence[_Record], columns: Sequence[int], delimiter: str) -> None:
    """Raises MELoRAError if a line of a multi-line cell is a whole row, with a label that occurs in the file."""
    labels = {record.cells[columns[1]] for record in rows}
    for record in rows:
        for cell in (cell for cell in record.cells if "\n" in cell or "\r" in cell):
            for number, line in enumerate(re.split(r"\r\n|\r|\n", cell)[:-1]):
                cells = line.split(delimiter)
                if len(cells) == len(record.cells) and cells[columns[1]] in labels - {""}:
                    raise _QuoteError(
                        f"`{path}`: the quote that opens in line {record.first_line} is not closed in its row: "
                        f"the cell continues over other rows, such as {line[:_SHOWN]!r} in line "
                        f"{record.first_line + number}"
                    )
