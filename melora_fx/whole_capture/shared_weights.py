"""Restores the names of weights that a model has in several places: an export keeps one name for all of them, or none.

An exported graph reads a tied pair under one of its names, and a module that is used twice under its first path. Here
each user reads the weight under the name that its own module has for it, so that a site is named after its module. A
weight that the model also keeps in a plain list is a constant in the export: here it becomes the parameter again.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from melora_fx.errors import MELoRAError
from melora_fx.names import get_attribute
from melora_fx.shared_memory import sharing_parameters
from melora_fx.torch_private import in_one_storage


def repeated_modules(model: nn.Module) -> dict[str, str]:
    """Returns further path → first path for each module that `model` contains in several places."""
    first: dict[int, str] = {}
    return {
        path: first[id(module)]
        for path, module in model.named_modules(remove_duplicate=False)
        if first.setdefault(id(module), path) != path
    }


def name_by_user(graph_module: fx.GraphModule, repeated: Mapping[str, str]) -> None:
    """Makes each user of a shared parameter read it under the user's own name for it, in place.

    `repeated` is the result of `repeated_modules`.

    Raises:
        MELoRAError: if the model reads a parameter through a view of it that is not a parameter.
    """
    _read_parameters_for_constants(graph_module)
    _share_repeated_modules(graph_module, repeated)
    graph = graph_module.graph
    sharing = sharing_parameters(graph_module)
    for node in list(graph.find_nodes(op="get_attr")):
        read = str(node.target)
        others = [name for name in sharing.get(read, ()) if _are_one(graph_module, name, read)]
        if others:
            names = {name.rpartition(".")[0]: name for name in (read, *others)}
            _read_by_own_names(graph, node, names, repeated)


def _read_parameters_for_constants(graph_module: fx.GraphModule) -> None:
    """Makes the graph read the parameter instead of a constant, if both show the same entries of one storage.

    Raises:
        MELoRAError: if a constant and a parameter overlap otherwise.
    """
    parameters = dict(graph_module.named_parameters())
    for node in graph_module.graph.find_nodes(op="get_attr"):
        constant = get_attribute(graph_module, str(node.target))
        if not isinstance(constant, torch.Tensor) or isinstance(constant, nn.Parameter):
            continue
        for name, parameter in parameters.items():
            if not _overlap(constant, parameter):
                continue
            if _memory(constant) != _memory(parameter):
                raise MELoRAError(
                    f"`{name}` is also read through a view of it that the model keeps, of shape "
                    f"{tuple(constant.shape)}, which would be a constant in the capture: create the view in `forward`"
                )
            node.target = name
            break


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns which entries of its storage a tensor shows, and their dtype."""
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    if not (_is_strided(first) and _is_strided(second) and in_one_storage(first, second)):
        return False
    (start, end), (other_start, other_end) = _bytes(first), _bytes(second)
    return start < other_end and other_start < end


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.numel() > 0


def _bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns first byte and end within the storage; addresses mean nothing on the meta device."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + int(last) + 1) * tensor.element_size()


def _share_repeated_modules(graph_module: fx.GraphModule, repeated: Mapping[str, str]) -> None:
    """Puts the first module at all of its paths, and makes the graph read from the first path."""
    for path, first in repeated.items():
        if isinstance(get_attribute(graph_module, path), nn.Module):
            graph_module.set_submodule(path, graph_module.get_submodule(first))
    for node in graph_module.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        if owner in repeated:
            node.target = f"{repeated[owner]}.{name}"


def _are_one(model: nn.Module, name: str, other: str) -> bool:
    return get_attribute(model, name) is get_attribute(model, other)


def _read_by_own_names(graph: fx.Graph, read: fx.Node, names: dict[str, str], repeated: Mapping[str, str]) -> None:
    """Makes each user of the `get_attr` node `read` use its own module's name for the weight: `names`, by module."""
    for user in list(read.users):
        path = _owner_path(user)
        name = names.get(repeated.get(path, path), read.target)
        if name == read.target:
            continue
        with graph.inserting_before(read):
            own_read = graph.get_attr(str(name))
        own_read.meta = copy.copy(read.meta)
        user.replace_input_with(read, own_read)
    if not read.users:
        graph.erase_node(read)


def _owner_path(node: fx.Node) -> str:
    """Returns the path of the module whose forward an exported node comes from."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])
