"""A user's labelled texts: labels, notes, and which texts are held out."""

import csv
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.training.split import text_key
from exporters.training.texts import Texts, read_texts, split_texts
from melora_fx import MELoRAError


def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def named(texts: Texts) -> list[tuple[str, str]]:
    """Returns the (text, label) pairs of both parts."""
    return [(text, texts.labels[index]) for text, index in texts.train + texts.held_out]


def test_majority_baseline() -> None:
    train = (("a", 1), ("b", 1), ("c", 0))
    assert Texts(("x", "y"), train, (("d", 1), ("e", 0), ("f", 0), ("g", 0))).majority_baseline == 0.25


def test_a_users_file(tmp_path: Path) -> None:
    texts = read_texts(write(tmp_path / "a.csv", [(f"text {i}", f" {i % 2} ") for i in range(20)]), "text", "label")
    assert texts.labels == ("0", "1")
    assert (len(texts.train), len(texts.held_out)) == (16, 4)
    assert Counter(label for _, label in texts.held_out) == {0: 2, 1: 2}
    assert all(int(text.split()[1]) % 2 == label for text, label in texts.train + texts.held_out)
    assert texts.notes == ()


def test_the_rows_and_the_seed_alone_decide() -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(40)]
    texts = split_texts(rows)
    random.Random(1).shuffle(rows)
    assert split_texts(rows) == texts
    assert split_texts(rows, seed=1) != texts
    more = split_texts(rows, 0.5)
    assert (len(more.train), len(more.held_out)) == (20, 20)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(10)]
    path = write(tmp_path / "a.csv", [*rows, ("", "a"), ("text", " "), ("lonely", "odd"), (" Lonely", "odd")])
    path.write_text(path.read_text() + "short\n")
    texts = read_texts(path, "text", "label")
    assert sorted(named(texts)) == sorted(rows)
    assert texts.notes == (
        "`a.csv`: left out: 1 of 15 rows, with fewer cells than the header's 2 (the first in line 16)",
        "`a.csv`: left out: 2 of 15 rows, without a text or a label",
        "left out: 2 rows of labels with a single text, which cannot be in both parts: “odd”",
    )


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (("NaN", "None"), None),
        (("Yes", "yes"), "labels that differ only in case are different labels: “Yes”, “yes”"),
        (("1", "2.5"), "the labels are numbers with fractions (“1”, “2.5”): each is a separate class"),
        (("1", "2"), None),
    ],
)
def test_labels_are_strings(tmp_path: Path, labels: tuple[str, str], note: str | None) -> None:
    path = write(tmp_path / "a.csv", [(f"text {i}", labels[i % 2]) for i in range(10)])
    texts = read_texts(path, "text", "label")
    assert texts.labels == labels
    assert texts.notes == (() if note is None else (f"`a.csv`: {note}",))


def test_identical_texts_stay_together() -> None:
    rows = [(f"  Text{' ' * (i % 3)} {i % 7}", "a") for i in range(70)] + [(f"other {i}", "b") for i in range(10)]
    texts = split_texts(rows, 0.3)
    assert sorted(named(texts)) == sorted(rows), "each as often as it is in the file"
    assert not {text_key(text) for text, _ in texts.train} & {text_key(text) for text, _ in texts.held_out}
    assert sum(label == 0 for _, label in texts.held_out) == 20


def test_texts_of_two_labels_are_never_held_out() -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(10)] + [("Both", "a"), ("both ", "b")]
    texts = split_texts(rows, 0.9)
    assert [text for text, _ in texts.train if text_key(text) == "both"] == ["Both", "both "]
    assert texts.notes == ("never held out: 1 text with more than one label, such as “Both”",)
    with pytest.raises(MELoRAError, match="no text can be held out for “b”: all have other labels too"):
        split_texts([("x", "a"), ("y", "a"), ("z", "a"), ("x", "b"), ("y", "b")])


CHARACTERS = st.sampled_from(["a", "É", "é", " ", "\n", '"', ",", "x,Q"])


