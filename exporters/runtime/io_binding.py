"""Runs with inputs and outputs that are bound to a device's memory, so that ONNX Runtime copies nothing by itself.

In such runs ONNX Runtime silently ignores active adapters (`RunOptions.add_active_adapter`): bind the adapter's tensors
as inputs, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporters.onnx_runtime import Arrays, as_array, import_onnxruntime
from melora_fx import MELoRAError

Values = Mapping[str, Any]
"""`onnxruntime.OrtValue`s by name."""


def to_device(arrays: Mapping[str, Any], device: str, device_id: int) -> dict[str, Any]:
    """Returns arrays or tensors as `onnxruntime.OrtValue`s on the device; on the CPU they share the arrays' memory."""
    ort = import_onnxruntime()
    return {
        name: ort.OrtValue.ortvalue_from_numpy(np.asarray(as_array(value), order="C"), device, device_id)
        for name, value in arrays.items()
    }


def run_bound(session: Any, values: Values, output_names: Sequence[str], device: str, device_id: int) -> dict[str, Any]:
    """Runs on inputs on the device; the outputs stay there. Each call has its own binding: threads share nothing."""
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in output_names:
        binding.bind_output(name, device, device_id)
    session.run_with_iobinding(binding)
    return dict(zip(output_names, binding.get_outputs(), strict=True))


class ReplayBuffers:
    """Inputs and outputs that keep their addresses from run to run, because a CUDA graph replays on the same addresses.

    Only one run at a time: the caller must hold a lock.

    Args:
        session: a session whose outputs have fixed shapes.
        device, device_id: the device of the buffers.

    Raises:
        MELoRAError: if ONNX Runtime does not know the shape of an output.
    """

    def __init__(self, session: Any, device: str, device_id: int) -> None:
        ort = import_onnxruntime()
        unknown = [value.name for value in session.get_outputs() if not all(isinstance(n, int) for n in value.shape)]
        if unknown:
            raise MELoRAError(f"a CUDA graph needs outputs of fixed shapes, but these are not: {', '.join(unknown)}")
        self._session = session
        self._device = device
        self._device_id = device_id
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._outputs = {
            value.name: ort.OrtValue.ortvalue_from_shape_and_type(value.shape, _dtype(value), device, device_id)
            for value in session.get_outputs()
        }
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, arrays: Mapping[str, Any]) -> Arrays:
        """Returns copies of the outputs; `arrays` must have the same shapes each time."""
        if not self._inputs:
            copies = {name: np.array(value, order="C") for name, value in arrays.items()}  # `to_device` may share them
            self._inputs = to_device(copies, self._device, self._device_id)
            for name, value in self._inputs.items():
                self._binding.bind_ortvalue_input(name, value)
        for name, value in arrays.items():
            self._inputs[name].update_inplace(np.asarray(value, order="C"))
        self._session.run_with_iobinding(self._binding)
        return {name: value.numpy().copy() for name, value in self._outputs.items()}  # on the CPU it is a view


def _dtype(value: Any) -> np.dtype:
    """Returns the NumPy dtype of a session's output, whose type is "tensor(float)", for example."""
    name = value.type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))
