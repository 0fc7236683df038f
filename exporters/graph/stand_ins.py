"""Numbered stand-ins for weights, by which a fusion that packs weights side by side can be followed.

A fusion moves weights about without looking at their values. So each weight is replaced by a stand-in of its shape,
one byte an element, with the weight's number in the first four bytes of every row, little-endian. After the fusion the
numbers say which weights an initializer holds, in which order and in which columns.

An attention with the products x Wq, x Wk and x Wv, each W of 2 rows and 5 columns:

    put      q.weight.T = 1 0 0 0 0    k.weight.T = 2 0 0 0 0    v.weight.T = 3 0 0 0 0
                          1 0 0 0 0                 2 0 0 0 0                 3 0 0 0 0
    fused    val_7 = 1 0 0 0 0 2 0 0 0 0 3 0 0 0 0
                     1 0 0 0 0 2 0 0 0 0 3 0 0 0 0
    read     at column 0 stands number 1, five columns wide; at 5 number 2, at 10 number 3:
             q.weight.T → (0, 5), k.weight.T → (5, 10), v.weight.T → (10, 15)
    taken    val_7 = [Wq | Wk | Wv], put together when the graph is saved, under the name {q,k,v}.weight.T

No weight is copied on the way, and weights of equal values are told apart. An initializer whose rows differ, or are
anything else than whole stand-ins one after the other, is an error.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir

from melora_fx import MELoRAError

_DTYPE = onnx_ir.DataType.UINT8
"""By which stand-ins are known: the weights that they stand for are floating point."""

_NUMBER_BYTES = 4


class PackedPlace(NamedTuple):
    """The initializer in which a weight lies beside others, and its columns there: (start, stop)."""

    initializer: str
    columns: tuple[int, int]


def put_stand_ins(graph: onnx_ir.Graph, names: Sequence[str]) -> dict[str, onnx_ir.TensorProtocol]:
    """Puts stand-ins in the place of the initializers called `names`, as far as they are matrices wide enough.

    Returns:
        their weights by name, in the order of their numbers, which begin at 1.
    """
    weights = {name: tensor for name in names if (tensor := _wide_matrix(graph, name)) is not None}
    for number, (name, tensor) in enumerate(weights.items(), start=1):
        graph.initializers[name].const_value = _stand_in(number, tensor)
    return weights


def take_stand_ins(graph: onnx_ir.Graph, weights: Mapping[str, onnx_ir.TensorProtocol]) -> dict[str, PackedPlace]:
    """Puts the weights back where their stand-ins are now; an initializer of several is named after all of them.

    Args:
        graph: the graph after the fusions.
        weights: what `put_stand_ins` returned.

    Returns:
        the weights that have been packed, by the name that they had.

    Raises:
        MELoRAError: where the fusions did something to a weight that is not known here.
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
    """The weights whose stand-ins `value` holds side by side: name → its columns."""
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
                f"ONNX Runtime's fusions made `{value.name}` of weights, in a way that is not known here: export for "
                '`target="portable"`, which ONNX Runtime runs too'
            )
        found[names[number - 1]] = (start, stop)
        start = stop
    return found


def joined_name(names: Sequence[str]) -> str:
    """`a.query.weight.T`, `a.key.weight.T` → `a.{query,key}.weight.T`."""
    paths = [name.split(".") for name in names]
    first = _num_common(paths)
    last = _num_common([path[first:][::-1] for path in paths])
    middles = [".".join(path[first : len(path) - last]) for path in paths]
    end = len(paths[0]) - last
    return ".".join([*paths[0][:first], f"{{{','.join(middles)}}}", *paths[0][end:]])


def _wide_matrix(graph: onnx_ir.Graph, name: str) -> onnx_ir.TensorProtocol | None:
    """The initializer's tensor, where a stand-in can take its place."""
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
    """[W_1 | W_2 | …], put together whenever it is read."""
    rows = parts[0].shape.numpy()[0]
    width = sum(part.shape.numpy()[1] for part in parts)
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.concatenate([part.numpy() for part in parts], axis=1), name=name),
        dtype=parts[0].dtype,
        shape=onnx_ir.Shape((rows, width)),
        name=name,
    )


def _num_common(paths: Sequence[Sequence[str]]) -> int:
    """Number of leading components that all paths share."""
    columns = enumerate(zip(*paths, strict=False))
    return next((index for index, parts in columns if len(set(parts)) > 1), min(map(len, paths)))
