"""Reads a user's labelled texts, and splits them into a training and a held-out part."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from melora_fx import MELoRAError

from .split import Row, ambiguous_keys, drop_single_texts, name_some, split, text_key
from .table_file import read_text_rows
from .text_file import counted


@dataclass(frozen=True)
class Texts:
    """Labelled texts in a training and a held-out part.

    Attributes:
        labels: the labels, sorted or in the order of a model's head.
        train, held_out: (text, index of its label in `labels`); no text is in both parts.
        notes: what the user should know about the reading of the file.
    """

    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    held_out: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()

    @property
    def majority_baseline(self) -> float:
        """The held-out accuracy of always answering the most frequent training label."""
        most_frequent = Counter(label for _, label in self.train).most_common(1)[0][0]
        return sum(label == most_frequent for _, label in self.held_out) / len(self.held_out)

    def with_labels(self, labels: Sequence[str]) -> "Texts":
        """Returns the same texts with their labels in the order of `labels`."""
        number = [labels.index(label) for label in self.labels]
        train, held_out = (tuple((text, number[label]) for text, label in part) for part in (self.train, self.held_out))
        return Texts(tuple(labels), train, held_out, self.notes)


def read_texts(
    path: Path, text_column: str, label_column: str, *, held_out: float | Path = 0.2, seed: int = 0
) -> Texts:
    """Reads the labelled texts of a delimited file with a header, as `read_text_rows` does.

    Labels are stripped of surrounding white space. Rows without a text or a label are left out and counted in the
    notes. If a share is held out, labels with a single text are left out and counted too, and the same rows and seed
    return the same texts in the same order, regardless of the order of the rows.

    Args:
        path: the file.
        text_column, label_column: the names of its columns.
        held_out: the share of each label's rows to hold out, between 0 and 1, as in `split`; or a file with the same
            columns whose texts are held out, and removed from the training part.
        seed: seed of the choice and the order of the texts.

    Raises:
        ValueError: if the share is not between 0 and 1, or both columns are the same.
        MELoRAError: if a file cannot be used (see `read_text_rows`); if there are fewer than two labels; if a label
            occurs only in the held-out file, or the held-out file contains all training texts of a label.
    """
    if text_column == label_column:
        raise ValueError(f"`text_column` and `label_column` (={label_column!r}) must be different columns")
    if isinstance(held_out, str | os.PathLike):
        return _read_two_files(Path(path), Path(held_out), text_column, label_column)
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out` (={held_out}; `--validation`) must be between 0 and 1, or a file")
    rows, notes = _read_rows(Path(path), text_column, label_column)
    try:
        texts = split_texts(rows, held_out, seed)
    except MELoRAError as error:
        raise MELoRAError(f"`{path}`: {error}") from error
    return Texts(texts.labels, texts.train, texts.held_out, (*notes, *texts.notes))


def split_texts(rows: Sequence[Row], held_out: float = 0.2, seed: int = 0) -> Texts:
    """Splits (text, label) rows into `Texts`; the arguments are those of `read_texts`.

    Raises:
        MELoRAError: if fewer than two labels have two different texts, or all texts of a label have other labels too.
    """
    kept, notes = drop_single_texts(rows)
    labels = tuple(sorted({label for _, label in kept}))
    if len(labels) < 2:
        raise MELoRAError(f"needs two labels with two different texts each, but has {len(labels)}")
    if ambiguous := ambiguous_keys(kept):
        example = next(text for text, _ in kept if text_key(text) in ambiguous)
        number = counted(len(ambiguous), "text")
        notes.append(f"never held out: {number} with more than one label, such as {name_some([example])}")
    train, rest = split(kept, held_out, seed)
    return Texts(labels, _indexed(train, labels), _indexed(rest, labels), tuple(notes))


def _read_two_files(path: Path, held_out_path: Path, text_column: str, label_column: str) -> Texts:
    if path.absolute() == held_out_path.absolute():
        raise MELoRAError(f"`{path}` is both the training and the validation file: pass two files, or a share")
    train, notes = _read_rows(path, text_column, label_column)
    held_out, held_out_notes = _read_rows(held_out_path, text_column, label_column)
    labels = tuple(sorted({label for _, label in train}))
    if unknown := sorted({label for _, label in held_out} - {*labels}):
        raise MELoRAError(f"`{held_out_path}` has labels that `{path}` lacks: {name_some(unknown)}")
    keys = {text_key(text) for text, _ in held_out}
    kept = [row for row in train if text_key(row[0]) not in keys]
    if len(kept) < len(train):
        notes.append(
            f"`{path.name}`: left out: {counted(len(train) - len(kept), 'row')} whose text is in "
            f"`{held_out_path.name}` too"
        )
    if bare := sorted({*labels} - {label for _, label in kept}):
        raise MELoRAError(f"`{held_out_path}` has all texts that `{path}` has for {name_some(bare)}")
    if len(labels) < 2:
        raise MELoRAError(f"`{path}`: needs two labels, but has {len(labels)}")
    if untested := sorted({*labels} - {label for _, label in held_out}):
        notes.append(f"`{held_out_path.name}` has no texts of {name_some(untested)}")
    return Texts(labels, _indexed(sorted(kept), labels), _indexed(held_out, labels), (*notes, *held_out_notes))


def _indexed(rows: Sequence[Row], labels: Sequence[str]) -> tuple[tuple[str, int], ...]:
    number = {label: index for index, label in enumerate(labels)}
    return tuple((text, number[label]) for text, label in rows)


def _read_rows(path: Path, text_column: str, label_column: str) -> tuple[list[Row], list[str]]:
    """Returns (the rows that have a text and a label, notes that name the file)."""
    table = read_text_rows(path, text_column, label_column)
    notes = list(table.notes)
    rows = [(text, label.strip()) for text, label in table.rows if text.strip() and label.strip()]
    if not rows:
        said = "".join(f"; {note}" for note in notes)
        raise MELoRAError(f"`{path}` is empty: no row has both a {text_column!r} and a {label_column!r}{said}")
    if dropped := len(table.rows) - len(rows):
        notes.append(f"left out: {dropped} of {counted(table.num_read, 'row')}, without a text or a label")
    notes += _label_notes({label for _, label in rows})
    return rows, [f"`{path.name}`: {note}" for note in notes]


def _label_notes(labels: set[str]) -> list[str]:
    """Returns notes on labels that look like mistakes; the labels are not changed."""
    by_case: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        by_case[label.casefold()].append(label)
    same = [found for found in by_case.values() if len(found) > 1]
    notes = [f"labels that differ only in case are different labels: {name_some(found)}" for found in same]
    if all(re.fullmatch(r"[-+]?\d*[.,]?\d+", label) for label in labels) and any(
        re.search("[.,]", label) for label in labels
    ):
        notes.append(
            f"the labels are numbers with fractions ({name_some(sorted(labels)[:2])}): each is a separate class"
        )
    return notes
