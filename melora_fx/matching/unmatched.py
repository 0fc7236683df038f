"""Finds parameters that take part in products and are no linear's weight, and the products."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.export import ExportedProgram

from melora_fx.capture.graphs import Capture
from melora_fx.names import get_attribute, join_path, site_name
from melora_fx.patterns.node import LinearNode
from melora_fx.patterns.patterns import find_linear_nodes
from melora_fx.patterns.planned_site import PlannedSite
from melora_fx.patterns.products import Product, Products
from melora_fx.torch_private import DERIVED_SUFFIXES

from .linears import is_own, reads_of


@dataclass
class Unmatched:
    """A parameter with two or more dimensions that is no site's weight, and the products with it.

    Attributes:
        capture: the first capture with such a product.
        path: path of the parameter below the captured module.
        products: products that multiply by it in forms without a pattern.
        linears: linears that it is an input of, and linears in which another module multiplies by it.
        others: products of other kinds, and calls of modules that receive it.
    """

    capture: Capture
    path: str
    parameter: nn.Parameter
    products: list[Product]
    linears: list[LinearNode]
    others: list[Product]

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return get_attribute(self.capture.module, self.path.rpartition(".")[0])

    @property
    def is_foreign(self) -> bool:
        """Whether a module that runs its own forward reads the parameter from another module."""
        return self.capture.runs_own_forward and not is_own(self.path)

    @property
    def reader(self) -> str:
        """The path of the captured module, or its class if it is the root."""
        return self.capture.path or type(self.capture.module).__name__

    @property
    def has_pattern(self) -> bool:
        """Whether a linear multiplies by the parameter."""
        return any(linear.parameter == self.path for linear in self.linears)

    @property
    def inputs_of(self) -> list[str]:
        """The weights of the linears that the parameter is an input of."""
        return list(dict.fromkeys(linear.parameter for linear in self.linears if linear.parameter != self.path))


def find_unmatched(
    model: nn.Module | ExportedProgram, captures: Iterable[Capture], linears: Collection[PlannedSite]
) -> dict[str, Unmatched]:
    """Returns name → a parameter and its products; all graphs together have one entry for each name."""
    matched = {linear.name for linear in linears}
    nodes = {node.node: node for linear in linears for node in linear.nodes}
    found: dict[str, Unmatched] = {}
    for capture in captures:
        if capture.runs_own_forward:  # including the linears of other modules' weights
            own = [linear for graph in capture.graphs for linear in find_linear_nodes(graph, capture.module)]
            nodes |= {linear.node: linear for linear in own}
        products = Products(capture.module)
        for read in reads_of(capture.graphs):
            path = str(read.target)
            parameter = get_attribute(capture.module, path)
            name = name_of_weight(model, join_path(capture.path, path))
            if name in matched or not isinstance(parameter, nn.Parameter) or not is_matrix(parameter):
                continue
            for product in products.with_(read):
                entry = found.setdefault(name, Unmatched(capture, path, parameter, [], [], []))
                if product.node in nodes:
                    entry.linears.append(nodes[product.node])
                else:
                    (entry.products if product.is_with_weight else entry.others).append(product)
    return found


def is_matrix(parameter: Tensor) -> bool:
    """Returns whether `parameter` is real or complex and has two dimensions, or more of which two are above 1."""
    is_number = parameter.is_floating_point() or parameter.is_complex()
    return is_number and (parameter.dim() == 2 or sum(size > 1 for size in parameter.shape) > 1)


def name_of_weight(model: nn.Module | ExportedProgram, path: str) -> str:
    """Returns the site name of a parameter, or of the weight that its module computes from it."""
    owner, _, name = path.rpartition(".")
    before, marked, after = f".{path}".partition(".parametrizations.")
    if marked:
        owner, name = before[1:], after.split(".")[0]
    elif isinstance(model, nn.Module):
        module = get_attribute(model, owner)
        made = [name.removesuffix(suffix) for suffix in (*DERIVED_SUFFIXES, "_g") if name.endswith(suffix)]
        if made and isinstance(getattr(module, "__dict__", {}).get(made[0]), Tensor):
            name = made[0]
    return site_name(owner, name)
