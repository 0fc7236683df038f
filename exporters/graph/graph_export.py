"""What the passes of an export hand on from one to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir
import torch
from torch import nn

from exporters.onnx_files.weight_place import WeightPlace
from melora_fx import AdapterSite, sites
from melora_fx.rewriting.sites import is_disabled

from .options import ExportOptions


@dataclass
class GraphExport:
    """One export on its way through the passes, each of which takes it and changes it.

    Attributes:
        graph_model: the graph so far; a pass changes it in place, or puts another in its place.
        model: the module that it was made of. Its adapters are merged meanwhile for "fold", switched off for "none".
        inputs: the example inputs by name.
        options: what was asked for.
        holds: which adapters the graph has, as `held_adapter` says.
        sites: those of the model, whatever the graph holds.
        weights: parameter → where it lives in the graph; without those that cannot be told from others.
        kept: tensor of a module kept trainable → where it lives, None where the exporter has folded it into others.
        forms: site → "block" or "dense", in a graph that keeps the adapters.
        defaults: optional input → its default, in a graph with swappable adapters.
    """

    graph_model: onnx_ir.Model
    model: nn.Module
    inputs: Mapping[str, Any]
    options: ExportOptions
    holds: str
    sites: dict[str, AdapterSite]
    weights: dict[str, WeightPlace] = field(default_factory=dict)
    kept: dict[str, WeightPlace | None] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> onnx_ir.Graph:
        return self.graph_model.graph


def held_adapter(model: nn.Module, adapter: str) -> str:
    """Which adapters a graph of `model` will hold: `adapter` itself, or "none" if the model has no sites or is inside
    `disabled`, where it computes the base.
    """
    return "none" if is_disabled(model) or not sites(model) else adapter