@settings(max_examples=40, deadline=None, database=None)
@given(
    rows=st.lists(st.tuples(st.lists(CHARACTERS, max_size=3).map("".join), st.sampled_from(["A", "B ", "C", "", " "]))),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], share: float, seed: int
) -> None:
    rows = [(f"{label}: {text}" if label == "C" else text, label) for text, label in rows]  # C's texts are unique
    rows += [(f"sure {i}", "AB"[i % 2]) for i in range(6)]
    path = write(tmp_path_factory.getbasetemp() / "rows.csv", rows)
    texts = read_texts(path, "text", "label", held_out=share, seed=seed)
    given = Counter((text, label.strip()) for text, label in rows)
    assert Counter(named(texts)) <= given
    said = sum(int(re.search(r"left out: (\d+)", note)[1]) for note in texts.notes if "left out" in note)
    assert len(texts.train) + len(texts.held_out) + said == len(rows)
    assert not {text_key(text) for text, _ in texts.train} & {text_key(text) for text, _ in texts.held_out}
    everywhere = set(range(len(texts.labels)))
    assert {label for _, label in texts.train} == {label for _, label in texts.held_out} == everywhere


def test_a_file_of_held_out_texts(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [(f"text {i}", "abc"[i % 3]) for i in range(9)])
    held_out = write(tmp_path / "test.csv", [("new", "b"), (" TEXT 0", "a"), ("", "a")])
    texts = read_texts(train, "text", "label", held_out=held_out)
    assert texts.labels == ("a", "b", "c")
    assert texts.held_out == (("new", 1), (" TEXT 0", 0))
    assert sorted(texts.train) == [(f"text {i}", i % 3) for i in range(1, 9)]
    assert texts.notes == (
        "`train.csv`: left out: 1 row whose text is in `test.csv` too",
        "`test.csv` has no texts of “c”",
        "`test.csv`: left out: 1 of 3 rows, without a text or a label",
    )


@pytest.mark.parametrize(
    ("train", "held_out", "error"),
    [
        ([("x", "a"), ("y", "b")], [("z", "c")], "has labels that `.*train.csv` lacks: “c”"),
        ([("x", "a"), ("y", "b")], [("X", "a")], "has all texts that `.*train.csv` has for “a”"),
        ([("x", "a"), ("y", "a")], [("z", "a")], "needs two labels, but has 1"),
        ([("x", "a"), ("y", "b")], [("", "a")], "test.csv` is empty: no row has both"),
        ([("x", "a"), ("y", "b")], None, "test.csv` cannot be read: no such file"),
    ],
    ids=["new_label", "no_training_text", "one_label", "empty", "no_file"],
)
def test_bad_files_of_held_out_texts(
    tmp_path: Path, train: list[tuple[str, str]], held_out: list[tuple[str, str]] | None, error: str
) -> None:
    if held_out is not None:
        write(tmp_path / "test.csv", held_out)
    with pytest.raises(MELoRAError, match=error):
        read_texts(write(tmp_path / "train.csv", train), "text", "label", held_out=tmp_path / "test.csv")


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], "is empty: no row has both"),
        ([("a", "x"), ("b", "x")], "a.csv`: needs two labels with two different texts each, but has 1"),
        ([("a", "x"), ("a", "x"), ("b", "y")], "a.csv`: needs two labels"),
    ],
    ids=["no_rows", "one_label", "single_texts"],
)
def test_bad_files_get_one_clear_error(tmp_path: Path, rows: list[tuple[str, str]], error: str) -> None:
    with pytest.raises(MELoRAError, match=error):
        read_texts(write(tmp_path / "a.csv", rows), "text", "label")


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match="`held_out`"):
        read_texts(Path("any"), "text", "label", held_out=share)


def test_two_columns() -> None:
    with pytest.raises(ValueError, match="`text_column` and `label_column`"):
        read_texts(Path("any"), "text", "text")
