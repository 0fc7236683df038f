"""A .onnx file from outside: its graph, the axes of its inputs and outputs, and the files that its weights are in."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto

from melora_fx import MELoRAError

from .providers import Axes


def read_onnx(path: str | os.PathLike[str]) -> ModelProto:
    """The file's content; weights in other files are not read.

    Raises:
        MELoRAError: for a file that is missing or is no ONNX graph.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise MELoRAError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf raises its own kinds
        raise MELoRAError(f"`{path}` is not an ONNX graph: {error}") from error
    if not model.graph.output:
        raise MELoRAError(f"`{path}` is not an ONNX graph: it has no outputs")
    return model


def required_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs without a default; one with a default is an initializer too."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in defaults]


def axes_by_name(values: Iterable[ValueInfoProto]) -> Axes:
    """Axes of graph inputs or outputs: a size, the name of a dynamic axis, or "?" for one without a name."""
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
            for dim in value.type.tensor_type.shape.dim
        )
        for value in values
    }


def data_files(path: str | os.PathLike[str], model: ModelProto) -> dict[str, Path]:
    """The files that hold the graph's external data: the name that the graph refers to → the file.

    Raises:
        MELoRAError: for a name that leads out of the graph's folder, and a file that is missing or too short.
    """
    folder = Path(path).resolve().parent
    ends: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            ends[entries["location"]] = max(end, ends.get(entries["location"], 0))
    files = {name: (folder / name).resolve() for name in ends}
    for name, file in files.items():
        if not file.is_relative_to(folder):
            raise MELoRAError(f"`{path}` refers to weights outside of its folder, `{name}`")
        if not file.is_file():
            raise MELoRAError(f"`{path}` has its weights in `{name}`, which is not beside it")
        if file.stat().st_size < ends[name]:
            raise MELoRAError(f"`{file}` is cut off: {file.stat().st_size} bytes, the graph refers to {ends[name]}")
    return files


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def hash_content(path: str | os.PathLike[str], model: ModelProto) -> str:
    """SHA-256 of a graph and its weights, in whatever files they are.

    Raises:
        MELoRAError: as `data_files` does.
    """
    digest = hashlib.sha256()
    for file in (Path(path), *data_files(path, model).values()):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
