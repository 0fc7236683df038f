"""Safetensors files written by ourselves, so that the same content always gives the same bytes.

A file is 8 bytes of the header's length, the header in JSON, padded with spaces to a multiple of 8, and the tensors'
bytes one after the other. safetensors' own `save_file` writes metadata in the order of a hash map, which is random.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

METADATA = "__metadata__"
"""Key in a header of the metadata: strings by name."""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor, but for its place: `size` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file: metadata by name; tensors widest dtype first, which aligns all, and then by name.

    Raises:
        OSError: where the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    serialised = {name: serialise(tensors[name]) for name in names}
    entries = {name: entry for name, (entry, _) in serialised.items()}
    with path.open("wb") as file:
        file.write(make_header(entries, dict(sorted(metadata.items()))))
        for _, data in serialised.values():
            file.write(data)


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata in the bytes of a safetensors file, whose form safetensors has checked."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get(METADATA) or {})


def serialise(tensor: torch.Tensor) -> tuple[Entry, bytes]:
    """A tensor's entry in a header, and its bytes."""
    file = save({"tensor": tensor.contiguous()})
    length = int.from_bytes(file[:8], "little")
    entry = json.loads(file[8 : 8 + length])["tensor"]
    data = file[8 + length :]
    return Entry(entry["dtype"], tuple(entry["shape"]), len(data)), data


def make_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file whose tensors lie one after the other."""
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
