"""Labelled texts for the demo: English utterances by topic from `chatterbot-corpus`, or a user's CSV file."""

import csv
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from melora_fx import MELoRAError

_MIN_WORDS = 3
_MIN_UTTERANCES = 40
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Texts:
    """Texts with the index of their label in `labels`, split once into a training and a held-out part."""

    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    held_out: tuple[tuple[str, int], ...]

    @property
    def majority_baseline(self) -> float:
        """Held-out accuracy of always answering the most frequent training label."""
        most_frequent = Counter(label for _, label in self.train).most_common(1)[0][0]
        return sum(label == most_frequent for _, label in self.held_out) / len(self.held_out)


def load_topics() -> Texts:
    """Utterances of three words or more, by topic; topics with 40 or more, texts of two topics left out.

    Raises:
        MELoRAError: where `chatterbot-corpus` is not installed; names the extra.
    """
    try:
        import chatterbot_corpus
        import yaml
    except ImportError as error:
        raise MELoRAError('the demo\'s data is not installed: pip install "melora_fx[demo]"') from error
    topics: dict[str, set[str]] = defaultdict(set)
    for file in sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            for utterance in conversation:
                text = " ".join(str(utterance).split())
                if len(text.split()) >= _MIN_WORDS:
                    topics[text.lower()].add(file.stem)
    by_topic: dict[str, list[str]] = defaultdict(list)
    for text, names in topics.items():
        if len(names) == 1:
            by_topic[next(iter(names))].append(text)
    return _split({topic: texts for topic, texts in by_topic.items() if len(texts) >= _MIN_UTTERANCES})


def load_csv(path: Path, text_column: str, label_column: str) -> Texts:
    """The rows of a CSV file with a header (tab-separated where it ends in .tsv).

    Raises:
        MELoRAError: for a file that cannot be read, has no rows, lacks a column, or has fewer than two labels with two
            texts each.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            columns = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MELoRAError(f"`{path}` cannot be read: {error}") from error
    missing = [name for name in (text_column, label_column) if name not in columns]
    if missing:
        raise MELoRAError(f"`{path}` has no column {', '.join(map(repr, missing))}; its columns are {columns}")
    by_label: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row[text_column] and row[label_column]:
            by_label[row[label_column]].append(row[text_column])
    if not by_label:
        raise MELoRAError(f"`{path}` is empty: no row has both a {text_column!r} and a {label_column!r}")
    usable = {label: texts for label, texts in by_label.items() if len(texts) > 1}
    if len(usable) < 2:
        raise MELoRAError(f"`{path}` needs two labels with two texts each, it has {len(usable)}")
    return _split(usable)


def _split(by_label: dict[str, list[str]]) -> Texts:
    """A fixed split that takes the same share of every label into the held-out part."""
    labels = tuple(sorted(by_label))
    train: list[tuple[str, int]] = []
    held_out: list[tuple[str, int]] = []
    for index, label in enumerate(labels):
        texts = [(text, index) for text in by_label[label]]
        random.Random(label).shuffle(texts)
        count = max(1, round(_HELD_OUT * len(texts)))
        held_out += texts[:count]
        train += texts[count:]
    return Texts(labels, tuple(train), tuple(held_out))
