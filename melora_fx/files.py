"""Where files are made and how failures to write are told: aside, under a lock, and named."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import MELoRAError

try:
    import fcntl
except ImportError:  # Windows: what killed runs leave is not removed there
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures to write in the block, such as a full disk, are errors that name `path`."""
    try:
        yield
    except OSError as error:
        raise MELoRAError(f"`{path}` cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `path`, removed in any case; so are those that killed runs have left.

    A run locks its folder, and the lock ends with the process: what is locked belongs to one that runs.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
        lock = _lock(fresh)
        staging = fresh.rename(fresh.with_suffix(".tmp"))  # under this name only once it is locked
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` at the end of a block that raises nothing.

    `path` must be empty, or not there. Failures to write in the block name it.
    """
    with staging_folder(path) as staging, writing(path):
        made = staging / path.name  # not the staging folder itself, which only its owner may read
        made.mkdir()
        yield made
        os.replace(made, path)


def _lock(folder: Path) -> int | None:
    """A file descriptor that locks the folder until it is closed; None where another has, or it cannot be locked.

    The folder itself is locked: a file for filelock would be published with all else that lies in it.
    """
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, flushes it to the disk, and renames it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
