"""Reads text files in the usual encodings."""

import codecs
import re
import string
from pathlib import Path

from melora_fx import MELoRAError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # starts with UTF-16's mark, so it comes first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\x1f\x8b": "compressed with gzip",
    b"PAR1": "a Parquet file",
}
_MAX_WESTERN_SHARE = 0.4
"""Largest share of letters outside ASCII: texts in Western European languages have far fewer, texts in other alphabets
far more."""
_FEW_LETTERS = 8
"""Number of letters outside ASCII that is always accepted: a share of few letters says little."""


def read_text_file(path: Path) -> tuple[str, list[str]]:
    """Returns (text, notes for the user).

    Reads UTF-8, UTF-16 and UTF-32 with a byte order mark, and UTF-8 without one. Anything else is read as Windows-1252,
    which has every printable character of Latin-1, or as Latin-1 if a byte is undefined there: a file in a Western
    European language that is not UTF-8 is most probably in one of these.

    Raises:
        MELoRAError: if the file cannot be read, or is not text in these encodings; names the line and the byte offset.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise MELoRAError(f"`{path}` cannot be read: no such file") from error
    except IsADirectoryError as error:
        raise MELoRAError(f"`{path}` cannot be read: it is a folder, not a file") from error
    except OSError as error:
        raise MELoRAError(f"`{path}` cannot be read: {error.strerror}") from error
    for start, kind in _OTHER_FILES.items():
        if data.startswith(start):
            raise MELoRAError(f"`{path}` cannot be read: it is {kind}; save it as CSV")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None:
        _refuse_nul_bytes(path, data)
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding is None:
            return _decode_western(path, data, error.start)
        raise MELoRAError(
            f"`{path}` cannot be read: it begins as {error.encoding.upper()}, but the bytes from offset "
            f"{error.start} on are not ({error.reason})"
        ) from error
    if "\0" in text:
        raise MELoRAError(f"`{path}` cannot be read: line {_line(text, text.index(chr(0)))} has a NUL character")
    return text, []


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 row" or "2 rows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _refuse_nul_bytes(path: Path, data: bytes) -> None:
    """Raises MELoRAError for NUL bytes: UTF-16 without its mark if they are at every second place, else no text."""
    count = data.count(0)
    if not count:
        return
    for parity, name in ((1, "utf-16le"), (0, "utf-16be")):
        if data[parity::2].count(0) == count and 10 * count >= len(data):
            raise MELoRAError(
                f"`{path}` cannot be read: it looks like UTF-16 without a byte order mark; convert it: "
                f"iconv -f {name} -t utf-8"
            )
    offset = data.index(0)
    raise MELoRAError(
        f"`{path}` cannot be read: line {_line(data, offset)} has a NUL byte (offset {offset}), so it is not "
        "a text file"
    )


def _decode_western(path: Path, data: bytes, offset: int) -> tuple[str, list[str]]:
    """Decodes bytes that are not UTF-8 at `offset`; raises MELoRAError for broken UTF-8 and other alphabets."""
    where = f"line {_line(data, offset)} (byte {data[offset]:#04x} at offset {offset}) is not UTF-8"
    as_utf8 = data.decode("utf-8", errors="replace")
    num_broken = as_utf8.count("\N{REPLACEMENT CHARACTER}")
    if len(as_utf8) - len(as_utf8.encode("ascii", errors="ignore")) > 2 * num_broken:
        raise MELoRAError(f"`{path}` cannot be read: {where}, but most of the file is: repair or remove the text there")
    num_others = len(data) - len(data.translate(None, bytes(range(128, 256))))
    num_letters = len(data) - len(data.translate(None, string.ascii_letters.encode())) + num_others
    if num_others > max(_FEW_LETTERS, _MAX_WESTERN_SHARE * num_letters):
        raise MELoRAError(
            f"`{path}` cannot be read: {where}, nor in a Western European encoding; convert it from its own, for "
            "example: iconv -f cp1251 -t utf-8"
        )
    try:
        text, name = data.decode("cp1252"), "Windows-1252"
    except UnicodeDecodeError:
        text, name = data.decode("latin-1"), "Latin-1"
    found = re.search(r"\w*[^\W\x00-\x7f]\w*|[^\x00-\x7f]", text)
    word = found[0] if found else ""
    note = f"{where}: the file is read as {name} (“{word}”); if this is wrong, convert it: iconv -f latin1 -t utf-8"
    return text, [note]


def _line(text: str | bytes, offset: int) -> int:
    newline = "\n" if isinstance(text, str) else b"\n"
    return text[:offset].count(newline) + 1  # type: ignore[arg-type]
