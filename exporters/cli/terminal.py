"""Controls what reaches the terminal: one message per error, one line per warning, no log record below ERROR."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator

from melora_fx.errors import MELoRAError


@contextlib.contextmanager
def tidy_terminal() -> Iterator[None]:
    """Ends the program with status 1 and a message on stderr, without a traceback, if the block raises an error.

    Inside the block, warnings are printed without file and source line, and log records below ERROR are dropped.
    """
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except Exception as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        logging.disable(logged)


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ends the program with status 1, and no message from Python, if the reader of its output (`head`) has gone."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's flush at exit
            sys.exit(1)


def hide_loading_bars() -> None:
    """Switches off the bars that transformers shows while it loads weights; imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _message(error: Exception) -> str:
    """Returns the text of an error that the user can fix; for any other error its type, its first line, and a hint."""
    if isinstance(error, MELoRAError) or (isinstance(error, ValueError | TypeError) and _is_raised_by_us(error)):
        return str(error)
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line or 'no message'} (`melora-fx --debug COMMAND …` shows the traceback)"


def _is_raised_by_us(error: Exception) -> bool:
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("melora_fx", "exporters")
