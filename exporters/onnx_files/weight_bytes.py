"""Reads the weights of a graph from their files, and writes the graph with changed weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch

from melora_fx import MELoRAError

from .metadata import METADATA_KEY
from .onnx_file import data_files
from .save_graph import SMALL_BYTES, known_digests, save_graph
from .weight_place import WeightPlace

TORCH_DTYPES = {
    onnx_ir.DataType.FLOAT: torch.float32,
    onnx_ir.DataType.FLOAT16: torch.float16,
    onnx_ir.DataType.BFLOAT16: torch.bfloat16,
    onnx_ir.DataType.DOUBLE: torch.float64,
}

_WRITE_BYTES = 1 << 20

Change = Callable[[torch.Tensor], object]
"""A function that changes a parameter in place."""


@dataclass
class WeightBytes:
    """The initializers of a graph, and the changes to make when it is written.

    Attributes:
        path: the graph's file.
        graph: the graph as `read_graph` reads it.
        changes: initializer → the places in it that change, each with its change, in the order of the calls of
            `change`.
    """

    path: Path
    graph: onnx_ir.Model
    changes: dict[str, list[tuple[WeightPlace, Change]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.graph.graph.initializers.items()
        self.tensors = {name: value.const_value for name, value in values if value.const_value is not None}
        self.files = data_files(self.path, self.graph)

    def read(self, place: WeightPlace) -> torch.Tensor:
        """Returns the parameter at `place`, memory-mapped if it is external data; writes never reach the file."""
        return self._view(place, self._bytes(place.initializer))

    def is_floating(self, place: WeightPlace) -> bool:
        """Returns whether the parameter at `place` is floating point; if not, it is quantised, or a counter."""
        return self.tensors[place.initializer].dtype in TORCH_DTYPES

    def change(self, place: WeightPlace, change: Change) -> None:
        """Registers a change of the parameter at `place`, which `write` makes."""
        self.changes.setdefault(place.initializer, []).append((place, change))

    def write(self, path: Path, facts: str) -> None:
        """Writes the graph with its changed weights and `facts` as its new description, using `save_graph`. Weights are
        read, changed and written one at a time.
        """
        self._settle_places()
        buffer = np.empty(max((self.tensors[name].nbytes for name in self.changes), default=0), np.uint8)
        for name in self.changes:
            self.graph.graph.initializers[name].const_value = self._to_be_changed(name, buffer)
        self.graph.metadata_props[METADATA_KEY] = facts
        unchanged = {name: digest for name, digest in known_digests(self.graph).items() if name not in self.changes}
        save_graph(self.graph, path, unchanged)

    def _to_be_changed(self, name: str, buffer: np.ndarray) -> onnx_ir.TensorProtocol:
        """Returns the changed initializer, computed when it is written; a small one, kept in the graph, at once."""
        tensor = self.tensors[name]
        if tensor.nbytes <= SMALL_BYTES:
            return self._changed(name, np.empty(tensor.nbytes, np.uint8))
        shape = onnx_ir.Shape(tensor.shape.numpy())
        return onnx_ir.LazyTensor(partial(self._changed, name, buffer), tensor.dtype, shape, name=name)

    def _settle_places(self) -> None:
        """Gives external data absolute paths, because onnx_ir follows no links in a graph's folder. External data of
        node attributes is read into the graph.
        """
        for graph in self.graph.graphs():
            for value in graph.initializers.values():
                if isinstance(value.const_value, onnx_ir.ExternalTensor):
                    value.const_value = self._at_its_place(value.const_value)
        for node in self.graph.graph.all_nodes():
            for name, attribute in tuple(node.attributes.items()):
                if isinstance(attribute.value, onnx_ir.ExternalTensor):
                    held = onnx_ir.Tensor(self._at_its_place(attribute.value).numpy())
                    node.attributes[name] = onnx_ir.AttrTensor(name, held)

    def _bytes(self, name: str) -> np.ndarray:
        """Returns the bytes of an initializer; changing them does not change the file."""
        tensor = self.tensors[name]
        if isinstance(tensor, onnx_ir.ExternalTensor):
            file = self.files[str(tensor.location)]
            return np.memmap(file, np.uint8, "c", tensor.offset or 0, (tensor.nbytes,))
        data = np.frombuffer(bytearray(tensor.tobytes()), np.uint8)
        if data.nbytes != tensor.nbytes:
            raise MELoRAError(
                f"`{self.path}`: `{name}` has {data.nbytes} bytes, but its shape and dtype need {tensor.nbytes}"
            )
        return data

    def _view(self, place: WeightPlace, data: np.ndarray) -> torch.Tensor:
        """Returns the parameter at `place` in the model's orientation, as a view of its initializer's bytes."""
        tensor = self.tensors[place.initializer]
        values = torch.from_numpy(data).view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape.numpy())
        values = values[:, slice(*place.columns)] if place.columns else values
        return values.mT if place.is_transposed else values

    def _changed(self, name: str, buffer: np.ndarray) -> onnx_ir.Tensor:
        """Returns the changed initializer in `buffer`, valid until the next call: new memory for each takes longer."""
        tensor = self.tensors[name]
        data = buffer[: tensor.nbytes]
        if isinstance(tensor, onnx_ir.ExternalTensor):
            with open(self.files[str(tensor.location)], "rb") as file:
                file.seek(tensor.offset or 0)
                file.readinto(data.data)
        else:
            data[:] = np.frombuffer(tensor.tobytes(), np.uint8)
        for place, change in self.changes[name]:
            change(self._view(place, data))
        return _PiecemealTensor(data.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy()), tensor.dtype, name=name)

    def _at_its_place(self, tensor: onnx_ir.ExternalTensor) -> onnx_ir.ExternalTensor:
        file = self.files[str(tensor.location)].absolute()
        return onnx_ir.ExternalTensor(
            file, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
        )


class _PiecemealTensor(onnx_ir.Tensor):
    """A tensor written in pieces of 1 MiB: for more, the system may search seconds for contiguous memory."""

    def tofile(self, file: Any) -> None:
        data = memoryview(self.numpy().reshape(-1).view(np.uint8).data)
        for start in range(0, len(data), _WRITE_BYTES):
            file.write(data[start : start + _WRITE_BYTES])
