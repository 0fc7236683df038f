"""Hugging Face checkpoints on disk: finds the safetensors file and the byte range of each tensor.

Only headers are read; `saving/tensor_file.py` describes the layout of a file.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from melora_fx.errors import MELoRAError
from melora_fx.saving.fingerprint import sampled_positions
from melora_fx.saving.tensor_file import METADATA

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
FOLDED_KEY = "melora"
"""The key in the metadata of a folded safetensors file: JSON that says which adapter it contains."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights that can be folded, by their names in safetensors headers."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: bytes `start` to `stop` of `file`; `dtype` is the name in safetensors."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def fingerprint(self) -> dict[str, Any]:
        """Returns the fingerprint as `saving.fingerprint.fingerprint` does; reads only the sampled values."""
        dtype = DTYPES[self.dtype]
        data = bytearray()
        with self.file.open("rb", buffering=0) as file:
            for position in sampled_positions(math.prod(self.shape)).tolist():
                file.seek(self.start + position * dtype.itemsize)
                data += file.read(dtype.itemsize)
        values = torch.frombuffer(data, dtype=dtype).tolist()
        return {"shape": list(self.shape), "dtype": str(dtype).removeprefix("torch."), "values": values}

    def view(self, data: memoryview) -> torch.Tensor:
        """Returns the tensor whose bytes are `data`; it shares memory with `data`."""
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        directory: the folder.
        files: the weight files: name → metadata in the file's header.
        tensors: all tensors by key, file by file in the order of their bytes.
        index: the index of a sharded checkpoint; None if there is a single file.
        config: the content of config.json; None if it is missing.
    """

    directory: Path
    files: dict[str, dict[str, str]]
    tensors: dict[str, StoredTensor]
    index: dict[str, Any] | None
    config: dict[str, Any] | None


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads the headers of the checkpoint in a folder.

    Raises:
        MELoRAError: if the folder has no safetensors weights, or a file is missing, truncated or corrupt.
    """
    if not os.path.isdir(directory):
        raise MELoRAError(f"`{directory}` is not a folder: name that of a model")
    index = None
    if os.path.isfile(directory / SINGLE_FILE):
        names = [SINGLE_FILE]
    elif os.path.isfile(directory / INDEX_FILE):
        index = _read_json(directory / INDEX_FILE)
        names = _file_names(directory / INDEX_FILE, index)
        if missing := [name for name in names if not os.path.isfile(directory / name)]:
            raise MELoRAError(f"`{directory}` lacks {', '.join(map(repr, missing))}, which its index names")
    else:
        raise MELoRAError(
            f"`{directory}` has neither {SINGLE_FILE} nor {INDEX_FILE}: load the model and `save_pretrained` it, which "
            "writes safetensors"
        )
    files: dict[str, dict[str, str]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        files[name], stored = _read_header(directory / name)
        tensors |= stored
    if index and (lost := sorted(index["weight_map"].keys() - tensors.keys())):
        raise MELoRAError(f"`{directory / INDEX_FILE}` names {', '.join(map(repr, lost))}, which no file has")
    config = _read_json(directory / CONFIG_FILE) if os.path.isfile(directory / CONFIG_FILE) else None
    return Checkpoint(directory, files, tensors, index, config)


def _file_names(path: Path, index: dict[str, Any]) -> list[str]:
    """Returns the files that an index names, all of them in its own folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata", {}), dict):
        raise MELoRAError(f"`{path}` is not an index of safetensors files: it needs a `weight_map` (tensor → file)")
    wrong = [name for name in weight_map.values() if not isinstance(name, str) or not name or Path(name).name != name]
    if wrong:
        raise MELoRAError(f"`{path}` names {wrong[0]!r}, which is not a file in its own folder")
    return sorted(set(weight_map.values()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise MELoRAError(f"`{path}` cannot be read: it does not contain a JSON object")
    return content


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Returns a file's metadata, and its tensors in the order of their bytes."""
    try:
        with path.open("rb") as file, safe_open(path, framework="pt"):  # `safe_open` checks the header and the length
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise MELoRAError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read, it is truncated or corrupt: {error}") from error
    metadata = header.pop(METADATA, {})
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[key] = StoredTensor(key, path, entry["dtype"], tuple(entry["shape"]), start, stop)
    return metadata, tensors
