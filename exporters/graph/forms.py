"""How an unmerged update is written in a graph, chosen for each site.

    block   x (T, N, I/N) → (N, T, I/N) · Aᵀ (N, I/N, R) · (s B)ᵀ (N, R, O/N) → (T, N, O/N): as the model computes it
    dense   x · blockdiag(A)ᵀ (I, N·R) · blockdiag(s B)ᵀ (N·R, O): no transposed copies, but N times the products

N num_blocks, R the largest rank of a block, I in_features, O out_features, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .export import Export
from .weights import add_initializer


def choose_form(num_blocks: int, rank: int, tokens: int) -> str:
    """The faster form on ONNX Runtime's CPU, by the measurements in benchmarks/results/adapter_forms.csv.

    Dense wins up to N·R = 16. At 32 the two are within 2 % of each other: dense, with fewer nodes, for few tokens.

    Args:
        num_blocks: N.
        rank: R.
        tokens: T of a typical run.
    """
    limit = 32 if tokens < 64 else 16
    return "dense" if num_blocks == 1 or num_blocks * rank <= limit else "block"


def write_forms(export: Export) -> None:
    """Writes each update in the form that was asked for, and notes in `export.forms` which it has."""
    export.forms = {name: export.options.form.write(export, name) for name in export.sites}
    RemoveUnusedNodesPass()(export.graph_model)


def keep_blocks(export: Export, name: str) -> str:
    """Leaves the update of a site as the model computes it."""
    return "block"


def write_dense(export: Export, name: str) -> str:
    """Writes the update of a site as two products with block-diagonal matrices.

    One that the exporter wrote in another way than one block product (the parts of `split`, a product with the weight
    on the left) stays as it is.
    """
    return "dense" if _write_dense(export.graph, name) else "block"


def write_faster(export: Export, name: str) -> str:
    """Writes the update of a site in the form that `choose_form` names."""
    config = export.sites[name].config
    form = choose_form(config.num_blocks, max(config.ranks), _num_tokens(export.inputs))
    return {"block": keep_blocks, "dense": write_dense}[form](export, name)


def add_biases_last(export: Export) -> None:
    """Turns (x Wᵀ + bias) + update into (x Wᵀ + update) + bias at every site.

    ONNX Runtime's fused activations and normalisations take the bias before them in, as in the base's graph: with an
    update of zero they compute the base bit for bit.
    """
    for name in export.sites:
        bias = export.graph.initializers.get(f"{name}.bias")
        if bias is None:
            continue
        for biased in [node for node in bias.consumers() if node.op_type == "Add"]:
            _add_last(export.graph, biased, bias)


def _num_tokens(inputs: Mapping[str, Any]) -> int:
    """Number of tokens of the example: the leading two sizes of its first tensor."""
    shapes = [value.shape[:2] for value in inputs.values() if isinstance(value, torch.Tensor)]
    return shapes[0].numel() if shapes else 1


def _add_last(graph: onnx_ir.Graph, biased: onnx_ir.Node, bias: onnx_ir.Value) -> None:
    """Moves the bias that the node `biased` adds behind the update that is added next, if one is."""
    output = biased.outputs[0]
    product = next(value for value in biased.inputs if value is not bias)
    total = _only_user(output, "Add")
    if total is None or product is None:
        return
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


def _write_dense(graph: onnx_ir.Graph, name: str) -> bool:
    """Replaces one site's block products; False where they do not stand as expected."""
    lora_a = graph.initializers.get(f"{name}.lora_a.T")
    lora_b = graph.initializers.get(f"{name}.lora_b.T")
    chain = _block_chain(lora_a, lora_b) if lora_a is not None and lora_b is not None else None
    if chain is None:
        return False
    x, update = chain
    hidden = _matmul(x, graph, f"{name}.lora_a.blockdiag.T", _block_diagonal(lora_a))
    output = _matmul(hidden.outputs[0], graph, f"{name}.lora_b.blockdiag.T", _block_diagonal(lora_b))
    output.outputs[0].name = update.name
    update.name = None
    producer = update.producer()
    assert producer is not None
    graph.insert_before(producer, [hidden, output])
    onnx_ir.convenience.replace_all_uses_with(update, output.outputs[0], replace_graph_outputs=True)
    return True


def _block_chain(lora_a: onnx_ir.Value, lora_b: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value] | None:
    """(x, update) of Reshape → Transpose → MatMul A → MatMul B → Transpose → Reshape."""
    first = _only_user(lora_a)
    second = _only_user(lora_b)
    if first is None or second is None or second.inputs[0] is not first.outputs[0]:
        return None
    into_blocks = _producer(first.inputs[0], "Transpose")
    split = _producer(into_blocks.inputs[0], "Reshape") if into_blocks else None
    out_of_blocks = _only_user(second.outputs[0], "Transpose")
    merge = _only_user(out_of_blocks.outputs[0], "Reshape") if out_of_blocks else None
    if split is None or merge is None or split.inputs[0] is None or len(split.outputs[0].shape or ()) != 3:
        return None
    x = split.inputs[0]
    if not x.shape or len(merge.outputs[0].shape or ()) != len(x.shape):
        return None
    return x, merge.outputs[0]


def _producer(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _only_user(value: onnx_ir.Value, op_type: str = "MatMul") -> onnx_ir.Node | None:
    users = list(value.consumers())
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _block_diagonal(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return torch.block_diag(*torch.from_numpy(np.array(value.const_value.numpy()))).numpy()


def _matmul(x: onnx_ir.Value, graph: onnx_ir.Graph, name: str, matrix: np.ndarray) -> onnx_ir.Node:
    node = onnx_ir.node("MatMul", [x, add_initializer(graph, name, matrix)])
    assert x.shape is not None
    node.outputs[0].type = x.type
    node.outputs[0].shape = onnx_ir.Shape([*x.shape[:-1], matrix.shape[1]])
    return node
