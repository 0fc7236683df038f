"""Copies of large files in which some stretches change on the way: about as fast as a copy, in the memory of a few of
those stretches.

The system copies what stays, file to file. What changes is read and changed by one thread and written by another.
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
"""What `sendfile` says where it does not take files: on macOS, and on some file systems."""
_BUFFERS = 3
_WRITE_BYTES = 1 << 20
"""Of one write: with megabytes at once the system looks for memory in one piece, which can take seconds."""


@dataclass(frozen=True)
class Stretch:
    """Bytes `start` to `stop` of a file; `change`, where given, edits them in place on the way."""

    source: Path
    start: int
    stop: int
    change: Callable[[memoryview], None] | None = None


def write_edited(targets: Mapping[Path, Sequence[Stretch | bytes]], advance: Callable[[int], object]) -> None:
    """Writes new files of stretches of others and of given bytes, one after the other.

    Args:
        targets: the files, ones that are there are replaced, and what they consist of.
        advance: called with the number of bytes written, as they are.

    Raises:
        OSError: where something cannot be read or written.
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
    """Does things in their order in another thread."""

    def __init__(self, thread: ThreadPoolExecutor):
        self._thread = thread
        self._tasks = deque[tuple[Future[None], memoryview | None]]()

    def do(self, function: Callable[..., None], *args: Any, buffer: memoryview | None = None) -> None:
        """Does `function(*args)` after all that was asked for before; it reads from `buffer`."""
        self._tasks.append((self._thread.submit(function, *args), buffer))

    def wait_for(self, buffer: memoryview) -> None:
        """Returns when nothing reads from `buffer` any more; raises what has gone wrong until then."""
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
    """Copies in the system where it can, without a detour through this process."""
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
    with open(stretch.source, "rb", buffering=0) as own:  # the other thread reads from `source`
        buffer = memoryview(bytearray(min(_COPY_BYTES, stretch.stop - position)))
        while position < stretch.stop:
            part = Stretch(stretch.source, position, min(position + len(buffer), stretch.stop))
            _write(out, _read(own, part, buffer), advance)
            position = part.stop
