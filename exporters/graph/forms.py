"""Writes unmerged updates in a graph, in a form chosen for each site.

    block   x (T, N, I/N) → (N, T, I/N) · Aᵀ (N, I/N, R) · (s B)ᵀ (N, R, O/N) → (T, N, O/N): as the model computes it
    dense   x · blockdiag(A)ᵀ (I, N·R) · blockdiag(s B)ᵀ (N·R, O): no transposed copies, but N times the products

N num_blocks, R the largest rank of a block, I in_features, O out_features, T tokens.
"""

from collections.abc import Container, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import RewriteRule

from melora_fx import MELoRAConfig
from melora_fx.adapter.tensors import factor_names

from .export import Export

_SUFFIXES = {"block": ".T", "dense": ".blockdiag.T"}
"""Form → the suffix that a factor's initializer has after the factor's name."""


def choose_form(num_blocks: int, rank: int, tokens: int) -> str:
    """Returns the faster form on ONNX Runtime's CPU, according to the measurements in
    benchmarks/results/adapter_forms.csv.

    Dense is faster up to N·R = 16. At 32 the two are within 2 % of each other: dense, which has fewer nodes, is chosen
    below 64 tokens. A single block is always dense.

    Args:
        num_blocks: N.
        rank: R.
        tokens: T, the number of tokens of a typical run.
    """
    limit = 32 if tokens < 64 else 16
    return "dense" if num_blocks == 1 or num_blocks * rank <= limit else "block"


def is_dense_faster(config: MELoRAConfig, tokens: int) -> bool:
    """Returns whether `choose_form` prefers dense products."""
    return choose_form(config.num_blocks, max(config.ranks), tokens) == "dense"


def write_forms(export: Export) -> None:
    """Writes updates as dense products if the requested form says so, and records each site's form in `export.forms`.

    The dense form makes files of swappable adapters N times as large: for them "auto" chooses it only in a decoder with
    a cache, if it is faster there.

    A site that the exporter did not write as one block product stays unchanged: the parts of `split`, or a product with
    the weight on the left.
    """
    form = export.options.form
    stays_small = export.adapter.is_swappable and form.name == "auto" and not export.has_cache
    tokens = 1 if export.has_cache else _num_tokens(export.inputs)
    dense = [name for name, site in export.sites.items() if not stays_small and form.is_dense(site.config, tokens)]
    pairs = {initializer_names(name, "block") for name in dense}
    # Sites with the same input share its blocks, so unused nodes are removed after all sites have been written.
    rule = RewriteRule(_block_products, _dense_products, partial(_is_one_of, pairs), remove_nodes=False)
    rule.apply_to_model(export.graph_model)
    RemoveUnusedNodesPass()(export.graph_model)
    for name in export.sites:
        is_written = all(factor in export.graph.initializers for factor in initializer_names(name, "dense"))
        export.forms[name] = "dense" if is_written else "block"


def initializer_names(site: str, form: str) -> tuple[str, str]:
    """Returns the names of the initializers that store a site's A and B in this form: both transposed, B scaled."""
    name_a, name_b = factor_names(site)
    return f"{name_a}{_SUFFIXES[form]}", f"{name_b}{_SUFFIXES[form]}"


def add_biases_last(export: Export) -> None:
    """Turns (x Wᵀ + bias) + update into (x Wᵀ + update) + bias at every site.

    ONNX Runtime's fused activations and normalisations absorb the bias before them, as in the base's graph: with an
    update of zero they compute the base bit for bit. A graph that is spelt for a CPU stays unchanged: its products
    contain the bias.
    """
    if export.is_spelt:
        return
    for name in export.sites:
        bias = export.graph.initializers.get(f"{name}.bias")
        if bias is None:
            continue
        for biased in [node for node in bias.consumers() if node.op_type == "Add"]:
            _add_last(export.graph, biased, bias)


def _num_tokens(inputs: Mapping[str, Any]) -> int:
    """Returns the number of tokens of the example: the product of the first two sizes of its first tensor."""
    shapes = [value.shape[:2] for value in inputs.values() if isinstance(value, torch.Tensor)]
    return shapes[0].numel() if shapes else 1


def _add_last(graph: onnx_ir.Graph, biased: onnx_ir.Node, bias: onnx_ir.Value) -> None:
    """Moves the bias that the node `biased` adds after the update, if an update is added next."""
    output = biased.outputs[0]
    product = next(value for value in biased.inputs if value is not bias)
    users = list(output.consumers())
    if len(users) != 1 or users[0].op_type != "Add" or product is None:
        return
    total = users[0]
    update = next(value for value in total.inputs if value is not output)
    first = onnx_ir.node("Add", [product, update])
    last = onnx_ir.node("Add", [first.outputs[0], bias])
    for node in (first, last):
        node.outputs[0].type = total.outputs[0].type
        node.outputs[0].shape = total.outputs[0].shape
    graph.insert_before(total, [first, last])
    onnx_ir.convenience.replace_nodes_and_values(
        graph, total, [biased, total], [], [total.outputs[0]], [last.outputs[0]]
    )


def _block_products(op: Any, x: Any, into_blocks: Any, lora_a: Any, lora_b: Any, out_of_blocks: Any) -> Any:
    blocks = op.Reshape(x, into_blocks, _outputs=["blocks"])
    products = op.MatMul(op.MatMul(op.Transpose(blocks), lora_a), lora_b)
    return op.Reshape(op.Transpose(products), out_of_blocks, _outputs=["update"])


def _is_one_of(
    pairs: Container[tuple[str | None, str | None]],
    context: Any,
    x: onnx_ir.Value,
    lora_a: onnx_ir.Value,
    lora_b: onnx_ir.Value,
    blocks: onnx_ir.Value,
    update: onnx_ir.Value,
    **_: Any,
) -> bool:
    """Returns whether the products are with one of the `pairs` of names, each used once, and of rows in blocks."""
    is_asked_for = (lora_a.name, lora_b.name) in pairs
    is_used_once = len(lora_a.consumers()) == len(lora_b.consumers()) == 1
    return is_asked_for and is_used_once and bool(x.shape) and _rank(blocks) == 3 and _rank(update) == _rank(x)


def _dense_products(op: Any, x: onnx_ir.Value, lora_a: onnx_ir.Value, lora_b: onnx_ir.Value, **_: Any) -> onnx_ir.Value:
    for factor in (lora_a, lora_b):
        matrix = _block_diagonal(factor)
        name = (factor.name or "").removesuffix(_SUFFIXES["block"]) + _SUFFIXES["dense"]
        product = op.MatMul(x, op.initializer(onnx_ir.tensor(matrix, name=name)))
        product.type = x.type
        product.shape = onnx_ir.Shape([*(x.shape or ())[:-1], matrix.shape[1]])
        x = product
    return x


def _rank(value: onnx_ir.Value) -> int:
    return len(value.shape or ())


def _block_diagonal(value: onnx_ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return torch.block_diag(*torch.from_numpy(np.array(value.const_value.numpy()))).numpy()
