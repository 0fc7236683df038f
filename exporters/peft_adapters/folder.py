"""Reads the two files of a PEFT adapter folder, and checks them before anything is used."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melora_fx import MELoRAError
from melora_fx.files import read_bytes, refuse_link
from melora_fx.saving.header import parse_json
from melora_fx.saving.tensor_file import read_tensors
from melora_fx.saving.well_formed import FLOATS, non_finite_names

from .names import CONFIG_FILE, PICKLE_FILE, TENSORS_FILE

_KIND = "an adapter folder of PEFT"


@dataclass(frozen=True)
class PeftFolder:
    """The contents of a folder.

    Attributes:
        directory: the folder, for error texts.
        config: its configuration.
        tensors: its tensors by key, sorted.
        metadata: the metadata of the tensors' file.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_folder(directory: Path) -> PeftFolder:
    """Returns the contents of a PEFT adapter folder; a pickle is read without running the code in it.

    Raises:
        MELoRAError: if a file is missing, is a link out of the folder, or cannot be read; if a tensor is not made of
            numbers, has a dtype in which adapters are not trained, or contains NaN or infinity. The text names the
            file or tensor.
    """
    _name_sub_folders(directory)
    config = _read_config(directory)
    path = directory / TENSORS_FILE
    if os.path.lexists(path) or not os.path.exists(directory / PICKLE_FILE):
        refuse_link(path)
        tensors, metadata = read_tensors(path, _KIND)
    else:
        tensors, metadata = _read_pickle(directory / PICKLE_FILE), {}
    for key, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise MELoRAError(f"`{key}` in `{directory}` is {tensor.dtype}, in which adapters are not trained")
        if not isinstance(tensor, torch.Tensor) or tensor.is_complex() or not _is_stored_whole(tensor):
            raise MELoRAError(f"`{key}` in `{directory}` is not a tensor of numbers")
    if wrong := non_finite_names(tensors):
        raise MELoRAError(f"`{directory}` holds NaN or infinity in {', '.join(map(repr, wrong[:5]))}")
    return PeftFolder(directory, config, tensors, metadata)


def _is_stored_whole(tensor: torch.Tensor) -> bool:
    """Returns whether memory has room for each value: a view in a pickle may repeat a few values endlessly."""
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return is_plain and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _name_sub_folders(directory: Path) -> None:
    """Raises MELoRAError for a folder of adapter folders, which PEFT writes for a model with several adapters."""
    if os.path.isdir(directory) and not os.path.exists(directory / CONFIG_FILE):
        found = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
        if found:
            raise MELoRAError(f"`{directory}` contains adapters in subfolders: name one of {', '.join(found)}")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    refuse_link(path)
    try:
        config = parse_json(read_bytes(path, _KIND).decode())
    except ValueError as error:
        raise MELoRAError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise MELoRAError(f"`{path}` must contain a JSON object")
    return config


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    refuse_link(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MELoRAError(
            f"`{path}` contains more than tensors, and its code is not run: load it with PEFT and save it "
            "as safetensors"
        ) from error
    except Exception as error:  # a damaged file raises many kinds of errors
        raise MELoRAError(f"`{path}` cannot be read, it is truncated or corrupt: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise MELoRAError(f"`{path}` does not contain tensors by name")
    return dict(sorted(tensors.items()))
