"""One interface for everything that computes the model: `run(inputs) -> outputs`, both dicts of NumPy arrays."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from melora_fx import MELoRAError

from .onnx_graph import named_outputs

Arrays = dict[str, np.ndarray]


class Runner(Protocol):
    """What `compare` and `measure_latency` need. `threads`: intra-operator threads, None for the default."""

    threads: int | None

    def run(self, inputs: Mapping[str, Any]) -> Arrays: ...


class TorchRunner:
    """Runs a torch module as it is, in its present mode, without gradients.

    Args:
        model: called with the inputs as keyword arguments.
        threads: number of torch's intra-operator threads during a run; None leaves torch's own.
    """

    def __init__(self, model: nn.Module, *, threads: int | None = None) -> None:
        self.model, self.threads = model, threads

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """The outputs by name, for `inputs` of arrays or tensors by name."""
        tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
        before = torch.get_num_threads()
        if self.threads is not None and self.threads != before:
            torch.set_num_threads(self.threads)
        try:
            with torch.no_grad():
                outputs = named_outputs(self.model(**tensors))
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
        return {name: output.cpu().numpy() for name, output in outputs.items()}


PROVIDERS = {"cpu": "CPUExecutionProvider"}


class OrtRunner:
    """Runs an ONNX file on ONNX Runtime.

    Args:
        path: a .onnx file; its external data lies beside it.
        provider: "cpu".
        threads: number of ONNX Runtime's intra-operator threads; None leaves its default.

    Raises:
        ValueError: for an unknown provider.
        MELoRAError: where ONNX Runtime is not installed, or cannot load the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, provider: str = "cpu", threads: int | None = None) -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"`provider` (={provider!r}) must be one of {', '.join(map(repr, PROVIDERS))}")
        ort = import_onnxruntime()
        self.path, self.provider, self.threads = Path(path), provider, threads
        if not self.path.is_file():
            raise MELoRAError(f"`{self.path}` does not exist")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = ort.InferenceSession(str(self.path), options, providers=[PROVIDERS[provider]])
        except Exception as error:  # ONNX Runtime's own exception types are private
            raise MELoRAError(f"ONNX Runtime cannot load `{self.path}`: {error}") from error
        self.input_names = [value.name for value in self.session.get_inputs()]
        self.output_names = [value.name for value in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """The outputs by name, for `inputs` of arrays or tensors by name; an input that the graph lacks is refused.

        Raises:
            MELoRAError: for a missing or unknown input, or one that ONNX Runtime refuses.
        """
        missing = [name for name in self.input_names if name not in inputs]
        unknown = [name for name in inputs if name not in self.input_names]
        if missing or unknown:
            raise MELoRAError(
                f"`{self.path}` takes the inputs {self.input_names}: missing {missing}, unknown {unknown}"
            )
        try:
            outputs = self.session.run(self.output_names, {name: np.asarray(value) for name, value in inputs.items()})
        except Exception as error:  # ONNX Runtime's own exception types are private
            raise MELoRAError(f"ONNX Runtime cannot run `{self.path}`: {error}") from error
        return dict(zip(self.output_names, outputs, strict=True))


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
