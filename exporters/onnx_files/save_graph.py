"""`save_graph`: a graph with its weights beside it, in a file that is named after their content.

The weights of another graph have another name: new ones lie beside the old ones until one rename exchanges the graph.
"""

import hashlib
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir

_HEX_DIGITS = 12
_PIECE_BYTES = 1 << 22
_SMALL_BYTES = 256
"""Tensors up to this size stay in the graph."""


def save_graph(model: onnx_ir.Model, path: Path) -> None:
    """Writes `model`, and its weights to NAME.onnx.HASH.data beside it; none where all are small. `model` stays as it
    is.
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    before = [value.const_value for value in values]
    unnamed = path.with_name(f"{path.name}.data")
    try:
        onnx_ir.external_data.unload_from_model(model, path.parent, unnamed.name, size_threshold_bytes=_SMALL_BYTES)
        external = {v: v.const_value for v in values if isinstance(v.const_value, onnx_ir.ExternalTensor)}
        if external:
            named = path.with_name(f"{path.name}.{_hash(unnamed)}.data")
            os.replace(unnamed, named)
            for value, tensor in external.items():
                value.const_value = _moved(tensor, named)
        else:
            unnamed.unlink(missing_ok=True)
        onnx_ir.save(model, path)
    finally:
        for value, own in zip(values, before, strict=True):
            value.const_value = own


def is_data_name(name: str, graph_name: str) -> bool:
    """Whether `save_graph` gives this name, with a hash, to the weights of graphs called `graph_name`."""
    return bool(re.fullmatch(rf"{re.escape(graph_name)}\.[0-9a-f]{{{_HEX_DIGITS}}}\.data", name))


def _hash(file: Path) -> str:
    """SHA-256 over the CRC-32 of each piece, which several threads compute at the speed of memory."""

    def checksum(start: int) -> bytes:
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            return zlib.crc32(stream.read(_PIECE_BYTES)).to_bytes(4, "little")

    with ThreadPoolExecutor() as threads:
        checksums = threads.map(checksum, range(0, file.stat().st_size, _PIECE_BYTES))
        return hashlib.sha256(b"".join(checksums)).hexdigest()[:_HEX_DIGITS]


def _moved(tensor: onnx_ir.ExternalTensor, file: Path) -> onnx_ir.ExternalTensor:
    return onnx_ir.ExternalTensor(
        file.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=file.parent,
    )
