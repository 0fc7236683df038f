"""Replaces weights with numbered stand-ins, to follow a fusion that packs weights side by side.

A fusion moves weights without reading their values. So each weight is replaced with a stand-in of the same shape and
one byte per element, whose rows all begin with the weight's number: four bytes, little-endian. After the fusion the
numbers tell which weights an initializer contains, in which order and in which columns.

An attention with the products x Wq, x Wk and x Wv, each W of 2 rows and 5 columns:

    put      q.weight.T = 1 0 0 0 0    k.weight.T = 2 0 0 0 0    v.weight.T = 3 0 0 0 0
                          1 0 0 0 0                 2 0 0 0 0                 3 0 0 0 0
    fused    val_7 = 1 0 0 0 0 2 0 0 0 0 3 0 0 0 0
                     1 0 0 0 0 2 0 0 0 0 3 0 0 0 0
    read     number 1 at column 0, five columns wide; number 2 at column 5; number 3 at column 10:
             q.weight.T → (0, 5), k.weight.T → (5, 10), v.weight.T → (10, 15)
    taken    val_7 = [Wq | Wk | Wv], concatenated when the graph is saved, and named {q,k,v}.weight.T

No weight is copied during the fusion, and weights with equal values are distinguished. It is an error if the rows of an
initializer differ, or are not a sequence of whole stand-ins.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir

from melora_fx import MELoRAError

_DTYPE = onnx_ir.DataType.UINT8
"""The dtype that identifies stand-ins: the weights that they replace are floating point."""

_NUMBER_BYTES = 4


class PackedPlace(NamedTuple):
    """The initializer that stores a weight alongside others, and the weight's columns there: (start, stop)."""

    initializer: str
    columns: tuple[int, int]


def put_stand_ins(graph: onnx_ir.Graph, names: Sequence[str]) -> dict[str, onnx_ir.TensorProtocol]:
    """Replaces the initializers called `names` with stand-ins, if they are matrices of at least four columns.

    Returns:
        the replaced weights by name, in the order of their numbers, which begin at 1.
    """
    weights = {name: tensor for name in names if (tensor := _wide_matrix(graph, name)) is not None}
    for number, (name, tensor) in enumerate(weights.items(), start=1):
        graph.initializers[name].const_value = _stand_in(number, tensor)
    return weights


def take_stand_ins(graph: onnx_ir.Graph, weights: Mapping[str, onnx_ir.TensorProtocol]) -> dict[str, PackedPlace]:
    """Replaces the stand-ins with their weights; an initializer of several weights is named after all of them.

    Args:
        graph: the graph after the fusions.
        weights: what `put_stand_ins` returned.

    Returns:
        the places of the weights that have been packed, by their earlier names.

    Raises:
        MELoRAError: if the fusions changed a weight in an unknown way.
    """
    packed: dict[str, PackedPlace] = {}
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.const_value.dtype != _DTYPE:
            continue
        columns = read_numbers(value, weights)
        parts = [weights[name] for name in columns]
        tensor = parts[0] if len(parts) == 1 else _side_by_side(parts, joined_name([*columns]))
        value.const_value = tensor
        value.type = onnx_ir.TensorType(tensor.dtype)
        value.shape = onnx_ir.Shape(tensor.shape.numpy())
        if len(parts) > 1:
            value.name = tensor.name
            packed |= {name: PackedPlace(tensor.name or "", span) for name, span in columns.items()}
    return packed


def read_numbers(value: onnx_ir.Value, weights: Mapping[str, onnx_ir.TensorProtocol]) -> dict[str, tuple[int, int]]:
    """Returns the weights whose stand-ins `value` contains side by side: name → its columns."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    names = [*weights]
    row = array[0] if array.ndim == 2 else array
    found: dict[str, tuple[int, int]] = {}
    start = 0
    while start < row.size:
        number = int.from_bytes(row[start : start + _NUMBER_BYTES].tobytes(), "little")
        width = weights[names[number - 1]].shape.numpy()[1] if 0 < number <= len(names) else 0
        stop = start + width
        if not width or not np.array_equal(row[start:stop], _row(number, width)) or (array != row).any():
            raise MELoRAError(
                f"ONNX Runtime's fusions built `{value.name}` from weights in an unknown way: export with "
                '`target="portable"`, which ONNX Runtime runs too'
            )
        found[names[number - 1]] = (start, stop)
        start = stop
    return found


def joined_name(names: Sequence[str]) -> str:
    """Returns one name for several: `a.query.weight.T`, `a.key.weight.T` → `a.{query,key}.weight.T`."""
    paths = [name.split(".") for name in names]
    first = _num_common(paths)
    last = _num_common([path[first:][::-1] for path in paths])
    middles = [".".join(path[first : len(path) - last]) for path in paths]
    end = len(paths[0]) - last
    return ".".join([*paths[0][:first], f"{{{','.join(middles)}}}", *paths[0][end:]])


def _wide_matrix(graph: onnx_ir.Graph, name: str) -> onnx_ir.TensorProtocol | None:
    """Returns the initializer's tensor if a stand-in can replace it, else None."""
    tensor = graph.initializers[name].const_value if name in graph.initializers else None
    if tensor is None or len(tensor.shape) != 2 or tensor.shape.numpy()[1] < _NUMBER_BYTES:
        return None
    return tensor


def _stand_in(number: int, tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    rows, width = tensor.shape.numpy()
    return onnx_ir.tensor(np.broadcast_to(_row(number, width), (rows, width)), name=tensor.name)


def _row(number: int, width: int) -> np.ndarray:
    row = np.zeros(width, np.uint8)
    row[:_NUMBER_BYTES] = np.frombuffer(number.to_bytes(_NUMBER_BYTES, "little"), np.uint8)
    return row


def _side_by_side(parts: Sequence[onnx_ir.TensorProtocol], name: str) -> onnx_ir.LazyTensor:
    """Returns [W_1 | W_2 | …], concatenated whenever it is read."""
    rows = parts[0].shape.numpy()[0]
    width = sum(part.shape.numpy()[1] for part in parts)
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.concatenate([part.numpy() for part in parts], axis=1), name=name),
        dtype=parts[0].dtype,
        shape=onnx_ir.Shape((rows, width)),
        name=name,
    )


def _num_common(paths: Sequence[Sequence[str]]) -> int:
    """Returns the number of leading components that all paths share."""
    columns = enumerate(zip(*paths, strict=False))
    return next((index for index, parts in columns if len(set(parts)) > 1), min(map(len, paths)))
