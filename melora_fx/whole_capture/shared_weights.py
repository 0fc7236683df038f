"""Names of weights that a model has in several places: an export keeps one name for all of them.

An exported graph reads a tied pair under the name of one, and a module that is used twice under its first path. Here
each user reads the weight under the name that its own module has for it, so that a site is named after its module.
"""

import copy
from collections.abc import Mapping

from torch import fx, nn

from melora_fx.names import get_attribute
from melora_fx.shared_memory import sharing_parameters


def repeated_modules(model: nn.Module) -> dict[str, str]:
    """For a module that `model` holds in several places: each further path → the first."""
    first: dict[int, str] = {}
    return {
        path: first[id(module)]
        for path, module in model.named_modules(remove_duplicate=False)
        if first.setdefault(id(module), path) != path
    }


def name_by_user(graph_module: fx.GraphModule, repeated: Mapping[str, str]) -> None:
    """Gives each user of a shared parameter its own name for it, in place; `repeated` as of `repeated_modules`."""
    _share_repeated_modules(graph_module, repeated)
    graph = graph_module.graph
    sharing = sharing_parameters(graph_module)
    for node in list(graph.find_nodes(op="get_attr")):
        read = str(node.target)
        others = [name for name in sharing.get(read, ()) if _are_one(graph_module, name, read)]
        if others:
            names = {name.rpartition(".")[0]: name for name in (read, *others)}
            _read_by_own_names(graph, node, names, repeated)


def _share_repeated_modules(graph_module: fx.GraphModule, repeated: Mapping[str, str]) -> None:
    """Puts the first module at all of its paths, and lets the graph read from the first."""
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
    """Lets each user of the `get_attr` node `read` read by the name that its module, a key of `names`, has for it."""
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
    """Path of the module in whose forward an exported node stood."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])
