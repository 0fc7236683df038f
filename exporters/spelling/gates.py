"""Skips the updates of swappable adapters while there is no adapter: even an empty product copies its input.

    Gemm(x, W, b) + update(x, A, B)     becomes     Gemm(x, W, If(A has elements, update(x, A, B) + b, b))

Without an adapter the product is then the base's own. Sites with the same input, such as query, key and value, share
one `If`, because each `If` that is taken costs about 30 µs.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .values import insert_after, is_given, is_standard, producer, replace

_VIEWS = ("Reshape", "Transpose")


class _Site(NamedTuple):
    """The `product` x W + b, the `update` with `lora_a` and another factor, and their `total`."""

    lora_a: onnx_ir.Value
    update: onnx_ir.Value
    product: onnx_ir.Node
    total: onnx_ir.Node

    @property
    def x(self) -> onnx_ir.Value:
        value = self.product.inputs[0]
        assert value is not None
        return value

    @property
    def bias(self) -> onnx_ir.Value:
        value = self.product.inputs[2]
        assert value is not None
        return value


def gate_updates(model: onnx_ir.Model, factors: Iterable[tuple[str, str]]) -> None:
    """Rewrites the sums of a `Gemm` and an update; `factors`: the pairs of graph inputs that updates multiply by."""
    inputs = {value.name: value for value in model.graph.inputs}
    pairs = [(inputs[name_a], inputs[name_b]) for name_a, name_b in factors]
    updates = _nodes_of_updates(model.graph, [value for pair in pairs for value in pair])
    groups: dict[onnx_ir.Value, list[_Site]] = defaultdict(list)
    for lora_a, lora_b in pairs:
        if (site := _find_site(lora_a, lora_b, updates)) is not None:
            groups[site.x].append(site)
    for sites in groups.values():
        _gate(model.graph, sites, updates)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()  # a branch may use shapes that are computed after the input of its sites


def _nodes_of_updates(graph: onnx_ir.Graph, factors: list[onnx_ir.Value]) -> set[onnx_ir.Node]:
    """Returns the products with adapters, the views of their outputs, and the views that only they use."""
    nodes = {user for factor in factors for user in factor.consumers()}
    for node in list(graph):
        if is_standard(node, *_VIEWS) and _is_made_in(node.inputs[0], nodes):
            nodes.add(node)
    for node in reversed(list(graph)):
        users = {user for output in node.outputs for user in output.consumers()}
        if is_standard(node, *_VIEWS) and users and users <= nodes:
            nodes.add(node)
    return nodes


def _is_made_in(value: onnx_ir.Value | None, nodes: set[onnx_ir.Node]) -> bool:
    """Returns whether one of `nodes` produces the value."""
    return value is not None and value.producer() in nodes


def _find_site(lora_a: onnx_ir.Value, lora_b: onnx_ir.Value, updates: set[onnx_ir.Node]) -> _Site | None:
    """Returns the site of two factors, or None if the graph computes it in another form."""
    update = lora_b
    while users := [user for user in update.consumers() if user in updates]:
        update = users[0].outputs[0]
    totals = list(update.consumers())
    if len(totals) != 1 or not is_standard(totals[0], "Add"):
        return None
    base = next(value for value in totals[0].inputs if value is not update)
    product = producer(base, "Gemm")
    if product is None or base is None or len(base.uses()) != 1 or len(product.inputs) != 3:
        return None
    if not is_given(product.inputs[2]):  # the `If` comes before the product, and needs the bias
        return None
    return _Site(lora_a, update, product, totals[0])


def _gate(graph: onnx_ir.Graph, sites: list[_Site], updates: set[onnx_ir.Node]) -> None:
    """Inserts one `If` before the products of sites with the same input."""
    sizes = [onnx_ir.node("Size", [site.lora_a]) for site in sites]
    largest = onnx_ir.node("Max", [size.outputs[0] for size in sizes])
    is_given = onnx_ir.node("Cast", largest.outputs, {"to": onnx_ir.DataType.BOOL})
    name = (sites[0].lora_a.name or "").rpartition(".")[0]
    biases = [onnx_ir.node("Identity", [site.bias]) for site in sites]
    branches = {
        "then_branch": _updated(graph, sites, updates, f"{name}.updated"),
        "else_branch": _branch(graph, biases, len(sites), f"{name}.base"),
    }
    gate = onnx_ir.node("If", is_given.outputs, branches, num_outputs=len(sites))
    for node in (gate, is_given, largest, *sizes):
        insert_after(graph, sites[0].x, node)
    for site, added in zip(sites, gate.outputs, strict=True):
        gemm = onnx_ir.node("Gemm", [site.x, site.product.inputs[1], added], site.product.attributes)
        replace(site.total, [gemm], gemm.outputs)


def _updated(graph: onnx_ir.Graph, sites: list[_Site], updates: set[onnx_ir.Node], name: str) -> onnx_ir.Graph:
    """Builds the branch that computes the updates, each with its bias added."""
    nodes: list[onnx_ir.Node] = []
    copies: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def copied(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
        node = value.producer() if value is not None else None
        if value is None or node is None or node not in updates:
            return value
        if value not in copies:
            inputs = [copied(each) for each in node.inputs]
            nodes.append(onnx_ir.Node("", node.op_type, inputs, node.attributes.values()))
            copies[value] = nodes[-1].outputs[0]
        return copies[value]

    sums = [onnx_ir.node("Add", [copied(site.update), site.bias]) for site in sites]
    return _branch(graph, [*nodes, *sums], len(sites), name)


def _branch(graph: onnx_ir.Graph, nodes: list[onnx_ir.Node], num_outputs: int, name: str) -> onnx_ir.Graph:
    """Builds a graph without inputs that returns the outputs of the last nodes; its values get unique names."""
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"{name}.{index}"
    outputs = [node.outputs[0] for node in nodes[-num_outputs:]]
    return onnx_ir.Graph([], outputs, nodes=nodes, opset_imports=graph.opset_imports, name=name)
