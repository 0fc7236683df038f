"""Imports ONNX Runtime when it is used: both packages can be imported without it."""

import importlib
from typing import Any

import numpy as np
import torch

from melora_fx import MELoRAError

Arrays = dict[str, np.ndarray]


def import_onnxruntime() -> Any:
    """Returns the `onnxruntime` module.

    Raises:
        MELoRAError: if it is not installed; names the extras to install.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MELoRAError(
            'ONNX Runtime is not installed: pip install "melora_fx[cpu]", or "melora_fx[gpu]" for CUDA and TensorRT; '
            "never install both"
        ) from error


def as_array(value: Any) -> np.ndarray:
    """Returns an array or a tensor as an array, which shares its memory if possible."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
