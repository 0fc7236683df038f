"""A .onnx file from outside: its graph, the axes of its inputs and outputs, and the files that its weights are in."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from melora_fx import MELoRAError

_ELEMENT_BYTES = {
    "FLOAT": 4,
    "DOUBLE": 8,
    "FLOAT16": 2,
    "BFLOAT16": 2,
    "INT64": 8,
    "INT32": 4,
    "INT8": 1,
    "UINT8": 1,
    "BOOL": 1,
}


def read_graph(path: str | os.PathLike[str]) -> ModelProto:
    """The graph in an ONNX file without its external data, which has been checked to be there.

    Raises:
        MELoRAError: for a file that is missing or no ONNX graph, or whose external data is not whole.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else error
        raise MELoRAError(f"`{path}` cannot be read as an ONNX graph: {reason}") from error
    data_files(path, model)
    return model


def data_files(path: str | os.PathLike[str], model: ModelProto) -> dict[str, Path]:
    """The files that hold the graph's external data: the name that the graph refers to → the file.

    Places are judged as they are written; a symbolic link in the folder is its owner's doing.

    Raises:
        MELoRAError: names every file that leads out of the graph's folder, is missing, or has been cut short.
    """
    folder = Path(path).parent
    ends: dict[str, int] = {}
    for tensor in all_tensors(model.graph):
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            end = (info.offset or 0) + max(info.length or 0, _size_in_bytes(tensor))
            ends[info.location] = max(end, ends.get(info.location, 0))
    faults = [fault for location, end in ends.items() if (fault := _fault(folder, location, end))]
    if faults:
        raise MELoRAError(f"the weights of `{path}` cannot be read: " + "; ".join(faults))
    return {location: folder / location for location in ends}


def _fault(folder: Path, location: str, end: int) -> str | None:
    """What is wrong with a file of external data that has to reach to byte `end`; None where it does."""
    places = (PurePosixPath(location), PureWindowsPath(location))
    if not location or any(place.is_absolute() or place.drive or ".." in place.parts for place in places):
        return f"`{location}` leads out of the graph's folder"
    file = folder / location
    if not file.is_file():
        return f"`{file}` does not exist"
    size = file.stat().st_size
    return f"`{file}` has {size} bytes of {end}: it was cut short" if size < end else None


def all_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers, and the tensors that nodes hold, in subgraphs too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for subgraph in (attribute.g, *attribute.graphs):
                yield from all_tensors(subgraph)


def _size_in_bytes(tensor: TensorProto) -> int:
    """Bytes that a tensor takes; 0 for rarer types, whose length the graph tells."""
    return math.prod(tensor.dims) * _ELEMENT_BYTES.get(TensorProto.DataType.Name(tensor.data_type), 0)


def num_uses(graph: GraphProto, name: str) -> int:
    """How many inputs of nodes, and outputs of the graph, the value `name` is; in subgraphs too."""
    uses = sum(value.name == name for value in graph.output)
    for node in graph.node:
        uses += sum(value == name for value in node.input)
        for attribute in node.attribute:
            uses += sum(num_uses(subgraph, name) for subgraph in (attribute.g, *attribute.graphs))
    return uses


def has_optional_inputs(model: ModelProto) -> bool:
    """Whether initializers are inputs too, and so defaults; before IR version 4 all were, as constants."""
    return model.ir_version >= 4 and len(required_inputs(model)) < len(model.graph.input)


def required_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs without a default."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in defaults]


def axes_by_name(values: Iterable[ValueInfoProto]) -> dict[str, tuple[int | str, ...]]:
    """Axes of graph inputs or outputs: a size, the name of a dynamic axis, or "?" for one without a name."""
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
            for dim in value.type.tensor_type.shape.dim
        )
        for value in values
    }


def precision_of(model: ModelProto) -> str:
    """ "fp16" where the graph holds weights of half precision, else "fp32"."""
    half = any(item.data_type == TensorProto.FLOAT16 and len(item.dims) > 1 for item in model.graph.initializer)
    return "fp16" if half else "fp32"


def content_hash(path: str | os.PathLike[str], model: ModelProto) -> str:
    """SHA-256 of a graph and its weights, in whatever files they are."""
    digest = hashlib.sha256()
    for file in (Path(path), *data_files(path, model).values()):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
