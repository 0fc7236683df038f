"""Runs whose inputs and outputs are bound to a device's memory, so that ONNX Runtime copies nothing by itself.

ONNX Runtime ignores active adapters (`RunOptions.add_active_adapter`) in such runs, silently: whoever binds must bind
the adapter's tensors too, as inputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporters.onnx_runtime import Arrays, as_array, import_onnxruntime
from melora_fx import MELoRAError

Values = Mapping[str, Any]
"""`onnxruntime.OrtValue`s by name."""


def to_device(arrays: Mapping[str, Any], device: str, device_id: int) -> dict[str, Any]:
    """Arrays or tensors as `onnxruntime.OrtValue`s on the device; on the CPU they share the arrays' memory."""
    ort = import_onnxruntime()
    return {
        name: ort.OrtValue.ortvalue_from_numpy(np.asarray(as_array(value), order="C"), device, device_id)
        for name, value in arrays.items()
    }


def run_bound(session: Any, values: Values, output_names: Sequence[str], device: str, device_id: int) -> dict[str, Any]:
    """One run on inputs that lie on the device; the outputs stay there. Each call binds anew: threads share nothing."""
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in output_names:
        binding.bind_output(name, device, device_id)
    session.run_with_iobinding(binding)
    return dict(zip(output_names, binding.get_outputs(), strict=True))


class ReplayBuffers:
    """Inputs and outputs that keep their places from run to run: a CUDA graph replays on the addresses that it saw.

    One run at a time: the caller holds a lock.

    Args:
        session: one whose outputs have fixed shapes.
        device, device_id: where the buffers lie.

    Raises:
        MELoRAError: for an output of which ONNX Runtime does not know the shape.
    """

    def __init__(self, session: Any, device: str, device_id: int) -> None:
        ort = import_onnxruntime()
        unknown = [value.name for value in session.get_outputs() if not all(isinstance(n, int) for n in value.shape)]
        if unknown:
            raise MELoRAError(f"a CUDA graph needs outputs of fixed shapes, these are not: {', '.join(unknown)}")
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
        """Copies of the outputs for `arrays` of the same shapes each time."""
        if not self._inputs:
            copies = {name: np.array(value, order="C") for name, value in arrays.items()}  # the CPU's are not copied
            self._inputs = to_device(copies, self._device, self._device_id)
            for name, value in self._inputs.items():
                self._binding.bind_ortvalue_input(name, value)
        for name, value in arrays.items():
            self._inputs[name].update_inplace(np.asarray(value, order="C"))
        self._session.run_with_iobinding(self._binding)
        return {name: value.numpy().copy() for name, value in self._outputs.items()}  # on the CPU it is a view


def _dtype(value: Any) -> np.dtype:
    """The NumPy type of a session's output, "tensor(float)" and the like."""
    name = value.type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))
