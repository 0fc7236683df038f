"""What a site is, as graphs and modules record it.

The inserted nodes of a graph carry the tag of their site; the module that runs the graph keeps one record for each.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from melora_fx.config import MELoRAConfig
from melora_fx.names import get_attribute, join_path, site_name

from .tensors import FACTORS, AdapterTensors, as_matrices

SITE_TAG = "melora_site"
"""Key in `node.meta` of every inserted node: the path of the site's parameter below the rewritten module."""

MODULE_MARK = "melora_mark"
"""Attribute of every rewritten module: what it is, among it the records of its sites."""


@dataclass
class SiteRecord:
    """Recorded in the rewritten module: one site of its graph.

    `parameter`: path of the weight below that module. `is_aten`: whether the adapter's nodes are ATen alone, which
    forward-mode derivatives and ONNX need. `row_dims`: as in `as_matrices`. `is_absent`: whether the adapter that was
    loaded last lacks the site, whose A and B are zero then. `saved_config`: its own configuration, where that names a
    lowering or a dropout that the graph does not compute with.
    """

    parameter: str
    config: MELoRAConfig
    pattern: str
    weight_is_transposed: bool
    lowering: str
    is_aten: bool = True
    row_dims: int | None = None
    is_absent: bool = False
    saved_config: MELoRAConfig | None = None

    def matrices_of(self, weight: Tensor) -> Tensor:
        """The weight as it is multiplied by, a matrix or a stack of such, which lie transposed or not: a view."""
        return as_matrices(weight, self.row_dims)

    @property
    def file_config(self) -> MELoRAConfig:
        """The configuration as the adapter's file has it."""
        return self.saved_config or self.config

    @property
    def owner_path(self) -> str:
        """Path of the module that holds the weight, below the rewritten module."""
        return self.parameter.rpartition(".")[0]

    @property
    def parameter_name(self) -> str:
        """Name of the weight on its owner."""
        return self.parameter.rpartition(".")[2]

    def attribute(self, kind: str) -> str:
        """Name, on the weight's owner, of one of `tensors.TENSORS`."""
        return self.attribute_of(self.parameter, kind)

    @staticmethod
    def attribute_of(parameter: str, kind: str) -> str:
        """The same for a parameter that is no site yet."""
        name = parameter.rpartition(".")[2]
        return kind if name == "weight" else f"{name}_{kind}"

    def path(self, kind: str) -> str:
        """The same as a path below the rewritten module."""
        return join_path(self.owner_path, self.attribute(kind))

    def site_name(self, module_path: str) -> str:
        """Name of the site in a model that has the rewritten module at `module_path`."""
        return site_name(join_path(module_path, self.owner_path), self.parameter_name)


def owner_of(module: nn.Module, record: SiteRecord) -> nn.Module:
    """The module that holds the weight of `record`."""
    return get_attribute(module, record.owner_path)


def own_names(record: SiteRecord) -> tuple[str, ...]:
    """The parameters of a site that the rewritten module holds itself: none where a module below it does."""
    if record.owner_path:
        return ()
    return record.parameter, *(record.attribute(kind) for kind in FACTORS)


def tensors_of(module: nn.Module, record: SiteRecord) -> AdapterTensors:
    """The adapter of `record`: the parameters themselves, not copies."""
    owner = owner_of(module, record)
    return AdapterTensors(record.config, *(getattr(owner, record.attribute(kind)) for kind in FACTORS))
