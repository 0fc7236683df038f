"""A user's labelled texts: labels, notes, and which texts are held out."""

from pathlib import Path

import pytest

from exporters.training.texts import Texts, read_texts
from melora_fx import MELoRAError


def test_majority_baseline() -> None:
    train = (("a", 1), ("b", 1), ("c", 0))
    assert Texts(("x", "y"), train, (("d", 1), ("e", 0), ("f", 0), ("g", 0))).majority_baseline == 0.25


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_users_file(tmp_path: Path, delimiter: str) -> None:
    rows = [f"text {i}{delimiter}{'good' if i % 2 else 'bad'}" for i in range(20)]
    path = tmp_path / "data.csv"
    path.write_text("\n".join([f"body{delimiter}kind", *rows]))
    texts = read_texts(path, "body", "kind")
    assert texts.labels == ("bad", "good")
    assert len(texts.train) == 16
    assert all(int(text.split()[1]) % 2 == label for text, label in texts.train + texts.held_out)
    assert texts.notes == ()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is empty"),
        ("body,kind\n", "is empty"),
        ("body,other\na,b\n", r"has no column 'kind'; its columns .* are \['body', 'other'\]"),
        ("body,kind\na,x\nb,x\n", "needs two labels with two different texts each, it has 1"),
        ("body,kind\na,x\nb,y\n", "needs two labels"),
    ],
    ids=["empty_file", "no_rows", "missing_column", "one_label", "single_texts"],
)
def test_bad_files_get_one_clear_error(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(MELoRAError, match=text):
        read_texts(path, "body", "kind")
