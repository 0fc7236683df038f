"""Finds the device of a training."""

import torch
from torch import nn

from melora_fx import MELoRAError

AUTO = "auto"


def find_device(name: str) -> torch.device:
    """Returns the device of this name; for "auto", CUDA if available, else the CPU.

    Raises:
        ValueError: if torch does not know the name.
        MELoRAError: if torch does not find this CUDA device.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` (={name!r}) must be auto, cpu, cuda, or another device of torch") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MELoRAError(
            f"`device` (={name!r}): torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices, and "
            "may be a build for the CPU only"
        )
    return device


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of a model's first parameter."""
    return next(model.parameters()).device
