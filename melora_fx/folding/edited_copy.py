"""Copies large files and changes some byte ranges on the way, about as fast as a plain copy, and in the memory of a few
of those ranges.

The operating system copies unchanged ranges from file to file. One thread reads and changes the others, and another
thread writes them.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COPY_BYTES = 1 << 24
_NO_SENDFILE = (errno.ENOTSOCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of `sendfile` if it does not accept files, as on macOS and on some file systems."""
_BUFFERS = 3
_WRITE_BYTES = 1 << 20
"""Bytes of one write: for megabytes at once the system looks for contiguous memory, which can take seconds."""


@dataclass(frozen=True)
class Stretch:
    """The byte range `start` to `stop` of a file; `change`, if given, edits the bytes in place on the way."""

    source: Path
    start: int
    stop: int
    change: Callable[[memoryview], None] | None = None


def write_edited(targets: Mapping[Path, Sequence[Stretch | bytes]], advance: Callable[[int], object]) -> None:
    """Writes new files that consist of byte ranges of other files and of given bytes.

    Args:
        targets: each file to write, and its pieces in order. Existing files are replaced.
        advance: called with the number of bytes after each write.

    Raises:
        OSError: if something cannot be read or written.
    """
    everything = [piece for pieces in targets.values() for piece in pieces if isinstance(piece, Stretch)]
    largest = max((piece.stop - piece.start for piece in everything if piece.change), default=0)
    buffers = deque(memoryview(bytearray(largest)) for _ in range(_BUFFERS))
    with ExitStack() as stack:
        behind = _WriteBehind(stack.enter_context(ThreadPoolExecutor(max_workers=1)))
        sources = {path: stack.enter_context(open(path, "rb", buffering=0)) for path in {p.source for p in everything}}
        for target, pieces in targets.items():
            out = stack.enter_context(open(target, "wb", buffering=0))
            for piece in pieces:
                if isinstance(piece, bytes):
                    behind.do(_write, out, memoryview(piece), advance)
                elif piece.change is None:
                    behind.do(_copy, sources[piece.source], piece, out, advance)
                else:
                    behind.wait_for(buffers[0])
                    data = _read(sources[piece.source], piece, buffers[0])
                    piece.change(data)
                    behind.do(_write, out, data, advance, buffer=buffers[0])
                    buffers.rotate(-1)
        behind.wait_for_all()


class _WriteBehind:
    """Runs tasks in order in another thread."""

    def __init__(self, thread: ThreadPoolExecutor):
        self._thread = thread
        self._tasks = deque[tuple[Future[None], memoryview | None]]()

    def do(self, function: Callable[..., None], *args: Any, buffer: memoryview | None = None) -> None:
        """Schedules `function(*args)`, which reads from `buffer`, after all earlier tasks."""
        self._tasks.append((self._thread.submit(function, *args), buffer))

    def wait_for(self, buffer: memoryview) -> None:
        """Waits until no task reads from `buffer`; raises the error of a task that has failed by then."""
        while any(used is buffer for _, used in self._tasks) or (self._tasks and self._tasks[0][0].done()):
            self._tasks.popleft()[0].result()

    def wait_for_all(self) -> None:
        while self._tasks:
            self._tasks.popleft()[0].result()


def _read(source: Any, stretch: Stretch, buffer: memoryview) -> memoryview:
    data = buffer[: stretch.stop - stretch.start]
    source.seek(stretch.start)
    done = 0
    while done < len(data):
        count = source.readinto(data[done:])
        if not count:
            raise OSError(f"{stretch.source} ends early")
        done += count
    return data


def _write(out: Any, data: memoryview, advance: Callable[[int], object]) -> None:
    done = 0
    while done < len(data):
        done += out.write(data[done : done + _WRITE_BYTES])
    advance(len(data))


def _copy(source: Any, stretch: Stretch, out: Any, advance: Callable[[int], object]) -> None:
    """Copies inside the operating system if it can, without a detour through this process."""
    position = stretch.start
    if hasattr(os, "sendfile"):
        try:
            while position < stretch.stop:
                count = os.sendfile(out.fileno(), source.fileno(), position, min(_COPY_BYTES, stretch.stop - position))
                if not count:
                    raise OSError(f"{stretch.source} ends early")
                advance(count)
                position += count
        except OSError as error:
            if error.errno not in _NO_SENDFILE:
                raise
    with open(stretch.source, "rb", buffering=0) as own:  # not `source`, since the other thread reads from it
        buffer = memoryview(bytearray(min(_COPY_BYTES, stretch.stop - position)))
        while position < stretch.stop:
            part = Stretch(stretch.source, position, min(position + len(buffer), stretch.stop))
            _write(out, _read(own, part, buffer), advance)
            position = part.stop
