"""Chooses the held-out texts: the same share of every label, and never a text that is trained on."""

import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from melora_fx import MELoRAError

from .text_file import counted

Row = tuple[str, str]
"""(text, label)"""

_NAMED = 5
_MAX_LENGTH = 60


def text_key(text: str) -> str:
    """Returns a key that is the same for texts that count as identical.

    They may differ in white space and case, which many tokenizers ignore, and in Unicode composition.
    """
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def name_some(names: Sequence[str]) -> str:
    """Lists the first names, and says how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    short = (name if len(name) <= _MAX_LENGTH else name[:_MAX_LENGTH] + "…" for name in names[:_NAMED])
    return ", ".join(f"“{name}”" for name in short) + more


def ambiguous_keys(rows: Iterable[Row]) -> set[str]:
    """Returns the keys of texts that have more than one label."""
    labels: dict[str, set[str]] = defaultdict(set)
    for text, label in rows:
        labels[text_key(text)].add(label)
    return {key for key, found in labels.items() if len(found) > 1}


def drop_single_texts(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Returns (the rows of labels with at least two different texts, notes): one text cannot be in both parts."""
    keys: dict[str, set[str]] = defaultdict(set)
    for text, label in rows:
        keys[label].add(text_key(text))
    single = sorted(label for label, found in keys.items() if len(found) == 1)
    kept = [row for row in rows if len(keys[row[1]]) > 1]
    if not single:
        return kept, []
    return kept, [
        f"left out: {counted(len(rows) - len(kept), 'row')} of labels with a single text, which cannot be in both "
        f"parts: {name_some(single)}"
    ]


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Returns (training rows, held-out rows), in an order that does not depend on the order of `rows`.

    Copies of a text are all kept, in the same part. About `share` of each label's rows is held out, and at least one
    text. A text with several labels is trained on and never held out, because any answer is wrong for one of them.

    Args:
        rows: (text, label), with at least two different texts per label.
        share: share of each label's rows to hold out, between 0 and 1.
        seed: seed of the choice and the order.

    Raises:
        MELoRAError: if all texts of a label have other labels too.
    """
    ambiguous = ambiguous_keys(rows)
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for text, label in sorted(rows):
        groups[label][text_key(text)].append((text, label))
    if whole := [label for label, by_key in groups.items() if by_key.keys() <= ambiguous]:
        raise MELoRAError(f"no text can be held out for {name_some(sorted(whole))}: all have other labels too")
    train: list[Row] = []
    held_out: list[Row] = []
    for label in sorted(groups):
        chosen = _choose({key: len(found) for key, found in groups[label].items()}, ambiguous, share, f"{seed} {label}")
        order = sorted(groups[label])
        random.Random(f"{seed} {label} order").shuffle(order)
        for key in order:
            (held_out if key in chosen else train).extend(groups[label][key])
    return train, held_out


def _choose(sizes: dict[str, int], ambiguous: set[str], share: float, seed: str) -> set[str]:
    """Returns the held-out keys of one label: as many rows as fit into the share, or else the text with fewest rows."""
    num_rows = sum(sizes.values())
    quota = min(max(1, round(share * num_rows)), num_rows - 1)
    keys = sorted(sizes.keys() - ambiguous)
    random.Random(seed).shuffle(keys)
    chosen: set[str] = set()
    taken = 0
    for key in keys:
        if taken + sizes[key] <= quota:
            chosen.add(key)
            taken += sizes[key]
    return chosen or {min(keys, key=lambda key: sizes[key])}
