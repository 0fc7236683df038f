"""Writes files and folders aside, under a lock, and renames them; failures to write become errors with the path."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .errors import MELoRAError

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed runs are not removed there
    fcntl = None  # type: ignore[assignment]


def output_path(place: str | os.PathLike[str]) -> Path:
    """Returns the place to write as a path.

    Raises:
        ValueError: if `place` is "", which would be the working directory.
    """
    if not os.fspath(place):
        raise ValueError("the place to write is '': name a file or folder")
    return Path(place)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns failures to write in the block, such as a full disk, into a MELoRAError that names `path`."""
    if "\0" in str(path):
        raise MELoRAError(f"{str(path)!r} cannot be written: it is not a valid file name")
    try:
        yield
    except OSError as error:
        raise MELoRAError(f"`{path}` cannot be written: {error.strerror or error}") from error


def lies_in(path: Path, folder: Path) -> bool:
    """Returns whether `path` is `folder` or is inside it, after links are resolved."""
    real, real_folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real_folder in (real, *real.parents)


def read_bytes(path: Path, kind: str) -> bytes:
    """Returns the content of a file in a folder that must contain it.

    Args:
        path: the file.
        kind: what the folder should be, such as "an adapter folder".

    Raises:
        MELoRAError: if the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise MELoRAError(f"`{path.parent}` is not {kind}: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error


def refuse_link(path: Path) -> None:
    """Raises MELoRAError if `path` is a link out of its folder. Links within a Hugging Face cache are allowed."""
    try:
        folder, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    caches = {parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.name == "snapshots"}
    if os.path.islink(path) and target.parent not in {folder, *caches}:
        raise MELoRAError(f"`{path}` is a link out of its folder, to `{target}`: put the file itself there")


def refuse_source(out: Path, source: Path) -> None:
    """Raises MELoRAError if `out` is the folder `source`, which is read, or is inside it."""
    with writing(out):  # the system may reject the name itself
        is_inside = lies_in(out, source)
    if is_inside:
        raise MELoRAError(f"`{out}` is the folder that is read, or in it: name another place, as `{source}` is kept")


def refuse_special(out: Path) -> None:
    """Raises MELoRAError if `out` exists and is not a file: a rename would replace a device with a file."""
    if os.path.exists(out) and not os.path.isfile(out):
        raise MELoRAError(f"`{out}` is a folder or a device, not a file: name another place")


def refuse_occupied(out: Path) -> None:
    """Raises MELoRAError if `out` exists, unless it is an empty folder. A link is refused in any case."""
    with writing(out):
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if out.is_symlink() or not is_free:
        raise MELoRAError(f"`{out}` exists already: remove it, or name another folder")


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Creates a folder and its parents. If the block raises, removes the new ones that are empty."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder on the disk of `path` and removes it afterwards, even if the block raises.

    Removes the staging folders of killed runs, too. Creates the folder of `path`, and removes it again if the block
    raises and leaves it empty.
    """
    with contextlib.ExitStack() as stack:
        with writing(path):
            stack.enter_context(made_folder(path.parent))
            staging = stack.enter_context(_staging(path))
        yield staging


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to write into, and renames it to `path` unless the block raises.

    `path` must be missing or an empty folder. Errors for failures to write in the block name `path`.
    """
    with staging_folder(path) as staging, writing(path):
        made = staging / path.name  # not the staging folder itself, which only its owner may read
        made.mkdir()
        yield made
        refuse_occupied(path)  # another run may have written it in the meantime
        os.replace(made, path)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path on the disk of `path`, flushes the file to disk, and renames it to `path`."""
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes several files of a folder like `write_atomically`, and renames them in order once all are written.

    Raises:
        MELoRAError: if a file would replace a folder or a device.
    """
    for name in writers:
        refuse_special(folder / name)
    with _staging(folder / list(writers)[-1]) as staging:
        for name, write in writers.items():
            write(staging / name)
            with open(staging / name, "rb+") as file:
                os.fsync(file.fileno())
        for name in writers:
            os.replace(staging / name, folder / name)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` during the block, so one block at a time runs, in any process; no lock if the disk has none."""
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """Does the same as `staging_folder`, in a folder that exists.

    A run locks its staging folder, and the lock ends with the process, so a folder without a lock was left by a killed
    run. Process ids would not do: they are reused, and a container on the same disk counts its own.
    """
    _remove_left(path)
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        lock = _lock(staging, wait=True)
        if staging.exists():
            break
        _unlock(lock)  # before it was locked, another run removed it as the folder of a killed run
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _unlock(lock)


def _remove_left(path: Path) -> None:
    """Removes the staging folders of killed runs, and what earlier versions left: .new folders, and files named after
    their process id.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.([a-z0-9_]{{8}}\.(tmp|new)|\d+\.tmp)")
    for left in path.parent.iterdir():
        if name.fullmatch(left.name) and (lock := _lock(left, wait=False)) is not None:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
            _unlock(lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """Locks a file or folder and returns its file descriptor; None if another has the lock, or it cannot be locked.

    Locks the folder itself, as the lock file of `filelock` would be published with the other files in the folder.
    """
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a forked process may still have the descriptor
        os.close(lock)
