"""What a training prints."""

from rich.console import Console
from rich.markup import escape

from .texts import Texts

console = Console()


def print_texts(texts: Texts) -> None:
    console.print(
        f"[bold]data[/]: {len(texts.train)} training and {len(texts.held_out)} held-out texts, "
        f"{len(texts.labels)} labels: {escape(', '.join(texts.labels))}"
    )
    for note in texts.notes:
        console.print(f"[bold]note[/]: {escape(note)}")
