"""Adapts the products with a weight that modules compute in their own Python: each product becomes one function.

    F.linear(x, weight, bias)  ⟶  product.plain(owner, x, weight, bias)

The product becomes a graph of its own, which is matched by PATTERNS, gets its adapter's nodes and is lowered, like the
graph of a whole module. The function takes the tensors of the call in order. Its weight argument is the view by which
the call multiplies.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from melora_fx.adapter.site import SiteRecord
from melora_fx.capture.expert_layers import NO_FORWARD_MODE
from melora_fx.capture.graphs import function_of
from melora_fx.errors import MELoRAError
from melora_fx.lowering.lowerings import lower, needs_plain_nodes
from melora_fx.patterns.node import KNOWN_SHAPE, weight_of
from melora_fx.patterns.patterns import find_linear_nodes
from melora_fx.patterns.stacks import Stack
from melora_fx.patterns.views import KNOWN_VIEW, WeightView
from melora_fx.torch_private import compiles_around, in_autograd_function, in_forward_mode, never_compiled

from .reader import is_adapted, is_recomputed
from .refusals import record_of, refuse_in_function, refuse_use
from .shown import PLAIN, Shown, Standing, view_text, weight_shown

_MOST_PRODUCTS = 512
"""Largest number of products of one class of modules. A class with more has a product that changes from call to call,
as with rows that the input chooses."""


@dataclass(frozen=True)
class Product:
    """One product with an adapted weight.

    Attributes:
        plain, lowered: (owner, *tensors) -> the product with its adapter, with plain nodes and in the site's lowering.
        code: the Python code of the plain nodes.
        is_aten: whether all plain nodes are ATen.
    """

    plain: Callable[..., Any]
    lowered: Callable[..., Any]
    code: str
    is_aten: bool


class NoPatternError(Exception):
    """The product has no pattern, or uses the weight in another orientation or as another matrix than the adapter. The
    text says which.
    """


def make_product(
    owner: nn.Module,
    record: SiteRecord,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    view: WeightView | Stack,
) -> Product:
    """Returns the product `function(*args, **kwargs)`, in which VIEWED marks the argument that `view` describes.

    If the matrices of a stack were gathered, GATHERED marks that argument, and the functions of the product take the
    indices of the matrices as one more tensor, the last.

    Raises:
        NoPatternError: if the call is not a linear of the kind in `record`.
    """
    graph = _graph_of_call(function, args, kwargs, view)
    linear = next(find_linear_nodes(graph, owner), None)
    if linear is None:
        raise NoPatternError
    if linear.weight_is_transposed != record.weight_is_transposed:
        raise NoPatternError(" of its transpose")
    if linear.row_dims != record.row_dims:
        raise NoPatternError(" of another matrix with its values")
    assert linear.matched_by, "it was found by the walk"
    linear.matched_by.insert(graph, linear, record, weight_of(owner, record.parameter))
    if linear.gather:
        graph.erase_node(linear.gather)
    code = graph.python_code("self").src
    plain = function_of(owner, graph)
    lowered = function_of(owner, lower(graph, owner, [record]))
    return Product(plain, lowered, code, linear.matched_by.is_aten)


class _Argument:
    """A marker for the weight in the arguments of a call."""


VIEWED = _Argument()
"""Marks the weight, or the view of it by which the call multiplies."""

GATHERED = _Argument()
"""Marks one gathered matrix of a stack for each row."""


def _graph_of_call(function: Any, args: Any, kwargs: Any, view: WeightView | Stack) -> fx.Graph:
    """Returns a graph of only the call, with the tensors of the call as its inputs."""
    graph = fx.Graph()
    gathered: list[fx.Node] = []

    def input_for(value: Any) -> Any:
        if isinstance(value, _Argument):
            node = graph.placeholder("weight")
            node.meta[KNOWN_VIEW] = view
            gathered.extend([node] if value is GATHERED else [])
            return node
        if not isinstance(value, Tensor | fx.Proxy):
            return value
        node = graph.placeholder(f"tensor_{len(graph.nodes)}")
        if isinstance(value, Tensor):
            node.meta[KNOWN_SHAPE] = value.shape
        return node

    args = map_aggregate(args, input_for)
    kwargs = map_aggregate(kwargs, input_for)
    for node in gathered:  # the matchers read the indices from it
        choice = graph.placeholder("choice")
        gather = graph.call_function(operator.getitem, (node, choice))
        assert isinstance(view, Stack), "only the matrices of a stack are gathered"
        node.meta[KNOWN_VIEW] = replace(view, gather=gather)
    graph.output(_call(graph, function, args, kwargs))
    return graph


def _call(graph: fx.Graph, function: Any, args: Any, kwargs: Any) -> fx.Node:
    """Adds a node of the call and returns it; methods of tensors are called by name."""
    name = function.__name__
    if name == "__rmatmul__":
        return graph.call_function(torch.matmul, (args[1], args[0]))
    if name == "__matmul__":
        return graph.call_function(torch.matmul, args)
    if function is getattr(Tensor, name, None):
        return graph.call_method(name, args, kwargs)
    return graph.call_function(function, args, kwargs)


def call_product(shown: Shown, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Computes `function(*args, **kwargs)` with the adapter; one argument is a stand-in that shows `shown`.

    Raises:
        MELoRAError: if the call is not a product with a pattern, has an `out`, or would give the adapter no gradient or
            no forward-mode derivative.
    """
    product, tensors = prepare_product(shown, name, function, args, kwargs)
    _refuse_in_function(shown, tensors)
    if not torch.compiler.is_dynamo_compiling() and not kwargs and name != "bmm":  # the matchers of bmm depend on sizes
        usual = _usual_call(function, args)
        if usual:
            type(shown.owner).melora_usual[usual[0]] = product
    return _run(product, shown.owner, tensors)


