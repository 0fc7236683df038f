"""The lowerings "weight", "activation" and "triton": one call of `adapted_linear` for a linear and its adapter."""

import functools

import torch
from torch import fx, nn

from melora_fx.adapter.site import SITE_TAG, SiteRecord
from melora_fx.adapter.tensors import DROPOUT, FACTORS, SCALING, features_of
from melora_fx.distributed.tensors import is_sharded
from melora_fx.patterns.node import LinearNode, weight_of
from melora_fx.patterns.planned_site import PlannedSite

from . import by_triton
from .adapted_linear import adapted_linear
from .cost import WIDE
from .lowering import Lowering

aten = torch.ops.aten


def _misfit_of_weight(site: PlannedSite) -> str | None:
    """Returns why W + Δ cannot be computed without rounding it to fewer than 32 bits, or None."""
    if reason := _no_linear(site, "weight"):
        return reason
    if site.config.dropout:
        return "`lowering` (='weight') cannot apply dropout to the adapter's input only: use 'auto' or 'activation'"
    if (type(site.weight) is nn.Parameter or is_sharded(site.weight)) and site.weight.dtype in WIDE:
        return None
    kind = f"{type(site.weight).__name__} of {str(site.weight.dtype).removeprefix('torch.')}"
    return f"`lowering` (='weight') would round W + Δ to this {kind} in every step: use 'auto' or 'activation'"


def _misfit_of_activation(site: PlannedSite) -> str | None:
    return _no_linear(site, "activation")


def _misfit_of_triton(site: PlannedSite) -> str | None:
    if reason := _no_linear(site, "triton"):
        return reason
    return by_triton.MISSING if site.weight.is_cuda and not by_triton.is_installed() else None


def _no_linear(site: PlannedSite, name: str) -> str | None:
    if all(node.operands for node in site.nodes):
        return None
    return f"`lowering` (={name!r}) needs a linear that is an `F.linear` of the whole weight: use 'auto'"


def _replace(graph: fx.Graph, linear: LinearNode, record: SiteRecord, owner: nn.Module, *, form: str) -> None:
    """Replaces the linear and its adapter's nodes with one call of `adapted_linear` in this `form`.

    A packed linear stays: the call gets its output as the base.
    """
    operands = linear.operands
    if operands is None:  # the linear has changed since `rewrite`
        return
    matrix = record.matrices_of(weight_of(owner, record.parameter))
    _, out_features = features_of(matrix, is_transposed=record.weight_is_transposed)
    parts = record.config.parts(out_features)
    totals = (user for user in linear.node.users if user.target is aten.add.Tensor and SITE_TAG in user.meta)
    total = next(totals, None)
    if total is None:  # its output is unused: its nodes were erased with those of another product with the weight
        return
    with graph.inserting_before(total):
        tensors = [graph.get_attr(record.path(kind)) for kind in (*FACTORS, SCALING)]
        dropout = graph.get_attr(record.path(DROPOUT)) if record.config.dropout else None
        if operands.weight is None:
            arguments = (linear.input, None, None, *tensors, dropout, parts, form, linear.node)
        else:
            weight = graph.call_function(aten.t.default, (operands.weight,)) if operands.is_flipped else operands.weight
            arguments = (linear.input, weight, operands.bias, *tensors, dropout, parts, form)
        call = graph.call_function(adapted_linear, arguments)
    call.meta = dict(total.meta)
    total.replace_all_uses_with(call)
    for node in [*_behind(graph, record), linear.node]:
        if not node.users:
            graph.erase_node(node)


def _behind(graph: fx.Graph, record: SiteRecord) -> list[fx.Node]:
    """Returns the nodes that `rewrite` inserted for the site, last first."""
    return [node for node in reversed(graph.nodes) if node.meta.get(SITE_TAG) == record.parameter]


WEIGHT = Lowering("weight", "weight", _misfit_of_weight, functools.partial(_replace, form="weight"))

ACTIVATION = Lowering("activation", "activation", _misfit_of_activation, functools.partial(_replace, form="activation"))

# Has run only in Triton's interpreter; whether it is faster on a GPU has not been measured yet.
TRITON = Lowering("triton", "triton", _misfit_of_triton, functools.partial(_replace, form="triton"), is_automatic=False)
