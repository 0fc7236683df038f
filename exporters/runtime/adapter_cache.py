"""Keeps the adapters that a runner has read, by path, and notices if their files have changed."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from melora_fx import MELoRAError
from melora_fx.saving.adapter_file import TENSORS_FILE

_Adapter = TypeVar("_Adapter")

_Version = tuple[int, ...]
"""(inode, size in bytes, modification time and change time in ns) of a file: differs after it is written again."""


@dataclass(frozen=True)
class _Entry(Generic[_Adapter]):
    """An adapter, the file that it was read from, and the version of the file just before."""

    adapter: _Adapter
    file: Path
    version: _Version | None


class AdapterCache(Generic[_Adapter]):
    """Adapters by path; several threads may call `get` at once.

    Args:
        max_adapters: number of adapters to keep. One more replaces the least recently used one; a run that already has
            the replaced one keeps it to its end.

    Raises:
        ValueError: if `max_adapters` is not a positive integer.
    """

    def __init__(self, max_adapters: int) -> None:
        if not isinstance(max_adapters, int) or max_adapters < 1:
            raise ValueError(f"`max_adapters` (={max_adapters!r}) must be a positive integer")
        self._max_adapters = max_adapters
        self._entries: OrderedDict[str, _Entry[_Adapter]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str | os.PathLike[str], read: Callable[[Path], _Adapter]) -> _Adapter:
        """Returns the adapter at `path` as its file is now, or as it was read before if the file is gone.

        Args:
            path: a folder, or an .onnx_adapter file. A kept adapter costs one `stat` of its file.
            read: reads the adapter at a path; called if the adapter is not kept or its file has changed.

        Raises:
            MELoRAError: if there is nothing at `path` and nothing was read from there before, or the system cannot
                access it.
        """
        key = os.fspath(path)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
        if entry and _version_of(entry.file) in (entry.version, None):
            return entry.adapter
        file = _file_of(Path(key))
        version = _version_of(file)  # taken before the read, so that a write meanwhile counts as a change
        if version is None and file == Path(key):
            raise MELoRAError(f"the adapter `{key}` does not exist")
        adapter = read(Path(key))  # not under the lock, so that runs with other adapters continue
        with self._lock:
            self._entries[key] = _Entry(adapter, file, version)
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_adapters:
                self._entries.popitem(last=False)
        return adapter


def _file_of(path: Path) -> Path:
    """Returns the file that an adapter at `path` is read from."""
    try:
        return path / TENSORS_FILE if path.is_dir() else path
    except OSError:
        return path


def _version_of(file: Path) -> _Version | None:
    """Returns the version of `file`, or None if there is no such file."""
    try:
        facts = os.stat(file)
    except FileNotFoundError:
        return None
    except NotADirectoryError:  # a file has replaced its folder
        return ()
    except (OSError, ValueError) as error:  # a name that the system rejects, a folder that it does not open
        raise MELoRAError(
            f"the adapter `{file}` cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
