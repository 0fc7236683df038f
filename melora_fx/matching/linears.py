"""The linears of captured graphs, one entry a weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from melora_fx.adapter.tensors import features_of, num_matrices
from melora_fx.capture.graphs import Capture
from melora_fx.config import MELoRAConfig
from melora_fx.lowering.choice import choose_lowering, lowering_misfit
from melora_fx.names import get_attribute, join_path, shared_parameters, site_name
from melora_fx.patterns.experts import find_expert_nodes
from melora_fx.patterns.linear import find_linear_nodes
from melora_fx.patterns.node import LinearNode, weight_of

from .report import LinearSite


@dataclass(frozen=True)
class PlannedSite:
    """Planned by `match`: one weight of a captured graph and every node that multiplies by it.

    `parameter`: path of the weight below the captured module. `shared_with`: names of other parameters of the model
    that are the same weight.
    """

    name: str
    capture: Capture
    parameter: str
    nodes: tuple[LinearNode, ...]
    weight: torch.Tensor
    config: MELoRAConfig
    shared_with: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features) of the weight, or of each matrix in a stack."""
        return features_of(self.weight, is_transposed=self.nodes[0].weight_is_transposed)

    @property
    def num_experts(self) -> int:
        """How many matrices the weight is a stack of; 1 for a matrix."""
        return num_matrices(self.weight)

    @property
    def owner(self) -> nn.Module:
        """The module that holds the weight."""
        return get_attribute(self.capture.module, self.parameter.rpartition(".")[0])

    @property
    def is_used_both_ways(self) -> bool:
        """Whether some nodes take the weight as (out, in) and others as (in, out)."""
        return len({node.weight_is_transposed for node in self.nodes}) > 1

    def describe(self) -> LinearSite:
        """The public view of this site."""
        in_features, out_features = self.shape
        num_parameters = self.num_experts * self.config.num_parameters(in_features, out_features)
        return LinearSite(
            name=self.name,
            in_features=in_features,
            out_features=out_features,
            pattern=self.pattern,
            lowering=self.lowering,
            num_parameters=num_parameters,
            shared_with=self.shared_with,
            num_experts=self.num_experts,
        )

    @property
    def lowering(self) -> str:
        """How the site is computed in training."""
        return choose_lowering(self.config, self.weight, self.nodes, self.capture.module)

    def misfit(self, config: MELoRAConfig) -> str | None:
        """Why this configuration cannot adapt this linear, or None."""
        return config.misfit(*self.shape) or lowering_misfit(config, self.weight, self.nodes, self.capture.module)

    @property
    def pattern(self) -> str:
        """What a report calls it: the class of a linear module, else the operator."""
        kind = type(self.owner).__name__
        is_module = kind in ("Linear", "Conv1D") and self.capture.module is self.owner
        return kind if is_module else self.nodes[0].pattern


def group_by_weight(captures: list[Capture], config: MELoRAConfig) -> tuple[dict[str, PlannedSite], dict[str, str]]:
    """Every linear of the captured graphs by name; a weight that several nodes multiply by is one site.

    Returns:
        the linears, and those that stand in two graphs, with the reason why they cannot be adapted.
    """
    found: dict[str, PlannedSite] = {}
    split_up: dict[str, str] = {}
    for capture in captures:
        groups: dict[str, list[LinearNode]] = {}
        for linear in _find_nodes(capture):
            groups.setdefault(linear.parameter, []).append(linear)
        for parameter, nodes in groups.items():
            owner, _, attribute = parameter.rpartition(".")
            name = site_name(join_path(capture.path, owner), attribute)
            weight = weight_of(capture.module, parameter)
            if name in found:
                split_up[name] = "two modules' forwards multiply by its weight: pass `example_inputs=`"
            found[name] = PlannedSite(name, capture, parameter, tuple(nodes), weight, config)
    return found, split_up


def with_shared_names(found: Mapping[str, PlannedSite], model: nn.Module) -> dict[str, PlannedSite]:
    """The linears with the other names that `model` has for their weights."""
    names_by_weight = shared_parameters(model)
    named = {}
    for name, planned in found.items():
        names = names_by_weight.get(id(planned.weight), ())
        named[name] = replace(planned, shared_with=tuple(other for other in names if other != name))
    return named


def _find_nodes(capture: Capture) -> list[LinearNode]:
    """The products with matrices and with stacks of them, in the order of the graph."""
    found = [
        *find_linear_nodes(capture.graph, capture.module),
        *find_expert_nodes(capture.graph, capture.module),
    ]
    position = {node: index for index, node in enumerate(capture.graph.nodes)}
    return sorted(found, key=lambda linear: position[linear.node])
