"""Builds products before they are needed, since Dynamo cannot build them: those that a trace has shown, and the usual
ways to multiply by the weight of a linear from outside the linear.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from melora_fx.adapter.site import SiteRecord
from melora_fx.errors import MELoRAError
from melora_fx.names import get_attribute
from melora_fx.patterns.node import LinearNode, argument, operator_name
from melora_fx.patterns.stacks import choice_of
from melora_fx.patterns.views import CASTS, is_view
from melora_fx.torch_private import GROUPED_MM, let_dynamo_ask

from .arguments import name_of, stand_ins
from .products import prepare_product
from .shown import Shown, Standing
from .stand_in import StandIn


def foresee_linears(owner: nn.Module, linears: Iterable[LinearNode], weight: Tensor) -> None:
    """Builds the products `linears` that traces of `owner` have shown, all with `weight`."""
    for linear in linears:
        values = _Values(owner, linear, weight)
        node = linear.node
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.of)
        _prepare(_function(node), args, kwargs)
        if _is_grouped(linear):
            let_dynamo_ask(GROUPED_MM)
        if _is_grouped(linear) and hasattr(torch.ops.transformers, "grouped_mm_fallback"):
            _prepare(torch.ops.transformers.grouped_mm_fallback, args, {"offs": kwargs["offs"]})


def _is_grouped(linear: LinearNode) -> bool:
    """Returns whether transformers replaces this operator by one of its own when Dynamo compiles."""
    return linear.matched_by is not None and not linear.matched_by.is_aten and "offs" in linear.node.kwargs


def foresee_calls(owner: nn.Module, record: SiteRecord, weight: Tensor) -> None:
    """Builds the usual products with `weight`, for a module that runs a graph."""
    like = torch.empty(weight.shape, device="meta")  # only its own operators can read a quantised weight
    stand_in = StandIn(Shown(owner, record.parameter, like, like, record.parameter, False))
    matrix, vector = torch.empty(2, 2, device="meta"), torch.empty(2, device="meta")
    rows = stand_in.t() if record.weight_is_transposed else stand_in
    for args in ((matrix, rows), (matrix, rows, vector)):
        _prepare(F.linear, args, {})
    _prepare(torch.matmul, (matrix, stand_in if record.weight_is_transposed else stand_in.t()), {})


class _Values:
    """Example values for the nodes of a trace: a stand-in for the weight, other parameters themselves, and for each
    computed value a tensor with the number of dimensions that matters.
    """

    def __init__(self, owner: nn.Module, linear: LinearNode, weight: Tensor) -> None:
        self.owner = owner
        self.parameter = linear.parameter
        self.choice = linear.choice
        self.weight = weight

    def of(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            if node.target == self.parameter:
                return StandIn(Shown(self.owner, self.parameter, self.weight, self.weight, self.parameter, False))
            return get_attribute(self.owner, str(node.target))
        shows = is_view(node) or choice_of(node) is not None
        viewed: Any = self.of(node.args[0]) if shows and isinstance(node.args[0], fx.Node) else None
        if isinstance(viewed, tuple) and operator_name(node) == "getitem":
            index: Any = node.args[1]
            return viewed[index]  # one of several parts
        if isinstance(viewed, Standing):
            return self._shown_by(node, viewed)
        if node is self.choice:
            return torch.empty(2, device="meta")
        if operator_name(node) == "unsqueeze":
            return torch.empty((2, 2, 1) if argument(node, 1, "dim") in (-1, 2) else (2, 1, 2), device="meta")
        return torch.empty(2, 2, device="meta")

    def _shown_by(self, node: fx.Node, viewed: Any) -> Any:
        """Returns the result of a view, a cast or a gather for a stand-in."""
        if operator_name(node) in CASTS:
            return viewed.to(viewed.dtype)
        if choice_of(node) is not None:
            return viewed[torch.zeros(1, dtype=torch.long, device="meta" if self.weight.is_meta else "cpu")]
        rest, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda _: 1)
        if node.op == "call_method":
            return getattr(viewed, str(node.target))(*rest, **kwargs)
        return _function(node)(viewed, *rest, **kwargs)


def _function(node: fx.Node) -> Any:
    """Returns the function that a node calls."""
    if node.op == "call_method":
        return getattr(Tensor, str(node.target))
    return node.target


def _prepare(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    shown = stand_ins(args, kwargs)[0].shown
    try:
        prepare_product(shown, name_of(function), function, args, kwargs)
    except MELoRAError:  # raised again when the product is computed
        return
