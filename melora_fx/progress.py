"""Shows the progress of a long job in one line on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def show_progress(
    title: str, total: int | None = None, *, in_bytes: bool = False, console: Any = None
) -> Iterator[Callable[..., None]]:
    """Shows a job's progress while the block runs; shows nothing if there is no terminal.

    Args:
        title: the beginning of the line.
        total: the amount of work; None shows the elapsed time instead of a bar.
        in_bytes: whether `total` counts bytes.
        console: the rich `Console` to write to; None for stderr.

    Yields:
        `show(step="", advance=0)`: names the current step, and advances the count by `advance`.
    """
    from rich import progress as parts  # slow to import, so only for long jobs
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
