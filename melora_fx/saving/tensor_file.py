"""Writes safetensors files without safetensors' `save_file`, so that equal content always has equal bytes.

A file consists of the header's length in 8 bytes, the header in JSON, padded with spaces to a multiple of 8, and the
tensors' bytes one after another. `save_file` writes metadata in the order of a hash map, which is random.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from melora_fx.errors import MELoRAError
from melora_fx.files import read_bytes

METADATA = "__metadata__"
"""The key of the metadata in a header: strings by name."""


@dataclass(frozen=True)
class Entry:
    """What a header says about a tensor, except its position; `size` is in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file. Metadata is sorted by name, tensors by dtype, widest first, which aligns all of them,
    and then by name.

    Raises:
        OSError: if the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    serialised = {name: serialise(tensors[name]) for name in names}
    entries = {name: entry for name, (entry, _) in serialised.items()}
    with path.open("wb") as file:
        file.write(make_header(entries, dict(sorted(metadata.items()))))
        for _, data in serialised.values():
            file.write(data)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns copies of the tensors of a file, in the order of their names, and the file's metadata.

    Args:
        path: the file.
        kind: as in `read_bytes`.

    Raises:
        MELoRAError: if the file is missing, truncated or corrupt, or cannot be read.
    """
    data = read_bytes(path, kind)
    try:
        tensors = load(data)  # checks their positions in the file, and copies them in a random order
        length = int.from_bytes(data[:8], "little")
        return dict(sorted(tensors.items())), dict(json.loads(data[8 : 8 + length]).get(METADATA) or {})
    except Exception as error:  # safetensors and torch raise many kinds
        raise MELoRAError(f"`{path}` cannot be read, it is truncated or corrupt: {error}") from error


def serialise(tensor: torch.Tensor) -> tuple[Entry, bytes]:
    """Returns the entry of a tensor in a header, and the tensor's bytes."""
    file = save({"tensor": tensor.contiguous()})
    length = int.from_bytes(file[:8], "little")
    entry = json.loads(file[8 : 8 + length])["tensor"]
    data = file[8 + length :]
    return Entry(entry["dtype"], tuple(entry["shape"]), len(data)), data


def make_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Returns the length and the header of a safetensors file whose tensors are stored one after another."""
    header: dict[str, Any] = {METADATA: dict(metadata)}
    offset = 0
    for key, entry in entries.items():
        header[key] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (offset, offset + entry.size),
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
