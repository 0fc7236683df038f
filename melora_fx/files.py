"""Where files are made and how failures to write are told: aside, under a lock, and named."""

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
except ImportError:  # Windows: what killed runs leave is not removed there
    fcntl = None  # type: ignore[assignment]


def output_path(place: str | os.PathLike[str]) -> Path:
    """What is to be written, as a path.

    Raises:
        ValueError: for "", which would be the working directory.
    """
    if not os.fspath(place):
        raise ValueError("the place to write is '': name a file or folder")
    return Path(place)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures to write in the block, such as a full disk, are errors that name `path`."""
    if "\0" in str(path):
        raise MELoRAError(f"{str(path)!r} cannot be written: it is no name of a file")
    try:
        yield
    except OSError as error:
        raise MELoRAError(f"`{path}` cannot be written: {error.strerror or error}") from error


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder itself, or leads into it, through links too."""
    real, real_folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real_folder in (real, *real.parents)


def read_bytes(path: Path, kind: str) -> bytes:
    """The content of a file in a folder that must have it.

    Args:
        path: the file.
        kind: what the folder is to be, "an adapter folder".

    Raises:
        MELoRAError: where it is missing, or cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise MELoRAError(f"`{path.parent}` is not {kind}: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error


def refuse_link(path: Path) -> None:
    """Raises MELoRAError for a link that leaves its folder, but for those that a Hugging Face cache is made of."""
    try:
        folder, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    caches = {parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.name == "snapshots"}
    if os.path.islink(path) and target.parent not in {folder, *caches}:
        raise MELoRAError(f"`{path}` is a link out of its folder, to `{target}`: put the file itself there")


def refuse_source(out: Path, source: Path) -> None:
    """Raises MELoRAError where `out` is the folder `source`, which is read, or lies in it."""
    with writing(out):  # the system may refuse the very name
        is_inside = lies_in(out, source)
    if is_inside:
        raise MELoRAError(f"`{out}` is the folder that is read, or in it: name another place, for `{source}` is kept")


def refuse_special(out: Path) -> None:
    """Raises MELoRAError where `out` is there and no file: a rename would put one into the place of a device."""
    if os.path.exists(out) and not os.path.isfile(out):
        raise MELoRAError(f"`{out}` is a folder or a device, and no file: name another place")


def refuse_occupied(out: Path) -> None:
    """Raises MELoRAError where `out` is there, unless it is an empty folder."""
    with writing(out):
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if out.is_symlink() or not is_free:
        raise MELoRAError(f"`{out}` exists already: remove it, or name another folder")


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Makes a folder and those above it; after a block that raises, the new ones are gone if they are empty."""
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
    """A temporary folder on the disk of `path`, removed in any case; so are those that killed runs have left.

    The folder of `path` is made; after a block that raises it is gone again if it is empty.
    """
    with contextlib.ExitStack() as stack:
        with writing(path):
            stack.enter_context(made_folder(path.parent))
            staging = stack.enter_context(_staging(path))
        yield staging


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` at the end of a block that raises nothing.

    `path` must be empty, or not there. Failures to write in the block name it.
    """
    with staging_folder(path) as staging, writing(path):
        made = staging / path.name  # not the staging folder itself, which only its owner may read
        made.mkdir()
        yield made
        refuse_occupied(path)  # by another run, since the first look
        os.replace(made, path)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path on the disk of `path`, flushes the file to the disk, and renames it."""
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """`write_atomically` for several files of a folder: they are renamed in their order when all are written.

    Raises:
        MELoRAError: where one would take the place of a folder or a device.
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
    """One block at a time of all that lock this folder, in any process; no lock where the disk has none."""
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """`staging_folder`, in a folder that is there.

    A run locks its staging folder, and the lock ends with the process: what is not locked was left by a killed one.
    Process ids would not do: they are used again, and are others in a container on the same disk.
    """
    _remove_left(path)
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        lock = _lock(staging, wait=True)
        if staging.exists():
            break
        _unlock(lock)  # another run took it for a killed one's, before it was locked
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _unlock(lock)


def _remove_left(path: Path) -> None:
    """Removes the staging folders of killed runs; earlier versions had .new too, and files with their process id."""
    name = re.compile(rf"\.{re.escape(path.name)}\.([a-z0-9_]{{8}}\.(tmp|new)|\d+\.tmp)")
    for left in path.parent.iterdir():
        if name.fullmatch(left.name) and (lock := _lock(left, wait=False)) is not None:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
            _unlock(lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """A file descriptor that locks a file or folder; None where another has the lock, or it cannot be locked.

    The folder itself is locked: a file for filelock would be published with all else that lies in it.
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
