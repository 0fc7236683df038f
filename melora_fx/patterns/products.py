"""Finds the products that a parameter takes part in, in any form, in the graph of a module or of a whole model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx, nn

from melora_fx.names import get_attribute
from melora_fx.torch_private import is_operator, is_packet, is_region, tree_leaves

from .node import CALLS, argument, operator_name
from .stacks import choice_of
from .views import is_view, num_arguments

_WITH_WEIGHTS = {
    *("__matmul__", "__rmatmul__", "imatmul", "rmatmul"),
    *("mm", "matmul", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "linear", "tensordot", "inner"),
    *("linalg_multi_dot", "chain_matmul", "bilinear", "sparse_mm", "_sparse_mm", "linear_cross_entropy"),
    *("_grouped_mm", "grouped_mm", "grouped_mm_fallback", "multi_head_attention_forward"),
}
"""Operators that multiply by weights, as linears do."""

RECURRENT = {
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
}

REGIONS = {"wrap_with_autocast", "wrap_with_set_grad_enabled"}
"""Regions of a forward that an exported graph keeps as separate graphs."""

CONVOLUTIONS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv_tbc"),
    *("convolution", "_convolution"),
}

_OTHERS = {
    *("dot", "vdot", "vecdot", "linalg_vecdot", "kron", "scaled_dot_product_attention", "cdist", "_euclidean_dist"),
    *("matrix_power", "linalg_matrix_power", "matrix_exp", "linalg_matrix_exp", "cov", "corrcoef"),
    *("pinverse", "linalg_pinv", "inverse", "linalg_inv", "linalg_solve", "linalg_solve_ex", "linalg_lstsq"),
    *("linalg_solve_triangular", "triangular_solve", "cholesky_solve", "lu_solve", "linalg_lu_solve", "ormqr"),
    *("linalg_householder_product", "svd_lowrank", "pca_lowrank"),
}

_ADDED_FIRST = {"addmm", "addmv", "addbmm", "baddbmm"}
"""Operators whose first argument is added to the product."""


class Product(NamedTuple):
    """A product with a parameter, or with a value that is computed only from it and other tensors of the module.

    Attributes:
        node: the operator, the region that contains it, or the call of a child that may multiply.
        text: the operators from the parameter to the product: "mul, linear".
        is_with_weight: whether the operator multiplies by weights, as linears do, or is custom and may do so.
    """

    node: fx.Node
    text: str
    is_with_weight: bool


@dataclass
class Products:
    """The products of a graph whose parameters are in `owner`."""

    owner: nn.Module
    _of_parameters: dict[fx.Node, bool] = field(default_factory=dict)

    def with_(self, read: fx.Node) -> Iterator[Product]:
        """Yields the products with the parameter of the `get_attr` node `read`: whole, in part, viewed, masked or
        normalised.
        """
        seen: set[fx.Node] = set()
        pending = [(read, "")]
        while pending:
            node, before = pending.pop()
            for user in node.users:
                if _is_added(user, node):
                    continue
                name = operator_name(user)
                is_with_weight = name in _WITH_WEIGHTS | RECURRENT or _is_custom(user)
                is_other = name in _OTHERS or name in CONVOLUTIONS or self._may_multiply(user)
                if is_with_weight or is_other:
                    yield Product(user, before + name, is_with_weight)
                for region, given in self._regions(user, node):
                    for inside in region.with_(given):
                        yield Product(user, f"{before}{name}: {inside.text}", inside.is_with_weight)
                follows = is_view(user) or choice_of(user) is not None or self._is_of_parameters(user)
                if follows and not is_with_weight and user not in seen:
                    seen.add(user)
                    pending.append((user, before if is_view(user) else f"{before}{name}, "))

    def _regions(self, user: fx.Node, node: fx.Node) -> Iterator[tuple["Products", fx.Node]]:
        """Yields each graph of a region (autocast, no gradients, a branch) that gets `node`, and its placeholder."""
        if not is_region(user.target):
            return
        for graph_node in user.all_input_nodes:
            region = get_attribute(self.owner, str(graph_node.target)) if graph_node.op == "get_attr" else None
            if not isinstance(region, fx.GraphModule):
                continue
            placeholders = region.graph.find_nodes(op="placeholder")
            operands = tree_leaves((user.args, user.kwargs))[-len(placeholders) :]
            for placeholder, operand in zip(placeholders, operands, strict=False):
                if operand is node:
                    yield Products(region), placeholder

    def _may_multiply(self, node: fx.Node) -> bool:
        """Returns whether `node` calls a module that has matrices, or that receives inputs which it may multiply."""
        is_call = node.op == "call_module"
        return is_call and (self._has_matrices(node) or not self._is_of_parameters(node))

    def _has_matrices(self, node: fx.Node) -> bool:
        """Returns whether `node` calls a module with matrices among its parameters."""
        if node.op != "call_module":
            return False
        called = get_attribute(self.owner, str(node.target))
        return not isinstance(called, nn.Module) or any(value.dim() > 1 for value in called.parameters())

    def _is_of_parameters(self, node: fx.Node) -> bool:
        """Returns whether `node` is computed only from tensors of the module, not from its inputs."""
        if node not in self._of_parameters:
            for each in node.graph.nodes:
                is_made = each.op in CALLS or (each.op == "call_module" and not self._has_matrices(each))
                of_sources = all(self._of_parameters[source] for source in each.all_input_nodes)
                self._of_parameters[each] = of_sources if is_made else each.op == "get_attr"
        return self._of_parameters[node]


def _is_custom(node: fx.Node) -> bool:
    """Returns whether `node` calls a custom operator, which may multiply."""
    target = node.target
    return (is_operator(target) or is_packet(target)) and not str(target).startswith(("aten.", "prims."))


def _is_added(user: fx.Node, node: fx.Node) -> bool:
    """Returns whether `user` adds the value of `node` to a product of other values."""
    name = operator_name(user)
    if name in _ADDED_FIRST:
        added = argument(user, 0, "input", "self")
    elif name == "scaled_dot_product_attention":
        added = argument(user, 3, "attn_mask")
    else:
        return False
    return added is node and num_arguments(user, node) == 1
