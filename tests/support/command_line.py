"""Runs the command line in this process."""

import contextlib
import io
import sys
from dataclasses import dataclass

from exporters.cli.commands import main


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Result:
    """Runs the command line in this process, because importing torch for each command would take most of the time."""
    out = io.StringIO()
    err = io.StringIO()
    argv = sys.argv
    sys.argv = ["melora-fx", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exit:
        return Result(int(exit.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
    return Result(0, out.getvalue(), err.getvalue())
