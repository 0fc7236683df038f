"""Kills a process before each of its changes to files, in turn."""

import itertools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
"""Python's audit events of changes; `os.replace` and `Path.unlink` have those of `os.rename` and `os.remove`."""


def killed_at_each_change(run: Callable[[], object]) -> Iterator[int]:
    """Calls `run` in a forked process that is killed before its first change to files, in one that is killed before its
    second, etc. Yields the index of the change each time, until a process runs to its end.
    """
    for number in itertools.count():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about a fork with other threads, which are idle here
            child = os.fork()
        if child == 0:
            _run_and_kill(run, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            assert code == 0, "the error is on stderr"
            return
        yield number


def _run_and_kill(run: Callable[[], object], number: int) -> None:
    changes = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event in _CHANGES or (event == "open" and _writes(*arguments))) and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _writes(path: Any, mode: str | None, flags: int) -> bool:
    return path != os.devnull and bool(flags & (os.O_WRONLY | os.O_RDWR))
