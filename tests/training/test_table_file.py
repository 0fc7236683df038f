"""Delimited files as spreadsheets, libraries and people write them."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exporters.training.table_file import DELIMITERS, read_text_rows
from exporters.training.text_file import read_text_file
from melora_fx import MELoRAError

ROWS = "a cat,pos\na dog,neg\n"
READ = (("a cat", "pos"), ("a dog", "neg"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.csv"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"text,label\n{ROWS}", READ),
        (f"\ufefftext,label\n{ROWS}", READ),
        (f"sep=;\r\ntext;label\r\n{ROWS}".replace(",", ";"), READ),
        (f"\ufeffsep=;\r\ntext;label\r\n{ROWS}".replace(",", ";"), READ),
        (f"text\tlabel\n{ROWS}".replace(",", "\t"), READ),
        (f"text|label\n{ROWS}".replace(",", "|"), READ),
        ("text;label\na cat;pos\na, dog;neg\n", (READ[0], ("a, dog", "neg"))),
        (f"text,label\n{ROWS}".replace("\n", "\r"), READ),
        (f"\n\ntext,label\n\n{ROWS}\n\n", READ),
        (f" Text , LABEL\n{ROWS}", READ),
        ("Text,text,label\nno,a cat,pos\nno,a dog,neg\n", READ),
        (",text,label\n0,a cat,pos\n1,a dog,neg\n", READ),
        ("text,label,,\na cat,pos,,\na dog,neg,,,\n", READ),
        ('text,label\n"a\n""cat"", no, dog",pos\n', (('a\n"cat", no, dog', "pos"),)),
        ('text,label\na 5" cat,pos\n', (('a 5" cat', "pos"),)),
        ("text,label\n,pos\n  , neg \n", (("", "pos"), ("  ", " neg "))),
        ("text,label\na,NaN\nb,None\nc,null\nd,NA\n", (("a", "NaN"), ("b", "None"), ("c", "null"), ("d", "NA"))),
        (f'text,label\n"{"word " * 50_000}",pos\n', (("word " * 50_000, "pos"),)),
        ('text\tlabel\n"He" said\tpos\n"unclosed\tneg\n', (('"He" said', "pos"), ('"unclosed', "neg"))),
        ('text\tlabel\n"a\tpos\nb"\tneg\nc"\tpos\n', (('"a', "pos"), ('b"', "neg"), ('c"', "pos"))),
        ('text\tlabel\n"a ""cat"""\tpos\n"over\nlines"\tneg\n', (('a "cat"', "pos"), ("over\nlines", "neg"))),
    ],
    ids=[
        "plain",
        "bom",
        "sep",
        "sep-bom",
        "tabs",
        "pipes",
        "semicolons",
        "old-mac",
        "empty-lines",
        "case",
        "exact-first",
        "index",
        "trailing",
        "quoted",
        "quote-inside",
        "empty-cells",
        "nan",
        "long-cell",
        "plain-quotes",
        "swallowing-quotes",
        "quoted-tabs",
    ],
)
def test_forms(path: Path, content: str, expected: tuple[tuple[str, str], ...]) -> None:
    path.write_text(content, encoding="utf-8", newline="")
    limit = csv.field_size_limit()
    assert read_text_rows(path, "text", "label").rows == expected
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("\ufeff", "is empty"),
        ("body,kind\na,b\n", r"no column 'text', 'label'; its columns, from the first line: 'body', 'kind'"),
        ("text,text,label\na,b,c\n", r"several columns 'text': \['text', 'text'\]"),
        ("Text,TEXT,label\na,b,c\n", r"several columns 'text': \['Text', 'TEXT'\]"),
        (f"text,label\n{ROWS}a, b,pos\n", r"line 4 has 3 cells and the header 2 \(1 such row\).*in quotes"),
        (f'text,label\n{ROWS}"opened,pos\n{ROWS}', "opens in line 4 is never closed"),
        (f'text,label\n{ROWS}"opened,pos\n{ROWS}"a, b",pos\n', "opens in line 4 .* in line 7 text follows a quote"),
        (f'text,label\n{ROWS}"opened,pos\na dog,neg\nsaid yes",pos\n', "opens in line 4 .*'opened,pos' in line 4"),
        (f'text,label\n{ROWS}a bird,"pos\na dog,neg\n', "opens in line 4 is never closed"),
        (f'text,label\n{ROWS}"a \\"bird\\"",pos\n', "line 4 text follows a quote .*written twice"),
        ('text,"label\na,b\n', "opens in line 1 is never closed"),
        (f'sep=,\ntext,label\n{ROWS}"opened,pos\n', "opens in line 5"),
        ('text\tlabel\n"He" said\tpos\nshort\n', "opens in line 2 .*but line 3 has not"),
        (f"text,label\n{ROWS}a\0b,pos\n", "line 4 has a NUL byte"),
    ],
    ids=[
        "empty",
        "white-space",
        "only-a-mark",
        "missing-columns",
        "twice",
        "ambiguous",
        "long-row",
        "unclosed",
        "text-after-quote",
        "swallowed",
        "label",
        "backslash",
        "header",
        "below-sep",
        "tabs",
        "nul",
    ],
)
def test_one_error_names_the_line(path: Path, content: str, error: str) -> None:
    path.write_text(content, encoding="utf-8")
    with pytest.raises(MELoRAError, match=error):
        read_text_rows(path, "text", "label")


