"""Adapter files with edited headers and tensors, signed again so that only the edit is an error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from melora_fx.saving.adapter import hash_file

TENSORS = "adapter.safetensors"


def header_of(folder: Path) -> dict[str, Any]:
    with safe_open(folder / TENSORS, framework="pt") as file:
        return json.loads(file.metadata()["melora"])


def write_file(folder: Path, header: Any, tensors: dict[str, torch.Tensor], *, sign: bool = True) -> None:
    """Writes an adapter file with a header and tensors; `sign` updates the header's SHA-256, if it has one."""
    if sign and isinstance(header, dict) and "sha256" in header:
        header = header | {"sha256": hash_file(header, tensors)}
    save_file(tensors, folder / TENSORS, {"format": "pt", "melora": json.dumps(header)})


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], *, sign: bool = True) -> None:
    """Rewrites the folder's file with changed tensors."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    write_file(folder, header_of(folder), tensors, sign=sign)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Rewrites the folder's file with a changed header."""
    header = header_of(folder)
    change(header)
    write_file(folder, header, load_file(folder / TENSORS), sign=sign)
