"""Joins a product and its bias into one operator: `MatMul` and `Add` read and write the product once more."""

import onnx_ir

from .values import dims_of, is_standard, num_axes, producer, replace

_TYPES = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE)
"""The types for which ONNX Runtime has a `Gemm` on a CPU; float32 is converted to float16 later."""


def write_gemms(model: onnx_ir.Model) -> None:
    """Joins products of two matrices, in the main graph, with the biases that are added to them."""
    for node in list(model.graph):
        for product, bias in ((0, 1), (1, 0)):
            if is_standard(node, "Add") and _is_biased(node.inputs[product], node.inputs[bias]):
                multiplied = producer(node.inputs[product], "MatMul")
                assert multiplied is not None
                gemm = onnx_ir.node("Gemm", [*multiplied.inputs, node.inputs[bias]])
                replace(node, [gemm], gemm.outputs)
                model.graph.remove(multiplied, safe=True)
                break


def _is_biased(product: onnx_ir.Value | None, bias: onnx_ir.Value | None) -> bool:
    """Returns whether `product` is x W of two matrices and used only here, and `bias` is as long as its rows."""
    node = producer(product, "MatMul")
    if node is None or product is None or len(product.uses()) != 1 or product.is_graph_output():
        return False
    if any(num_axes(factor) != 2 for factor in node.inputs) or product.dtype not in _TYPES:
        return False
    width = dims_of(node.inputs[1])
    return width is not None and dims_of(bias) == width[1:]
