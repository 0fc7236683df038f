"""Reads .onnx files: the graph, the axes of its inputs and outputs, and the files that its weights are in."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from melora_fx import MELoRAError

if TYPE_CHECKING:
    import onnx_ir


def read_graph(path: str | os.PathLike[str]) -> onnx_ir.Model:
    """Returns the graph in an ONNX file; checks that its external data is complete, but does not read it.

    Raises:
        MELoRAError: if the file is missing or not an ONNX graph, or its external data is incomplete.
    """
    import onnx_ir  # slow to import, so only here

    try:
        model = onnx_ir.load(path)
        data_files(path, model)
    except MELoRAError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise their own types
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else error
        raise MELoRAError(f"`{path}` cannot be read as an ONNX graph: {reason}") from error
    return model


def data_files(path: str | os.PathLike[str], model: onnx_ir.Model) -> dict[str, Path]:
    """Returns the files of the graph's external data: the name that the graph refers to → the file.

    Names are checked as written; symbolic links in the folder are followed, because its owner put them there.

    Raises:
        MELoRAError: if a file is outside the graph's folder, missing, or cut short; names every such file.
    """
    folder = Path(path).parent
    ends: dict[str, int] = {}
    for tensor in _external_tensors(model):
        end = (tensor.offset or 0) + max(tensor.length or 0, tensor.nbytes)
        ends[str(tensor.location)] = max(end, ends.get(str(tensor.location), 0))
    faults = [fault for location, end in ends.items() if (fault := _fault(folder, location, end))]
    if faults:
        raise MELoRAError(f"the weights of `{path}` cannot be read: " + "; ".join(faults))
    return {location: folder / location for location in ends}


def may_refer_to(graph: Path, name: str) -> bool:
    """Returns whether the name of a weight file occurs in a graph's file, as it does if the graph has weights there."""
    if not graph.is_file() or not graph.stat().st_size:
        return False
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(os.fsencode(name)) >= 0


def _fault(folder: Path, location: str, end: int) -> str | None:
    """Returns what is wrong with a file of external data that must have `end` bytes; None if nothing is wrong."""
    places = (PurePosixPath(location), PureWindowsPath(location))
    if not location or any(place.is_absolute() or place.drive or ".." in place.parts for place in places):
        return f"`{location}` leads out of the graph's folder"
    file = folder / location
    if not file.is_file():
        return f"`{file}` does not exist"
    size = file.stat().st_size
    return f"`{file}` has {size} bytes of {end}: it was cut short" if size < end else None


def _external_tensors(model: onnx_ir.Model) -> Iterator[onnx_ir.ExternalTensor]:
    """Yields the external tensors among initializers and node attributes, in subgraphs too."""
    import onnx_ir

    for graph in model.graphs():
        tensors = [value.const_value for value in graph.initializers.values()]
        for attribute in (attribute for node in graph for attribute in node.attributes.values()):
            if attribute.type == onnx_ir.AttributeType.TENSOR:
                tensors.append(attribute.value)
            elif attribute.type == onnx_ir.AttributeType.TENSORS:
                tensors += attribute.value
        yield from (tensor for tensor in tensors if isinstance(tensor, onnx_ir.ExternalTensor))


def has_optional_inputs(model: onnx_ir.Model) -> bool:
    """Returns whether inputs have initializers as defaults; before IR version 4 all were inputs, as constants."""
    return model.ir_version >= 4 and len(required_inputs(model)) < len(model.graph.inputs)


def required_inputs(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """Returns the inputs without a default."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def optional_inputs(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """Returns the inputs with a default."""
    return [value for value in model.graph.inputs if value.is_initializer()]


def axes_by_name(values: Iterable[onnx_ir.Value]) -> dict[str, tuple[int | str, ...]]:
    """Returns the axes of graph inputs or outputs: a size, the name of a dynamic axis, or "?" for a nameless one."""
    return {
        value.name or "": tuple(size if isinstance(size, int) else size.value or "?" for size in value.shape or ())
        for value in values
    }


def precision_of(model: onnx_ir.Model) -> str:
    """Returns "fp16" if a weight with more than one dimension is in half precision, else "fp32"."""
    import onnx_ir

    weights = (value.const_value for value in model.graph.initializers.values())
    half = any(weight.dtype == onnx_ir.DataType.FLOAT16 and len(weight.shape) > 1 for weight in weights if weight)
    return "fp16" if half else "fp32"


def content_hash(path: str | os.PathLike[str], model: onnx_ir.Model) -> str:
    """Returns the SHA-256 of a graph's file and of all files of its weights."""
    digest = hashlib.sha256()
    for file in (Path(path), *data_files(path, model).values()):
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
