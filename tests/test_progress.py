"""The line on the terminal."""

import io

import pytest
from rich.console import Console

from melora_fx.progress import show_progress


@pytest.mark.parametrize(
    ("options", "text"),
    [({}, "fold a[1]: copying 0:00:0"), ({"total": 4}, " 3/4 "), ({"total": 4, "in_bytes": True}, " 3/4 bytes")],
    ids=["no_total", "count", "bytes"],
)
def test_a_step_and_how_much_is_done(options: dict[str, int], text: str) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=100)
    with show_progress("fold a[1]", **options, console=console) as show:
        show("copying", advance=1)
        show(advance=2)
    assert "fold a[1]: copying" in screen.getvalue()
    assert text in screen.getvalue()


def test_nothing_where_there_is_no_terminal() -> None:
    screen = io.StringIO()
    with show_progress("fold", 2, console=Console(file=screen)) as show:
        show("copying", advance=2)
    assert screen.getvalue() == ""
