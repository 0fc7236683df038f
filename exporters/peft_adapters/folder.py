"""The two files of a PEFT adapter folder, read and looked through before anything is believed."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melora_fx import MELoRAError
from melora_fx.files import read_bytes
from melora_fx.saving.header import parse_json
from melora_fx.saving.tensor_file import read_tensors

from .names import CONFIG_FILE, PICKLE_FILE, TENSORS_FILE

_KIND = "an adapter folder of PEFT"
_BLOBS = "blobs"
"""Where a Hugging Face cache keeps the files that the folders of its snapshots link to."""


@dataclass(frozen=True)
class PeftFolder:
    """What a folder holds.

    Attributes:
        directory: the folder, for error texts.
        config: its configuration.
        tensors: by their keys, sorted.
        metadata: of the tensors' file.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_folder(directory: Path) -> PeftFolder:
    """A PEFT adapter folder; a pickle is read without running what is in it.

    Raises:
        MELoRAError: names the file that is missing, leads elsewhere, or cannot be read, and tensors of other kinds
            than numbers, or with NaN or infinity.
    """
    config = _read_config(directory)
    path = directory / TENSORS_FILE
    if path.exists() or path.is_symlink() or not (directory / PICKLE_FILE).exists():
        _refuse_link(path)
        tensors, metadata = read_tensors(path, _KIND)
    else:
        tensors, metadata = _read_pickle(directory / PICKLE_FILE), {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_complex() or tensor.layout != torch.strided:
            raise MELoRAError(f"`{key}` in `{directory}` is not a tensor of numbers")
        if not torch.isfinite(tensor.float()).all():
            raise MELoRAError(f"`{key}` in `{directory}` holds NaN or infinity")
    return PeftFolder(directory, config, tensors, metadata)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    _refuse_link(path)
    try:
        config = parse_json(read_bytes(path, _KIND).decode())
    except (UnicodeDecodeError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise MELoRAError(f"`{path}` must hold a JSON object")
    return config


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    _refuse_link(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MELoRAError(
            f"`{path}` holds more than tensors, and is not run: load it with PEFT and save it as safetensors"
        ) from error
    except Exception as error:  # a damaged file raises many kinds
        raise MELoRAError(f"`{path}` cannot be read, it is truncated or corrupt: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise MELoRAError(f"`{path}` does not hold tensors by name")
    return dict(sorted(tensors.items()))


def _refuse_link(path: Path) -> None:
    """Raises MELoRAError for a link that leaves its folder, but for those of a Hugging Face cache."""
    try:
        folder, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    caches = {parent / _BLOBS for parent in folder.parents[:2]}
    if path.is_symlink() and target.parent not in {folder, *caches}:
        raise MELoRAError(f"`{path}` is a link out of its folder, to `{target}`: put the file itself there")
