"""Which initializer of a graph holds which parameter of the model, and names for them that a person can read.

An export folds the transposition of a linear's weight into a new initializer that it calls `val_130`; here such an
initializer gets the parameter's name again, with `.T` where it is transposed. It is recognised by its values; where
several parameters have the same ones, by the module in which the exporter saw it used.
"""

import sys
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import nn

from exporters.onnx_files.weight_place import WeightPlace
from exporters.private import name_scopes
from melora_fx import adapter_parameters, sites
from melora_fx.adapter.site import TENSORS


def add_initializer(graph: onnx_ir.Graph, name: str, array: np.ndarray) -> onnx_ir.Value:
    """A new initializer of the graph."""
    tensor = onnx_ir.tensor(array, name=name)
    shape, kind = onnx_ir.Shape(array.shape), onnx_ir.TensorType(tensor.dtype)
    value = onnx_ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def name_weights(graph_model: onnx_ir.Model, model: nn.Module) -> dict[str, WeightPlace]:
    """Renames the initializers that hold a matrix or an adapter tensor of `model`; the model's values are present ones.

    An adapter's B stands in a graph multiplied by its scaling, s B.

    Returns:
        for each matrix, or stack of matrices, of the model that was found, by its parameter's name, where it lives. One
        that cannot be told from another is left out.
    """
    graph = graph_model.graph
    known = dict(model.named_parameters())
    matrices = _matrices(model)
    places = {name: WeightPlace(name, False) for name in graph.initializers if name in matrices}
    candidates = _by_shape(_named_tensors(model, matrices))
    alike: set[frozenset[str]] = set()
    for initializer in list(graph.initializers.values()):
        if initializer.name in known or initializer.const_value is None:
            continue
        equal = _holding(initializer, candidates)
        if len({parameter for _, parameter, _ in equal}) > 1:
            alike.add(frozenset(parameter for _, parameter, _ in equal))
            scopes = _scopes(initializer)
            equal = [found for found in equal if found[1].rpartition(".")[0] in scopes]
        if len({parameter for _, parameter, _ in equal}) != 1 or equal[0][0] in graph.initializers:
            continue
        name, parameter, is_transposed = equal[0]
        initializer.name = name
        if parameter in matrices:
            places.setdefault(parameter, WeightPlace(name, is_transposed))
    for group in alike:
        if not group <= places.keys():  # the exporter has put several into one initializer
            places = {name: place for name, place in places.items() if name not in group}
    return dict(sorted(places.items()))


def fold_adapter_constants(graph_model: onnx_ir.Model, model: nn.Module) -> None:
    """Carries out s·B and the transpositions of adapter tensors: the exporters leave large ones in the graph."""
    initializers = graph_model.graph.initializers
    names = {f"{site}.{kind}" for site in sites(model) for kind in TENSORS}
    constant = {initializers[name] for name in names if name in initializers}
    nodes = set()
    for node in graph_model.graph:
        if node.inputs and all(value in constant for value in node.inputs):
            nodes.add(node)
            constant.update(node.outputs)
    optimizer.fold_constants(
        graph_model, onnx_shape_inference=False, output_size_limit=sys.maxsize, should_fold=lambda node: node in nodes
    )
    RemoveUnusedNodesPass()(graph_model)


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are matrices or stacks of them, without those of adapters."""
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() in (2, 3) and id(parameter) not in own
    }


def _named_tensors(
    model: nn.Module, matrices: Mapping[str, nn.Parameter]
) -> Iterable[tuple[str, str, bool, torch.Tensor]]:
    """(name for the initializer, parameter, is_transposed, values) of all that an export may hold under a new name."""
    for name, parameter in matrices.items():
        yield f"{name}.T", name, True, parameter.detach().mT
        yield name, name, False, parameter.detach()
    for name, site in sites(model).items():
        scaled = site.lora_b.detach() * site.scaling
        for kind, value in (("lora_a", site.lora_a.detach()), ("lora_b", scaled)):
            yield f"{name}.{kind}.T", f"{name}.{kind}", True, value.transpose(1, 2)
            yield f"{name}.{kind}", f"{name}.{kind}", False, value


_Candidates = dict[tuple[int, ...], list[tuple[str, str, bool, torch.Tensor]]]


def _by_shape(tensors: Iterable[tuple[str, str, bool, torch.Tensor]]) -> _Candidates:
    grouped: _Candidates = {}
    for candidate in tensors:
        grouped.setdefault(tuple(candidate[3].shape), []).append(candidate)
    return grouped


def _holding(initializer: onnx_ir.Value, candidates: _Candidates) -> list[tuple[str, str, bool]]:
    """(new name, parameter, is_transposed) of each candidate whose values `initializer` has."""
    tensor = initializer.const_value
    assert tensor is not None
    same_shape = candidates.get(tuple(tensor.shape.numpy()), [])
    if not same_shape or len(tensor.shape) < 2:
        return []
    values = torch.from_numpy(np.array(tensor.numpy()))
    return [(name, parameter, flag) for name, parameter, flag, value in same_shape if torch.equal(value, values)]


def _scopes(value: onnx_ir.Value) -> set[str]:
    """Paths of the modules in whose forward the users of `value` stand."""
    return {scope for user in value.consumers() for scope in name_scopes(user)}
