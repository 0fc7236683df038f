"""LOWERINGS: the ways to compute adapted linears in training, the choice for a site, and the pass that applies them.

The pass builds a separate graph for training. The plain graph is still the one that is printed, copied, saved and
exported. It also runs whenever the call of a lowering is not supported (`needs_plain_nodes`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from melora_fx.adapter.site import SiteRecord
from melora_fx.adapter.tensors import SCALING
from melora_fx.capture.graphs import copy_graph
from melora_fx.patterns.patterns import find_linear_nodes
from melora_fx.patterns.planned_site import PlannedSite
from melora_fx.torch_private import in_forward_mode, in_functorch, in_fx_trace, is_exporting

from .grouped_call import GROUPED
from .lowering import Lowering
from .one_call import ACTIVATION, TRITON, WEIGHT
from .quantized_gradient import passes_gradient


def _misfit_of_plain(site: PlannedSite) -> str | None:
    if passes_gradient(site.weight):
        return None
    kind = type(site.weight).__name__
    remedy = ": use 'auto'" if site.config.lowering == "plain" else ", and the other lowerings need the whole weight"
    return f"`lowering` (='plain') passes no gradient through this {kind}{remedy}"


PLAIN = Lowering("plain", "plain", _misfit_of_plain, None)

aten = torch.ops.aten

LOWERINGS = (WEIGHT, ACTIVATION, TRITON, GROUPED, PLAIN)
"""In order of preference: "auto" chooses the first automatic lowering without a misfit."""


def choose_lowering(site: PlannedSite) -> Lowering | None:
    """Returns the first lowering that the site's configuration allows and that fits, or None."""
    return next((lowering for lowering in _allowed(site) if lowering.misfit(site) is None), None)


def lowering_misfit(site: PlannedSite) -> str | None:
    """Returns why no lowering that the site's configuration allows fits, or None if one fits."""
    if choose_lowering(site):
        return None
    reasons = [lowering.misfit(site) for lowering in _allowed(site)]
    return reasons[-1 if site.config.lowering == "auto" else 0]


def lowering_named(name: str) -> Lowering:
    """Returns the lowering with this name, as a site's record stores it."""
    return next(lowering for lowering in LOWERINGS if lowering.name == name)


def lower(graph: fx.Graph, owner: nn.Module, records: Iterable[SiteRecord]) -> fx.Graph:
    """Returns a copy of `graph` in which the sites of `records` are lowered; `owner` holds the graph's parameters."""
    lowered = copy_graph(graph)
    by_parameter = {record.parameter: record for record in records}
    for linear in reversed(list(find_linear_nodes(lowered, owner))):  # an earlier one may erase a later one's input
        record = by_parameter.get(linear.parameter)
        replace = lowering_named(record.lowering).replace if record else None
        if record and replace:
            replace(lowered, linear, record, owner)
    for record in by_parameter.values():
        _scale_in_dtype_of_b(lowered, record)
    return lowered


def _scale_in_dtype_of_b(graph: fx.Graph, record: SiteRecord) -> None:
    """Casts s B to the dtype of B at run time, which FSDP's policy may change, if the adapter's nodes stay."""
    for scaling in graph.find_nodes(op="get_attr", target=record.path(SCALING)):
        for product in [user for user in scaling.users if user.target is aten.mul.Tensor]:
            with graph.inserting_after(product):
                cast = graph.call_function(_in_dtype_of, (product, product.args[0]))
            product.replace_all_uses_with(cast, delete_user_cb=lambda user, own=cast: user is not own)


def _in_dtype_of(scaled: Tensor, lora_b: Tensor) -> Tensor:
    """Returns `scaled.type_as(lora_b)`; faster than that call if the dtypes are equal."""
    return scaled if scaled.dtype == lora_b.dtype else scaled.type_as(lora_b)


def needs_plain_nodes() -> bool:
    """Returns whether the plain nodes must run: exporters and traces need them, `vmap` has no rule for the call."""
    if in_functorch() or in_forward_mode():
        return True
    if torch.compiler.is_compiling():
        return is_exporting()
    return torch.jit.is_tracing() or in_fx_trace()


def _allowed(site: PlannedSite) -> list[Lowering]:
    wanted = site.config.lowering
    if wanted == "auto":
        return [lowering for lowering in LOWERINGS if lowering.is_automatic]
    return [lowering for lowering in LOWERINGS if lowering.shown_as == wanted]
