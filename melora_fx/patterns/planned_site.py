"""PlannedSite: one weight that graphs multiply by, and how it would be adapted."""

from dataclasses import dataclass

import torch
from torch import nn

from melora_fx.adapter.tensors import as_matrices, features_of, num_matrices
from melora_fx.capture.graphs import Capture
from melora_fx.config import MELoRAConfig
from melora_fx.names import get_attribute

from .node import LinearNode


@dataclass(frozen=True)
class PlannedSite:
    """One weight of a captured graph and every node that multiplies by it, as `match` plans to adapt it.

    Attributes:
        name: name of the site in the model.
        parameter: path of the weight below the captured module.
        shared_with: names of other parameters of the model in the same memory.
    """

    name: str
    capture: Capture
    parameter: str
    nodes: tuple[LinearNode, ...]
    weight: torch.Tensor
    config: MELoRAConfig
    shared_with: tuple[str, ...] = ()

    @property
    def matrices(self) -> torch.Tensor:
        """The weight as the graphs multiply by it: a view as a matrix or a stack of matrices."""
        return as_matrices(self.weight, self.nodes[0].row_dims)

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features) of the weight, or of each matrix in a stack."""
        return features_of(self.matrices, is_transposed=self.nodes[0].weight_is_transposed)

    @property
    def num_experts(self) -> int:
        """The number of matrices in a stack; 1 for a matrix."""
        return num_matrices(self.matrices)

    @property
    def owner(self) -> nn.Module:
        """The module that holds the weight."""
        return get_attribute(self.capture.module, self.parameter.rpartition(".")[0])

    @property
    def pattern(self) -> str:
        """The site's pattern in reports: the class of a linear module, else the operator."""
        kind = type(self.owner).__name__
        is_module = kind in ("Linear", "Conv1D") and self.capture.module is self.owner
        return kind if is_module else self.nodes[0].pattern

    @property
    def is_aten(self) -> bool:
        """Whether all of the adapter's nodes will be ATen."""
        return all(node.matched_by.is_aten for node in self.nodes if node.matched_by)
