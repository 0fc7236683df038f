"""Defines the record of a site, as graphs and modules store it.

The inserted nodes of a graph carry the tag of their site. The module that runs the graph keeps one record per site.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from melora_fx.config import MELoRAConfig
from melora_fx.names import get_attribute, join_path, site_name

from .tensors import FACTORS, AdapterTensors, as_matrices

SITE_TAG = "melora_site"
"""Key in `node.meta` of every inserted node: the path of the site's parameter below the rewritten module."""

MODULE_MARK = "melora_mark"
"""Attribute of every rewritten module: its mark, which contains the records of its sites."""


@dataclass
class SiteRecord:
    """One site of the graph of a rewritten module, as that module records it.

    Attributes:
        parameter: path of the weight below the rewritten module.
        is_aten: whether all nodes of the adapter are ATen, which forward-mode derivatives and ONNX need.
        row_dims: as in `as_matrices`.
        is_absent: whether the adapter that was loaded last lacks the site. A and B are zero then.
        saved_config: the site's configuration in the adapter that was loaded last, if it names a lowering or dropout
            that the graph does not use; else None.
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
        """Returns a view of the weight as the model multiplies by it: a matrix or a stack, transposed or not."""
        return as_matrices(weight, self.row_dims)

    @property
    def file_config(self) -> MELoRAConfig:
        """The configuration as the adapter's file stores it."""
        return self.saved_config or self.config

    @property
    def owner_path(self) -> str:
        """Path of the module that owns the weight, below the rewritten module."""
        return self.parameter.rpartition(".")[0]

    @property
    def parameter_name(self) -> str:
        """Name of the weight on its owner."""
        return self.parameter.rpartition(".")[2]

    def attribute(self, kind: str) -> str:
        """Returns the name that one of `tensors.TENSORS` has on the weight's owner."""
        return self.attribute_of(self.parameter, kind)

    @staticmethod
    def attribute_of(parameter: str, kind: str) -> str:
        """Returns the name that `attribute` returns, for a parameter that is not a site yet."""
        name = parameter.rpartition(".")[2]
        return kind if name == "weight" else f"{name}_{kind}"

    def path(self, kind: str) -> str:
        """Returns the path of one of `tensors.TENSORS` below the rewritten module."""
        return join_path(self.owner_path, self.attribute(kind))

    def site_name(self, module_path: str) -> str:
        """Returns the name of the site in a model that has the rewritten module at `module_path`."""
        return site_name(join_path(module_path, self.owner_path), self.parameter_name)


def owner_of(module: nn.Module, record: SiteRecord) -> nn.Module:
    """Returns the module that owns the weight of `record`."""
    return get_attribute(module, record.owner_path)


def own_names(record: SiteRecord) -> tuple[str, ...]:
    """Returns the names of a site's parameters on the rewritten module; none if a module below it owns them."""
    if record.owner_path:
        return ()
    return record.parameter, *(record.attribute(kind) for kind in FACTORS)


def tensors_of(module: nn.Module, record: SiteRecord) -> AdapterTensors:
    """Returns the adapter of `record`: the parameters themselves, not copies."""
    owner = owner_of(module, record)
    return AdapterTensors(record.config, *(getattr(owner, record.attribute(kind)) for kind in FACTORS))
