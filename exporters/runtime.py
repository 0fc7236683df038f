"""ONNX Runtime, imported where it is used (neither package needs it to be imported), and the files that it reads."""

import hashlib
import importlib
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

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


def import_float16() -> Any:
    """ONNX Runtime's float16 converter, a module.

    Raises:
        MELoRAError: where ONNX Runtime is not installed; names the extras.
    """
    import_onnxruntime()
    return importlib.import_module("onnxruntime.transformers.float16")


def read_graph(path: str | Path) -> onnx.ModelProto:
    """The graph in an ONNX file without its external data, which has been checked to be there.

    Raises:
        MELoRAError: for a file that is missing or no ONNX graph, or whose external data is not whole.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else error
        raise MELoRAError(f"`{path}` cannot be read as an ONNX graph: {reason}") from error
    check_external_data(path, model)
    return model


def check_external_data(path: str | Path, model: onnx.ModelProto) -> None:
    """Refuses a graph whose external data leads out of its folder, is missing, or has been cut short.

    Places are judged as they are written; a symbolic link in the folder is its owner's doing.

    Raises:
        MELoRAError: names every such file.
    """
    ends: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            end = (info.offset or 0) + max(info.length or 0, _size_in_bytes(tensor))
            ends[info.location] = max(end, ends.get(info.location, 0))
    lines = [line for location, end in ends.items() if (line := _fault(Path(path).parent, location, end))]
    if lines:
        raise MELoRAError(f"the weights of `{path}` cannot be read: " + "; ".join(lines))


def _fault(folder: Path, location: str, end: int) -> str | None:
    places = PurePosixPath(location), PureWindowsPath(location)
    if not location or any(place.is_absolute() or place.drive or ".." in place.parts for place in places):
        return f"`{location}` leads out of the graph's folder"
    file = folder / location
    if not file.is_file():
        return f"`{file}` does not exist"
    size = file.stat().st_size
    return f"`{file}` has {size} bytes of {end}: it was cut short" if size < end else None


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


_BYTES = {
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


def _size_in_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor takes; 0 for rarer types, whose length the graph tells."""
    return math.prod(tensor.dims) * _BYTES.get(onnx.TensorProto.DataType.Name(tensor.data_type), 0)


def has_optional_inputs(model: onnx.ModelProto) -> bool:
    """Whether initializers are inputs too, and so defaults; before IR version 4 all were, as constants."""
    optional = {item.name for item in model.graph.initializer}
    return model.ir_version >= 4 and any(value.name in optional for value in model.graph.input)


def input_axes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Required input → its axes: a size, or the name of a dynamic axis ("?" for one without)."""
    optional = {item.name for item in model.graph.initializer}
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
            for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
        if value.name not in optional
    }


def precision_of(model: onnx.ModelProto) -> str:
    """ "fp16" where the graph holds weights of half precision, else "fp32"."""
    half = any(item.data_type == onnx.TensorProto.FLOAT16 and len(item.dims) > 1 for item in model.graph.initializer)
    return "fp16" if half else "fp32"


def content_hash(path: Path, model: onnx.ModelProto) -> str:
    """SHA-256 of a graph's file and of the files that hold its weights."""
    external = {ExternalDataInfo(tensor).location for tensor in _tensors(model.graph) if uses_external_data(tensor)}
    digest = hashlib.sha256()
    for file in (path, *(path.parent / location for location in sorted(external))):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