def test_short_rows_are_counted(path: Path) -> None:
    path.write_text(f"text,label\n{ROWS}short\n{ROWS}shorter\n")
    found = read_text_rows(path, "text", "label")
    assert (found.rows, found.num_read) == (READ * 2, 6)
    assert found.notes == ("left out: 2 of 6 rows, with fewer cells than the header's 2 (the first in line 4)",)


TEXTS = st.lists(st.sampled_from([*"ab ,;\t|\"'\néß", "\r\n"]), min_size=1, max_size=8).map("".join)
"""Without a lone \\r, which the csv module of Python 3.11 writes without quotes."""


@settings(max_examples=40, deadline=None, database=None)
@given(
    rows=st.lists(st.tuples(TEXTS, st.sampled_from(["LABEL 0", "LABEL 1"])), min_size=1, max_size=5),
    delimiter=st.sampled_from(DELIMITERS),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@example([("a\tb\nc\td", "LABEL 0")], "\t", csv.QUOTE_MINIMAL, "\n", "utf-8")
def test_what_the_csv_module_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    delimiter: str,
    quoting: int,
    end: str,
    encoding: str,
) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([("text", "label"), *rows])
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_bytes(file.getvalue().encode(encoding))
    assert list(read_text_rows(path, "text", "label").rows) == rows


FRENCH = "".join(f"un café déjà servi numéro {number}\n" for number in range(5))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "latin-1"])
def test_encodings(path: Path, encoding: str) -> None:
    path.write_bytes(FRENCH.encode(encoding))
    text, notes = read_text_file(path)
    assert text == FRENCH
    if encoding in ("cp1252", "latin-1"):
        (note,) = notes
        assert "line 1 (byte 0xe9 at offset 6) is not UTF-8: the file is read as Windows-1252 (“café”)" in note
        assert "iconv -f latin1 -t utf-8" in note
    else:
        assert notes == []


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (FRENCH.encode("utf-16-le"), "UTF-16 without a byte order mark.*iconv -f utf-16le"),
        (FRENCH.encode("utf-16-be"), "UTF-16 without a byte order mark.*iconv -f utf-16be"),
        (FRENCH.encode("utf-16")[:-1], "begins as UTF-16"),
        (f"{FRENCH}a\0b".encode("utf-16"), "line 6 has a NUL character"),
        (FRENCH.encode() + b"caf\xe9 au lait", r"line 6 \(byte 0xe9 at offset 163\) .* most of the file is"),
        ("привет, мир".encode("cp1251"), "nor in a Western European encoding"),
        ("こんにちは世界".encode("shift-jis"), "nor in a Western European encoding"),
        (b"PK\x03\x04\0\0", "an Excel workbook; save it as CSV"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
    ],
    ids=[
        "utf-16-le",
        "utf-16-be",
        "odd-utf-16",
        "nul-in-utf-16",
        "broken-utf-8",
        "cyrillic",
        "japanese",
        "excel",
        "gzip",
    ],
)
def test_what_is_no_readable_text(path: Path, data: bytes, error: str) -> None:
    path.write_bytes(data)
    with pytest.raises(MELoRAError, match=error):
        read_text_file(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match="no such file"):
        read_text_file(tmp_path / "none.csv")
    with pytest.raises(MELoRAError, match="a folder"):
        read_text_file(tmp_path)
