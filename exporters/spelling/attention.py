"""Writes the attentions of torch's and transformers' exporters in fewer nodes."""

from typing import Any

import onnx_ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

from .values import constant_of, dims_of, is_standard, num_axes, producer


def shorten_attentions(model: onnx_ir.Model) -> None:
    """Writes the transposition of the keys as one node, and removes masks that mask nothing and copies of a bias."""
    _SHORTER.apply_to_model(model)
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def drop_zeros(model: onnx_ir.Model) -> None:
    """Removes the zeros for tokens that may attend to nothing.

    Such a token then gets the mean of the values, as in transformers' eager attention.
    """
    RewriteRule(_zeroed, _states, remove_nodes=False).apply_to_model(model)
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def drop_returns(model: onnx_ir.Model) -> None:
    """Removes reshapes of reshapes, which transformers' fusions leave around the attentions that they write out."""
    for node in list(model.graph):
        before = producer(node.inputs[0], "Reshape") if is_standard(node, "Reshape") else None
        if before is None:
            continue
        if _leads_back(before, node):
            onnx_ir.convenience.replace_all_uses_with(node.outputs, before.inputs[:1])  # type: ignore[arg-type]
        elif (sizes := constant_of(node.inputs[1])) is not None and 0 not in sizes:
            node.replace_input_with(0, before.inputs[0])
    RemoveUnusedNodesPass()(model)


def _leads_back(joined: onnx_ir.Node, parted: onnx_ir.Node) -> bool:
    """Returns whether the heads (B, T, H, D) are joined and then split again."""
    into, out_of = constant_of(joined.inputs[1]), constant_of(parted.inputs[1])
    if into is None or out_of is None or into.tolist() != [0, 0, -1] or out_of.tolist()[:2] != [0, 0]:
        return False
    heads = dims_of(joined.inputs[0])
    return heads is not None and len(heads) == 4 and list(out_of[2:]) in ([heads[2], -1], [-1, heads[3]])


def _keys_by_reshapes(op: Any, keys: Any, start: Any, end: Any) -> Any:
    shape = op.Shape(keys)
    width = op.Slice(shape, [-1], end)
    length = op.Slice(shape, [-2], [-1])
    leading = op.Slice(shape, start, [-2], _allow_other_inputs=True)
    joined = op.Transpose(op.Reshape(keys, op.Concat([-1], length, width, axis=0)), perm=[0, 2, 1])
    return op.Reshape(joined, op.Concat(leading, width, length, axis=0))


def _have_heads(context: Any, keys: onnx_ir.Value, **_: Any) -> bool:
    return num_axes(keys) == 4


def _swapped_keys(op: Any, keys: onnx_ir.Value, **_: Any) -> onnx_ir.Value:
    return op.Transpose(keys, perm=[0, 1, 3, 2])


def _masked(op: Any, scores: Any, allowed: Any, least: Any) -> Any:
    return op.Add(scores, op.Mul(op.Cast(op.Not(allowed)), least))


def _scores(op: Any, scores: onnx_ir.Value, **_: Any) -> onnx_ir.Value:
    return op.Identity(scores)


def _zeroed(op: Any, allowed: Any, states: Any) -> Any:
    num_allowed = op.ReduceSum(op.Cast(allowed), [-1], keepdims=1)
    return op.Where(op.Less(num_allowed, 1.0), 0.0, states)


def _states(op: Any, states: onnx_ir.Value, **_: Any) -> onnx_ir.Value:
    return op.Identity(states)


def _is_true(context: Any, allowed: onnx_ir.Value, **_: Any) -> bool:
    """Returns whether a mask allows everything: it consists of copies of a constant that does."""
    copies = producer(allowed, "Expand")
    mask = copies.inputs[0] if copies is not None else None
    tensor = mask.const_value if mask is not None and not mask.is_graph_input() else None
    return tensor is not None and bool(tensor.numpy().all())


def _with_copies(op: Any, scores: Any, bias: Any, shape: Any) -> Any:
    return op.Add(scores, op.Expand(bias, shape, _outputs=["copies"]))


def _are_needless(context: Any, scores: onnx_ir.Value, copies: onnx_ir.Value, **_: Any) -> bool:
    """Returns whether the copies are needless, because the sum broadcasts the bias itself."""
    dims = dims_of(scores)
    return dims is not None and dims == dims_of(copies)


def _without_copies(op: Any, scores: onnx_ir.Value, bias: onnx_ir.Value, **_: Any) -> onnx_ir.Value:
    return op.Add(scores, bias)


_SHORTER = RewriteRuleSet(
    [
        RewriteRule(_keys_by_reshapes, _swapped_keys, _have_heads),
        RewriteRule(_masked, _scores, _is_true, remove_nodes=False),
        RewriteRule(_zeroed, _states, _is_true, remove_nodes=False),
        RewriteRule(_with_copies, _without_copies, _are_needless, remove_nodes=False),
    ]
)
