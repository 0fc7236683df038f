"""Lowering: one way to compute adapted linears in training."""

from collections.abc import Callable
from typing import NamedTuple

from torch import fx, nn

from melora_fx.adapter.site import SiteRecord
from melora_fx.patterns.node import LinearNode
from melora_fx.patterns.planned_site import PlannedSite


class Lowering(NamedTuple):
    """One way to compute adapted linears in training.

    Attributes:
        name: its name in a site's record.
        shown_as: its name in `MELoRAConfig.lowering` and in reports.
        misfit: returns why a site cannot have it, or None.
        replace: replaces one linear with one call, most often together with its adapter's nodes; the module is the one
            that holds the graph's parameters. None: the plain nodes run.
        is_automatic: whether "auto" may choose it; if not, the configuration must name it.
    """

    name: str
    shown_as: str
    misfit: Callable[[PlannedSite], str | None]
    replace: Callable[[fx.Graph, LinearNode, SiteRecord, nn.Module], None] | None
    is_automatic: bool = True
