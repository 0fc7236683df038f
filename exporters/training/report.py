"""The output of a training on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from melora_fx.names import first_of

from .texts import Texts

console = Console()
_SHOWN_LABELS = 20
_SHOWN_CHARACTERS = 40


def print_texts(texts: Texts) -> None:
    console.print(
        f"[bold]data[/]: {len(texts.train)} training and {len(texts.held_out)} held-out texts, "
        f"{len(texts.labels)} labels: {escape(_named(texts.labels))}"
    )
    for note in texts.notes:
        console.print(f"[bold]note[/]: {escape(note)}")


def _named(labels: Sequence[str]) -> str:
    """Lists the labels: long labels and long lists are cut, characters that a terminal would act on are escaped."""
    shown = [label if label.isprintable() else repr(label) for label in labels]
    shown = [label if len(label) <= _SHOWN_CHARACTERS else f"{label[:_SHOWN_CHARACTERS]}…" for label in shown]
    return first_of(shown, _SHOWN_LABELS)
