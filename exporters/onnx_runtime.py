"""ONNX Runtime, imported where it is used: neither package needs it to be imported."""

import importlib
from typing import Any

import numpy as np
import torch

from melora_fx import MELoRAError

Arrays = dict[str, np.ndarray]


def import_onnxruntime() -> Any:
    """The `onnxruntime` module.

    Raises:
        MELoRAError: where it is not installed; names the extras.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MELoRAError(
            'ONNX Runtime is not installed: pip install "melora_fx[cpu]", or "melora_fx[gpu]" for CUDA and TensorRT; '
            "never both"
        ) from error


def as_array(value: Any) -> np.ndarray:
    """An array or a tensor as an array, in the same memory where it can be."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
