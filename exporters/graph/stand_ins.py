"""Numbered stand-ins for weights, so that fusions can be followed."""

from collections.abc import Mapping

import numpy as np
import onnx_ir

from melora_fx import MELoRAError

STAND_IN_TYPE = onnx_ir.DataType.UINT8


_NUMBER_BYTES = 4


def matrix_of(graph: onnx_ir.Graph, name: str) -> onnx_ir.TensorProtocol | None:
    """The initializer's tensor, where a stand-in can take its place."""
    tensor = graph.initializers[name].const_value if name in graph.initializers else None
    if tensor is None or len(tensor.shape) != 2 or tensor.shape.numpy()[1] < _NUMBER_BYTES:
        return None
    return tensor


def stand_in(number: int, tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    rows, width = tensor.shape.numpy()
    return onnx_ir.tensor(np.broadcast_to(_row(number, width), (rows, width)), name=tensor.name)


def _row(number: int, width: int) -> np.ndarray:
    row = np.zeros(width, np.uint8)
    row[:_NUMBER_BYTES] = np.frombuffer(number.to_bytes(_NUMBER_BYTES, "little"), np.uint8)
    return row


def read_off(value: onnx_ir.Value, tensors: Mapping[str, onnx_ir.TensorProtocol]) -> dict[str, tuple[int, int]]:
    """The weights whose stand-ins `value` holds side by side: name → its columns."""
    assert value.const_value is not None
    array, names = value.const_value.numpy(), [*tensors]
    row = array[0] if array.ndim == 2 else array
    found: dict[str, tuple[int, int]] = {}
    start = 0
    while start < row.size:
        number = int.from_bytes(row[start : start + _NUMBER_BYTES].tobytes(), "little")
        width = tensors[names[number - 1]].shape.numpy()[1] if 0 < number <= len(names) else 0
        if not width or not np.array_equal(row[start : start + width], _row(number, width)) or (array != row).any():
            raise MELoRAError(
                f"ONNX Runtime's fusions made `{value.name}` of weights, in a way that is not known here: export for "
                '`target="portable"`, which ONNX Runtime runs too'
            )
        found[names[number - 1]] = (start, start + width)
        start += width
    return found


def side_by_side(parts: list[onnx_ir.TensorProtocol], name: str) -> onnx_ir.LazyTensor:
    """[W_1 | W_2 | …], put together whenever it is read."""
    rows, width = parts[0].shape.numpy()[0], sum(part.shape.numpy()[1] for part in parts)
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.concatenate([part.numpy() for part in parts], axis=1), name=name),
        dtype=parts[0].dtype,
        shape=onnx_ir.Shape((rows, width)),
        name=name,
    )


def joined_name(names: list[str]) -> str:
    """`a.query.weight.T`, `a.key.weight.T` → `a.{query,key}.weight.T`."""
    paths = [name.split(".") for name in names]
    first = _common(paths)
    last = _common([path[first:][::-1] for path in paths])
    middles = [".".join(path[first : len(path) - last]) for path in paths]
    end = len(paths[0]) - last
    return ".".join([*paths[0][:first], f"{{{','.join(middles)}}}", *paths[0][end:]])


def _common(paths: list[list[str]]) -> int:
    """Number of leading components that all paths share."""
    return next(
        (index for index, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths))
    )
