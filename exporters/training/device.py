"""What a training runs on."""

import torch
from torch import nn

from melora_fx import MELoRAError

AUTO = "auto"


def find_device(name: str) -> torch.device:
    """The device of this name; CUDA for "auto", where there is any, else the CPU.

    Raises:
        ValueError: for a name that torch does not know.
        MELoRAError: for CUDA where torch finds none.
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
            "may be a build for the CPU alone"
        )
    return device


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next(model.parameters()).device
