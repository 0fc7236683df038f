"""ONNX Runtime's own operators for one of its providers, and where the weights are afterwards.

transformers' `fuse_for_onnxruntime` does the fusing. It packs the weights of products that share an input side by side
into one, as q, k and v of an attention; `fuse` finds each again and names the packed one after all that it holds.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from .weights import WeightPlace

FUSED_TARGETS = {"ort-cpu": "cpu", "ort-cuda": "cuda"}
"""Target → the provider whose fusions it gets."""


def fuse(graph_model: onnx_ir.Model, target: str, places: Mapping[str, WeightPlace]) -> dict[str, WeightPlace]:
    """Fuses the graph in place; the other targets' graphs stay as they are.

    Args:
        graph_model: a graph whose weights have been named.
        target: as for `export_onnx`.
        places: where the parameters live before.

    Returns:
        where they live afterwards; a weight that cannot be told from another one is left out.
    """
    if target not in FUSED_TARGETS:
        return dict(places)
    graph = graph_model.graph
    before = {name: value.const_value for name, value in graph.initializers.items()}
    fuse_for_onnxruntime(graph_model, FUSED_TARGETS[target])
    gone = {name: tensor for name, tensor in before.items() if name not in graph.initializers and tensor is not None}
    packed = {}
    for value in [value for name, value in graph.initializers.items() if name not in before]:
        packed.update(_unpack(value, gone))
    found = {}
    for parameter, place in places.items():
        if place.initializer in graph.initializers:
            found[parameter] = place
        elif place.initializer in packed:
            initializer, columns = packed[place.initializer]
            found[parameter] = WeightPlace(initializer.name or "", place.is_transposed, columns)
    return found


_Slice = tuple[onnx_ir.Value, tuple[int, int]]


def _unpack(value: onnx_ir.Value, gone: Mapping[str, onnx_ir.TensorProtocol]) -> dict[str, _Slice]:
    """The former initializers whose values stand side by side in `value`: name → the columns of each."""
    splits = [user for node in value.consumers() for user in node.outputs[0].consumers() if user.op_type == "Split"]
    sizes = splits[0].inputs[1] if splits and len(splits[0].inputs) > 1 else None
    if value.const_value is None or len(value.const_value.shape) != 2 or sizes is None or sizes.const_value is None:
        return {}
    matrix = value.const_value.numpy()
    found, names, start = {}, [], 0
    for size in sizes.const_value.numpy().tolist():
        columns = matrix[:, start : start + size]
        equal = [
            name
            for name, tensor in gone.items()
            if tuple(tensor.shape) == columns.shape and np.array_equal(tensor.numpy(), columns)
        ]
        if len(equal) == 1:
            found[equal[0]] = (value, (start, start + size))
            names.append(equal[0])
        start += size
    if len(names) == len(sizes.const_value.numpy()) and len(set(names)) == len(names):
        value.name = _joined(names)
        sizes.name = f"{value.name}.sizes"
    return found


def _joined(names: list[str]) -> str:
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