def _run(product: Product, owner: nn.Module, tensors: list[Any]) -> Any:
    if not product.is_aten and in_forward_mode():
        raise MELoRAError(NO_FORWARD_MODE)
    run = product.plain if needs_plain_nodes() else product.lowered
    return run(owner, *tensors)


def call_again(function: Any, args: tuple[Any, ...]) -> Any:
    """Computes a usual product in a shorter way; returns NotImplemented for others, and for the first call of one."""
    usual = _usual_call(function, args)
    if usual is None:
        return NotImplemented
    key, shown, tensors = usual
    owner = shown.owner
    product = type(owner).melora_usual.get(key) if is_adapted(owner) else None
    if product is None:
        return NotImplemented
    _refuse_in_function(shown, tensors)
    return _run(product, owner, tensors)


def _refuse_in_function(shown: Shown, tensors: list[Any]) -> None:
    """Raises MELoRAError in the forward of an `autograd.Function`, in which an adapter would get no gradient. Reentrant
    checkpointing, which runs the forward again, is allowed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or not in_autograd_function():
        return
    if shown.is_recorded or (any(tensor.requires_grad for tensor in tensors) and not is_recomputed()):
        refuse_in_function(shown.owner, shown.parameter)


def _usual_call(function: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Shown, list[Any]] | None:
    """Returns (key, what the stand-in shows, tensors) of a usual call, whose arguments are a weight or its transpose,
    plain tensors and None: its product depends only on the function and the tensors' numbers of dimensions. Returns
    None for other calls.
    """
    key = [function]
    tensors = []
    shown: Shown | None = None
    for value in args:
        if type(value) in PLAIN:
            tensors.append(value)
            key.append(value.ndim)
        elif value is None:
            key.append(None)
        elif shown is None and isinstance(value, Standing) and value.shown.plain:
            shown = value.shown
            tensors.append(shown.value)
            key.append(shown.plain)
        else:
            return None
    return None if shown is None else (tuple(key), shown, tensors)


def prepare_product(
    shown: Shown, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Product, list[Any]]:
    """Returns the product of a call, built on first use, and the tensors that its functions take.

    Raises:
        MELoRAError: if the call is not a product with a pattern, or has an `out`.
    """
    tensors: list[Any] = []
    key = f"{shown.parameter} {name}"
    for value in args:
        key += _described(value, shown, name, tensors)
    for keyword, value in kwargs.items():
        key += f" {keyword}={_described(value, shown, name, tensors)}"
        if keyword == "out" and value is not None:  # it would contain the product without the adapter
            refuse_use(shown.owner, shown.parameter, f"{name}(…, out=…)")
    if shown.choice is not None:
        tensors.append(shown.choice)
    products = type(shown.owner).melora_products
    if key not in products:
        is_compiling = torch.compiler.is_dynamo_compiling() or compiles_around()
        add = _add_uncompiled if is_compiling else _add_product  # `_add_uncompiled` imports Dynamo
        add(products, key, shown, name, function, args, kwargs)
    return products[key], tensors


def _described(value: Any, shown: Shown, name: str, tensors: list[Any]) -> str:
    """Returns everything about one argument that a product depends on, as text, and adds its tensors to `tensors`."""
    if isinstance(value, Standing):
        tensors.append(shown.value)
        return view_text(shown)
    if isinstance(value, Tensor):
        tensors.append(value)
        if value.dim() == 1:
            return " vector"
        if name == "bmm" and 1 in value.shape[1:]:
            return f" row {value.shape[1] == 1}"
        return " tensor"
    if value is None:
        return " None"
    if isinstance(value, fx.Proxy):
        tensors.append(value)
        return " proxy"
    if isinstance(value, list | tuple):
        return f" [{', '.join([_described(item, shown, name, tensors) for item in value])}]"
    return f" {value}"


def _add_product(
    products: dict[str, Product], key: str, shown: Shown, name: str, function: Any, args: Any, kwargs: Any
) -> None:
    """Builds the product of a new call and adds it to `products`."""
    record = record_of(shown.owner, shown.parameter)
    view = weight_shown(shown)
    argument = VIEWED if shown.choice is None else GATHERED

    def standing(value: Any) -> Any:
        return argument if isinstance(value, Standing) else value

    try:
        if view is None:
            raise NoPatternError
        if len(products) >= _MOST_PRODUCTS:
            raise NoPatternError(f" in more than {_MOST_PRODUCTS} ways (rows or numbers that change from call to call)")
        args, kwargs = map_aggregate((args, kwargs), standing)
        products[key] = make_product(shown.owner, record, function, args, kwargs, view)
    except NoPatternError as error:
        refuse_use(shown.owner, shown.parameter, f"{name}{error}")


_add_uncompiled = never_compiled(_add_product)
