"""One line on the terminal that shows how far a long job has come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def show_progress(
    title: str, total: int | None = None, *, in_bytes: bool = False, console: Any = None
) -> Iterator[Callable[..., None]]:
    """Shows a job's progress while the block runs; nothing where there is no terminal.

    Args:
        title: what the line begins with.
        total: how much there is to do; None shows the seconds so far in the place of a bar.
        in_bytes: whether `total` counts bytes.
        console: the rich `Console` to write to; None for stderr.

    Yields:
        `show(step="", advance=0)`: names the present step, and counts on by `advance`.
    """
    from rich import progress as parts  # heavy: only where a job takes long
    from rich.console import Console

    console = console or Console(stderr=True)
    text = parts.TextColumn("{task.description}", markup=False)
    columns: tuple[parts.ProgressColumn, ...]
    if total is None:
        columns = (parts.SpinnerColumn(), text, parts.TimeElapsedColumn())
    elif in_bytes:
        size = (parts.DownloadColumn(), parts.TransferSpeedColumn())
        columns = (text, parts.BarColumn(), *size, parts.TimeRemainingColumn())
    else:
        columns = (text, parts.BarColumn(), parts.MofNCompleteColumn(), parts.TimeRemainingColumn())
    with parts.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)

        def show(step: str = "", advance: int = 0) -> None:
            progress.update(task, advance=advance, description=f"{title}: {step}" if step else None)

        yield show
