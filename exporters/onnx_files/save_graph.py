"""Writes a graph, and its weights to a file next to it that is named after their hash; checks written weights.

The graph's metadata contains the SHA-256 of each weight (`melora_weights`); the weights are in NAME.onnx.HASH.data.
Other weights have another file name, so new ones can be next to the old ones until one rename replaces the graph.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from melora_fx import MELoRAError

from .onnx_file import data_files

if TYPE_CHECKING:
    import onnx_ir

WEIGHTS_KEY = "melora_weights"
"""Key in a graph's metadata: a JSON object that maps each weight's name to the SHA-256 of its bytes."""
_HEX_DIGITS = 12
SMALL_BYTES = 256
"""Tensors up to this size stay in the graph's file."""
_READ_BYTES = 1 << 20


def save_graph(model: onnx_ir.Model, path: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes `model`, and its weights to NAME.onnx.HASH.data next to it; without that file if all weights are small.

    `model` does not change, except that its metadata gets the SHA-256 of its weights.

    Args:
        model: the graph.
        path: the .onnx file to write.
        known: weight → SHA-256, for weights that are copied unchanged and need not be hashed.
    """
    import onnx_ir

    before = [(value, value.const_value) for value in _weights(model).values()]
    unnamed = path.with_name(_data_name(path, "0" * _HEX_DIGITS))
    try:
        onnx_ir.external_data.unload_from_model(model, path.parent, unnamed.name, size_threshold_bytes=SMALL_BYTES)
        digests = {**_digests(model, unnamed, skip=known or {}), **(known or {})}
        model.metadata_props[WEIGHTS_KEY] = json.dumps(dict(sorted(digests.items())))
        graph = onnx_ir.to_proto(model).SerializeToString()
        places = [
            (digests[name], value.const_value.offset)
            for name, value in _weights(model).items()
            if isinstance(value.const_value, onnx_ir.ExternalTensor)
        ]
    finally:
        for value, tensor in before:
            value.const_value = tensor
    if places:
        digits = hashlib.sha256(json.dumps(places).encode()).hexdigest()[:_HEX_DIGITS]
        named = path.with_name(_data_name(path, digits))
        os.replace(unnamed, named)
        graph = graph.replace(os.fsencode(unnamed.name), os.fsencode(named.name))  # of equal length
    else:
        unnamed.unlink(missing_ok=True)
    path.write_bytes(graph)


def check_weights(path: Path, model: onnx_ir.Model) -> None:
    """Raises MELoRAError if a graph's weights are not those that were written with it; names up to ten of them.

    Args:
        path: the graph's file.
        model: the graph as `read_graph` reads it.
    """
    expected = known_digests(model)
    if not expected:
        raise MELoRAError(
            f"`{path}` contains no hashes of its weights: another tool or an earlier version has written it, export it "
            "again"
        )
    files = data_files(path, model)
    actual: dict[str, str] = {}
    for location, file in files.items():
        actual |= _digests(model, file, location=location)
    actual |= _digests(model, None)
    wrong = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
    if wrong:
        raise MELoRAError(
            f"the weights of `{path}` have changed since they were written: {', '.join(map(repr, wrong[:10]))}"
            f"{', …' if len(wrong) > 10 else ''}; copy or export the graph again"
        )


def known_digests(model: onnx_ir.Model) -> dict[str, str]:
    """Returns the SHA-256 of each weight in a graph's metadata; empty if the metadata has none."""
    try:
        found = json.loads(model.metadata_props.get(WEIGHTS_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    is_right = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if is_right else {}


def is_data_name(name: str, graph_name: str) -> bool:
    """Returns whether `save_graph` can give `name` to the weights of a graph called `graph_name`."""
    return bool(re.fullmatch(rf"{re.escape(graph_name)}\.[0-9a-f]{{{_HEX_DIGITS}}}\.data", name))


def _data_name(path: Path, digits: str) -> str:
    return f"{path.name}.{digits}.data"


def _weights(model: onnx_ir.Model) -> dict[str, onnx_ir.Value]:
    """Returns the initializers of a graph by name; those of a subgraph have its name as a prefix."""
    return {
        name if graph is model.graph else f"{graph.name}/{name}": value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _digests(
    model: onnx_ir.Model, file: Path | None, *, location: str | None = None, skip: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Returns the SHA-256 of weights by name: of those in `file` and, if `location` is None, of those in the graph.

    Args:
        model: the graph.
        file: the file of external weights; None for only the weights in the graph.
        location: the name by which the graph refers to `file`; None for any name.
        skip: the names of weights to leave out.
    """
    import onnx_ir

    tensors = {name: value.const_value for name, value in _weights(model).items() if name not in (skip or {})}
    inside: dict[str, str] = {}
    with ThreadPoolExecutor() as threads:
        outside: dict[str, Future[str]] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, onnx_ir.ExternalTensor):
                if file is not None and location in (None, str(tensor.location)):
                    outside[name] = threads.submit(_hash, file, tensor.offset or 0, tensor.nbytes)
            elif location is None and tensor is not None and tensor.dtype != onnx_ir.DataType.STRING:
                inside[name] = hashlib.sha256(tensor.tobytes()).hexdigest()
        return inside | {name: future.result() for name, future in outside.items()}


def _hash(file: Path, start: int, size: int) -> str:
    """Returns the SHA-256 of `size` bytes of a file from `start` on."""
    digest = hashlib.sha256()
    for piece in _pieces(file, start, size):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path, start: int, size: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(size, _READ_BYTES)))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while size > 0 and (count := stream.readinto(buffer[: min(size, len(buffer))])):
            yield buffer[:count]
            size -= count
