"""`save_graph`: a graph with its weights beside it, in a file whose name tells graphs apart.

The name has a hash of the graph's file and of samples of the weights: all of them would take a fifth of a fold's time.
Other graphs' weights have another name, so that new ones lie beside the old ones until one rename exchanges the graph.
Two graphs whose weights have the same name are the same, but for the weights: the rename of those exchanges them.
"""

import hashlib
import os
import re
from pathlib import Path

import onnx_ir

_HEX_DIGITS = 12
_SMALL_BYTES = 256
"""Tensors up to this size stay in the graph."""
_SAMPLED_BYTES = 1 << 16
_EVERY_BYTES = 1 << 20


def save_graph(model: onnx_ir.Model, path: Path) -> None:
    """Writes `model`, and its weights to NAME.onnx.HASH.data beside it; none where all are small. `model` stays as it
    is.
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    before = [value.const_value for value in values]
    unnamed = path.with_name(_data_name(path, "0" * _HEX_DIGITS))
    try:
        onnx_ir.external_data.unload_from_model(model, path.parent, unnamed.name, size_threshold_bytes=_SMALL_BYTES)
        graph = onnx_ir.to_proto(model).SerializeToString()
        is_external = any(isinstance(value.const_value, onnx_ir.ExternalTensor) for value in values)
    finally:
        for value, tensor in zip(values, before, strict=True):
            value.const_value = tensor
    if is_external:
        named = path.with_name(_data_name(path, _hash(graph, unnamed)))
        os.replace(unnamed, named)
        graph = graph.replace(os.fsencode(unnamed.name), os.fsencode(named.name))  # as long as before
    else:
        unnamed.unlink(missing_ok=True)
    path.write_bytes(graph)


def is_data_name(name: str, graph_name: str) -> bool:
    """Whether `save_graph` gives this name, with some hash, to the weights of graphs called `graph_name`."""
    return bool(re.fullmatch(rf"{re.escape(graph_name)}\.[0-9a-f]{{{_HEX_DIGITS}}}\.data", name))


def _data_name(path: Path, digits: str) -> str:
    return f"{path.name}.{digits}.data"


def _hash(graph: bytes, weights: Path) -> str:
    digest = hashlib.sha256(graph)
    with weights.open("rb", buffering=0) as file:
        for start in range(0, weights.stat().st_size, _EVERY_BYTES):
            file.seek(start)
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:_HEX_DIGITS]
