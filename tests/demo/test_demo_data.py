"""The demo's texts: real utterances by topic, or a user's file."""

import sys
from pathlib import Path

import pytest

from exporters.demo.data import Texts, load_csv, load_topics
from melora_fx import MELoRAError


def test_topics_are_real_labelled_texts() -> None:
    pytest.importorskip("chatterbot_corpus", reason="the demo's texts are a pip package of their own")
    texts = load_topics()
    assert {"science", "money", "trivia"} <= set(texts.labels)
    assert len(texts.train) > 800
    assert 0.18 < len(texts.held_out) / (len(texts.train) + len(texts.held_out)) < 0.22
    assert not {text for text, _ in texts.train} & {text for text, _ in texts.held_out}
    assert {label for _, label in texts.held_out} == set(range(len(texts.labels)))
    assert texts == load_topics(), "the split is fixed"


def test_majority_baseline() -> None:
    train = (("a", 1), ("b", 1), ("c", 0))
    assert Texts(("x", "y"), train, (("d", 1), ("e", 0), ("f", 0), ("g", 0))).majority_baseline == 0.25


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_users_file(tmp_path: Path, suffix: str) -> None:
    comma = "," if suffix == ".csv" else "\t"
    lines = [f"body{comma}kind"] + [f"text {i}{comma}{'good' if i % 2 else 'bad'}" for i in range(20)]
    path = tmp_path / f"data{suffix}"
    path.write_text("\n".join(lines))
    texts = load_csv(path, "body", "kind")
    assert texts.labels == ("bad", "good")
    assert len(texts.train) == 16
    assert all(int(text.split()[1]) % 2 == label for text, label in texts.train + texts.held_out)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "has no column"),
        ("body,kind\n", "is empty"),
        ("body,other\na,b\n", r"has no column 'kind'; its columns are \['body', 'other'\]"),
        ("body,kind\na,x\nb,x\n", "needs two labels with two texts each, it has 1"),
        ("body,kind\na,x\nb,y\n", "needs two labels"),
    ],
    ids=["empty_file", "no_rows", "missing_column", "one_label", "single_texts"],
)
def test_bad_files_get_one_clear_error(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(MELoRAError, match=text):
        load_csv(path, "body", "kind")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match="cannot be read"):
        load_csv(tmp_path / "none.csv", "a", "b")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MELoRAError, match="cannot be read"):
        load_csv(tmp_path / "binary.csv", "a", "b")


def test_no_data_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chatterbot_corpus", None)
    with pytest.raises(MELoRAError, match=r"melora_fx\[demo\]"):
        load_topics()
