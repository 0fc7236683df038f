"""What a lowering is."""

from collections.abc import Callable
from typing import NamedTuple

from torch import fx, nn

from melora_fx.adapter.site import SiteRecord
from melora_fx.patterns.node import LinearNode
from melora_fx.patterns.planned_site import PlannedSite


class Lowering(NamedTuple):
    """One way to compute adapted linears in training.

    Attributes:
        name: what a site's record calls it.
        shown_as: what `MELoRAConfig.lowering` and reports call it.
        misfit: why a site cannot have it, or None.
        replace: puts one call in the place of one linear and its adapter's nodes, given the module that holds the
            graph's parameters. None: the nodes run as they are.
        is_automatic: whether "auto" may choose it; else by name only.
    """

    name: str
    shown_as: str
    misfit: Callable[[PlannedSite], str | None]
    replace: Callable[[fx.Graph, LinearNode, SiteRecord, nn.Module], None] | None
    is_automatic: bool = True
