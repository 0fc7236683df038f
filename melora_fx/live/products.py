"""Products with an adapted weight that modules compute in Python of their own: each becomes one function.

    F.linear(x, weight, bias)  ⟶  product.plain(owner, x, weight, bias)

The product alone is made into a graph, matched by PATTERNS, given its adapter's nodes and lowered, as the graph of a
whole module is. The function takes the tensors of the call in order, the weight as the view of it that was multiplied
by.
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
"""Of one class of modules. A product of which there are more changes from call to call, as rows chosen by the input."""


@dataclass(frozen=True)
class Product:
    """One product with an adapted weight.

    Attributes:
        plain, lowered: (owner, *tensors) -> the product with its adapter, by plain nodes and in the site's lowering.
        code: the Python code of the plain nodes.
        is_aten: whether these are ATen alone.
    """

    plain: Callable[..., Any]
    lowered: Callable[..., Any]
    code: str
    is_aten: bool


class NoPatternError(Exception):
    """The product has no pattern, or takes the weight the other way round than the adapter was made for: the text says
    so.
    """


def make_product(
    owner: nn.Module,
    record: SiteRecord,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    view: WeightView | Stack,
) -> Product:
    """The product `function(*args, **kwargs)`, in which VIEWED stands for what `view` shows.

    Of a stack whose matrices were gathered, GATHERED stands in its place, and the function takes the numbers of the
    matrices as one more tensor, the last.

    Raises:
        NoPatternError: where it is no linear of the kind that the site was recorded as.
    """
    graph = _graph_of_call(function, args, kwargs, view)
    linear = next(find_linear_nodes(graph, owner), None)
    if linear is None:
        raise NoPatternError
    if linear.weight_is_transposed != record.weight_is_transposed:
        raise NoPatternError(" of its transpose")
    if linear.row_dims != record.row_dims:
        raise NoPatternError(" of another matrix of its values")
    assert linear.matched_by, "it was found by the walk"
    linear.matched_by.insert(graph, linear, record, weight_of(owner, record.parameter))
    if linear.gather:
        graph.erase_node(linear.gather)
    code = graph.python_code("self").src
    plain = function_of(owner, graph)
    lowered = function_of(owner, lower(graph, owner, [record]))
    return Product(plain, lowered, code, linear.matched_by.is_aten)


class _Argument:
    """What stands for the weight in the arguments of a call."""


VIEWED = _Argument()
"""The weight, or the view of it that is multiplied by."""

GATHERED = _Argument()
"""One matrix of a stack for each row."""


def _graph_of_call(function: Any, args: Any, kwargs: Any, view: WeightView | Stack) -> fx.Graph:
    """A graph of the call alone, whose inputs are its tensors."""
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
    for node in gathered:  # the matchers ask it for the numbers
        choice = graph.placeholder("choice")
        gather = graph.call_function(operator.getitem, (node, choice))
        assert isinstance(view, Stack), "of a matrix nothing is gathered"
        node.meta[KNOWN_VIEW] = replace(view, gather=gather)
    graph.output(_call(graph, function, args, kwargs))
    return graph


def _call(graph: fx.Graph, function: Any, args: Any, kwargs: Any) -> fx.Node:
    """A node of the call; methods of tensors by their names."""
    name = function.__name__
    if name == "__rmatmul__":
        return graph.call_function(torch.matmul, (args[1], args[0]))
    if name == "__matmul__":
        return graph.call_function(torch.matmul, args)
    if function is getattr(Tensor, name, None):
        return graph.call_method(name, args, kwargs)
    return graph.call_function(function, args, kwargs)


def call_product(shown: Shown, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(*args, **kwargs)`, of which one argument stands for what `shown` shows, with the adapter.

    Raises:
        MELoRAError: where it is no product that has a pattern.
    """
    product, tensors = prepare_product(shown, name, function, args, kwargs)
    _refuse_in_function(shown, tensors)
    if not torch.compiler.is_dynamo_compiling() and not kwargs and name != "bmm":  # whose matchers ask for sizes
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
    """The usual products by a shorter way; NotImplemented for others, and for what is met for the first time."""
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
    """Raises MELoRAError in the forward of an `autograd.Function`, where an adapter would get no gradient, but for
    reentrant checkpointing, which runs the forward again.
    """
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or not in_autograd_function():
        return
    if shown.is_recorded or (any(tensor.requires_grad for tensor in tensors) and not is_recomputed()):
        refuse_in_function(shown.owner, shown.parameter)


def _usual_call(function: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Shown, list[Any]] | None:
    """(key, what is shown, tensors) of a call whose product depends on the function and on how many dimensions the
    tensors have: with a weight or its transpose, and tensors of no kind of their own.
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
    """The product of such a call, and the tensors that its functions take. Errors as in `call_product`."""
    tensors: list[Any] = []
    key = f"{shown.parameter} {name}"
    for value in args:
        key += _described(value, shown, name, tensors)
    for keyword, value in kwargs.items():
        key += f" {keyword}={_described(value, shown, name, tensors)}"
        if keyword == "out" and value is not None:  # whoever reads that would have the base's
            refuse_use(shown.owner, shown.parameter, f"{name}(…, out=…)")
    if shown.choice is not None:
        tensors.append(shown.choice)
    products = type(shown.owner).melora_products
    if key not in products:
        is_compiling = torch.compiler.is_dynamo_compiling() or compiles_around()
        add = _add_uncompiled if is_compiling else _add_product  # the first imports Dynamo
        add(products, key, shown, name, function, args, kwargs)
    return products[key], tensors


def _described(value: Any, shown: Shown, name: str, tensors: list[Any]) -> str:
    """What a product depends on of one argument; tensors are added to `tensors`."""
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
    """Makes the product of a call that is met for the first time."""
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
