"""Finds which initializer of a graph stores which parameter of the model, and gives it a readable name.

An export folds the transposition of a linear's weight into a new initializer called, say, `val_130`. Here such an
initializer gets the parameter's name back, with the suffix `.T` if it is transposed. It is recognised by its values; if
several parameters have equal values, it is recognised by the module in which the exporter saw it used.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import nn

from exporters.onnx_files.weight_place import WeightPlace, find_tensor
from exporters.private import name_scopes
from melora_fx.adapter.tensors import TENSORS, factor_names
from melora_fx.saving.model_adapter import kept_tensor_names

from .export import Export


class Candidate(NamedTuple):
    """Possible contents of an initializer: `parameter` or its transpose, and the `name` that it gets then."""

    name: str
    parameter: str
    is_transposed: bool
    values: torch.Tensor

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


def fold_adapter_constants(export: Export) -> None:
    """Folds s·B and the transposes of adapter tensors into constants: the exporters do not fold large ones."""
    initializers = export.graph.initializers
    names = {f"{site}.{kind}" for site in export.sites for kind in TENSORS}
    constants = {initializers[name] for name in names if name in initializers}
    nodes = set()
    for node in export.graph:
        if node.inputs and all(value in constants for value in node.inputs):
            nodes.add(node)
            constants.update(node.outputs)
    optimizer.fold_constants(
        export.graph_model,
        onnx_shape_inference=False,
        output_size_limit=sys.maxsize,
        should_fold=lambda node: node in nodes,
    )
    RemoveUnusedNodesPass()(export.graph_model)


def name_weights(export: Export) -> None:
    """Renames the initializers that store a matrix or an adapter tensor of the model, and records the place of each
    matrix, or stack of matrices, in `export.weights`. The model must still have the values that were exported.

    The graph stores an adapter's B multiplied by its scaling, s B. A matrix that cannot be distinguished from another
    is left out.
    """
    initializers = export.graph.initializers
    parameters = dict(export.model.named_parameters())
    matrices = _matrices(export)
    places = {name: WeightPlace(name, False) for name in initializers if name in matrices}
    candidates = _by_shape(_candidates(export, matrices))
    alike: set[frozenset[str]] = set()
    for initializer in list(initializers.values()):
        if initializer.name in parameters or initializer.const_value is None:
            continue
        equal = _equal_candidates(initializer, candidates)
        if len(_parameters(equal)) > 1:
            alike.add(_parameters(equal))
            scopes = _scopes(initializer)
            equal = [candidate for candidate in equal if candidate.module in scopes]
        if len(_parameters(equal)) != 1:
            continue
        found = equal[0]
        if found.name in initializers:  # a module that is called twice has its weight transposed twice
            onnx_ir.convenience.replace_all_uses_with(initializer, initializers[found.name])
            initializers.pop(initializer.name or "")
            continue
        initializer.name = found.name
        if found.parameter in matrices:
            places.setdefault(found.parameter, WeightPlace(found.name, found.is_transposed))
    export.weights = dict(sorted(_without_merged(places, alike).items()))


def find_kept_tensors(export: Export) -> None:
    """Records the places of the tensors of modules kept trainable in `export.kept`."""
    initializers = export.graph.initializers
    export.kept = {name: find_tensor(initializers, name) for name in kept_tensor_names(export.model)}


def _matrices(export: Export) -> dict[str, nn.Parameter]:
    """Returns the parameters that are matrices or stacks of matrices, without those of adapters."""
    own = {id(parameter) for site in export.sites.values() for parameter in (site.lora_a, site.lora_b)}
    return {
        name: parameter
        for name, parameter in export.model.named_parameters()
        if parameter.dim() in (2, 3) and id(parameter) not in own
    }


def _candidates(export: Export, matrices: Mapping[str, nn.Parameter]) -> Iterator[Candidate]:
    """Yields everything that an export may store under a new name; transposes first, because products use them."""
    for name, parameter in matrices.items():
        yield Candidate(f"{name}.T", name, True, parameter.detach().mT)
        yield Candidate(name, name, False, parameter.detach())
    for site_name, site in export.sites.items():
        factors = (site.lora_a.detach(), site.lora_b.detach() * site.scaling)
        for name, values in zip(factor_names(site_name), factors, strict=True):
            yield Candidate(f"{name}.T", name, True, values.mT)
            yield Candidate(name, name, False, values)


def _by_shape(candidates: Iterator[Candidate]) -> dict[tuple[int, ...], list[Candidate]]:
    grouped: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in candidates:
        grouped.setdefault(tuple(candidate.values.shape), []).append(candidate)
    return grouped


def _equal_candidates(
    initializer: onnx_ir.Value, candidates: Mapping[tuple[int, ...], list[Candidate]]
) -> list[Candidate]:
    """Returns the candidates whose values equal those of `initializer`."""
    tensor = initializer.const_value
    assert tensor is not None
    same_shape = candidates.get(tuple(tensor.shape.numpy()), [])
    if not same_shape or len(tensor.shape) < 2:
        return []
    values = torch.from_numpy(np.array(tensor.numpy()))
    return [candidate for candidate in same_shape if torch.equal(candidate.values, values)]


def _parameters(candidates: list[Candidate]) -> frozenset[str]:
    return frozenset(candidate.parameter for candidate in candidates)


def _scopes(value: onnx_ir.Value) -> set[str]:
    """Returns the paths of the modules whose forward uses `value`."""
    return {scope for user in value.consumers() for scope in name_scopes(user)}


def _without_merged(places: dict[str, WeightPlace], alike: set[frozenset[str]]) -> dict[str, WeightPlace]:
    """Returns `places` without groups of equal parameters of which a member has no place: the exporter has merged
    several into one initializer, and a change of it would change them all.
    """
    for group in alike:
        if not group <= places.keys():
            places = {name: place for name, place in places.items() if name not in group}
    return places
