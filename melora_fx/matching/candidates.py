"""Candidates: the linears of a model, and the other matrices that take part in products."""

from typing import NamedTuple

from torch import nn
from torch.export import ExportedProgram

from melora_fx.capture.graphs import Capture
from melora_fx.capture.modules import capture_modules
from melora_fx.config import MELoRAConfig
from melora_fx.patterns.planned_site import PlannedSite

from .linears import group_by_weight, name_in_model, reads_of
from .unmatched import Unmatched, find_unmatched


class Candidates(NamedTuple):
    """The linears of a model, and the other matrices that take part in products.

    Attributes:
        model: the model as passed.
        captured: the module whose graphs are read: `model` itself, or its whole capture.
        captures: the graphs of its modules.
        uncaptured: name → reason of the matrices of modules that could not be captured.
        linears: the weights that the graphs multiply by; a weight in two captures is listed twice.
        unmatched: name → the other matrices that take part in products.
    """

    model: nn.Module | ExportedProgram
    captured: nn.Module
    captures: list[Capture]
    uncaptured: dict[str, str]
    linears: list[PlannedSite]
    unmatched: dict[str, Unmatched]

    @property
    def names(self) -> set[str]:
        return {linear.name for linear in self.linears}

    @property
    def names_read(self) -> set[str]:
        """The names of the attributes that graphs read and use."""
        return {
            name_in_model(capture, str(node.target))
            for capture in self.captures
            for node in reads_of(capture.graphs)
            if node.users
        }


def find_candidates(model: nn.Module | ExportedProgram, captured: nn.Module, config: MELoRAConfig) -> Candidates:
    """Captures the modules of `captured`, and finds their linears and the other matrices in products."""
    captures, uncaptured = capture_modules(captured)
    linears = list(group_by_weight(captures, config))
    return Candidates(model, captured, captures, uncaptured, linears, find_unmatched(model, captures, linears))
