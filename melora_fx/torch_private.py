"""Wraps the undocumented parts of torch and transformers that melora_fx uses: one function or name for each.

An upgrade that removes one breaks this file, and `tests/test_private.py`, which calls every one. Each text says why the
documented way is not enough, and with which version the undocumented one was first seen to work.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Attributes in which `torch.compile` and `checkpoint_wrapper` keep the module that they wrap. Both wrappers expose its
attributes as their own, and have no accessor for it. torch 2.13."""


def registered(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the dicts of the module's own parameters, buffers and children, to read, compare and restore them.

    `named_parameters`, `named_buffers` and `named_children` leave out entries of None and repeated ones, and offer no
    way to undo a change. torch 2.13.
    """
    return module._parameters, module._buffers, module._modules


def is_convolution(module: nn.Module) -> bool:
    """Returns whether `module` is a convolution of any kind: the common base class has no public name. torch 2.13."""
    return isinstance(module, _ConvNd)


def follows_mode(module: nn.Module) -> bool:
    """Returns whether `module` is any dropout or batch norm: their base classes have no public name. torch 2.13."""
    return isinstance(module, _DropoutNd | _BatchNorm)


DERIVED_SUFFIXES = ("_orig", "_v")
"""Suffixes that pruning and `weight_norm` append to a parameter's name before they compute a weight from it. torch
2.13."""


def empty_graph_like(graph: fx.Graph) -> fx.Graph:
    """Returns a graph without nodes that generates its code as `graph` does, including pytrees of inputs and outputs.

    `copy.deepcopy` keeps the code generation too, but makes deep copies of node metadata, including example tensors.
    torch 2.13.
    """
    empty = fx.Graph(tracer_cls=graph._tracer_cls)
    empty.set_codegen(graph._codegen)
    return empty


def is_operator(target: Any) -> TypeGuard["torch._ops.OpOverload"]:
    """Returns whether `target` is one overload of a registered operator; its class has no public name. torch 2.13."""
    return isinstance(target, torch._ops.OpOverload)


def is_packet(target: Any) -> TypeGuard["torch._ops.OpOverloadPacket"]:
    """Returns whether `target` is a registered operator without an overload; its class is not public. torch 2.13."""
    return isinstance(target, torch._ops.OpOverloadPacket)


def is_region(target: Any) -> bool:
    """Returns whether `target` is an operator that takes graphs, as for autocast regions and branches. torch 2.13."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def operator_key(operator: Any) -> tuple[str, str]:
    """Returns ("namespace::packet", "overload") of a registered operator, which defines no pickling. torch 2.13."""
    return operator._schema.name, operator._overloadname


def is_constant_of_trace(name: str) -> bool:
    """Returns whether `fx.Tracer` gives this name to a tensor that is created in a module's forward. torch 2.13."""
    return name.startswith("_tensor_constant")


GRAPH_SPECS = ("_in_spec", "_out_spec")
"""Attributes that a GraphModule may set when it generates its code. torch 2.13."""

MADE_FROM_GRAPH = ("_graph", *GRAPH_SPECS, "_compiled_call_impl")
"""Attributes that a GraphModule rebuilds from its graph, and that a copy must not take over. torch 2.13."""


def put_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Sets `module.graph` and keeps the module's code, which the public setter would generate. torch 2.13."""
    vars(module)["_graph"] = graph


def is_fake(tensor: Tensor) -> bool:
    """Returns whether `tensor` has no values, as under `torch.compile` and `torch.export`. torch 2.13."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def in_one_storage(first: Tensor, second: Tensor) -> bool:
    """Returns whether two tensors use the same storage, which addresses do not show on the meta device. torch 2.13."""
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def preserve_versions(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Makes autograd treat the tensors as unchanged after the block. A block that writes to them must restore the bits.

    `.data` hides a write too, but even from the backward pass of what was computed inside the block. torch 2.13.
    """
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors))


def in_forward_mode() -> bool:
    """Returns whether a level of forward-mode differentiation is open, which `forward_ad` does not tell. torch 2.13."""
    return torch.autograd.forward_ad._current_level >= 0


def in_autograd_function() -> bool:
    """Returns whether an `autograd.Function` runs its forward: unlike `no_grad` it disables forward mode. torch 2.13.

    Inference mode disables it too, so the answer is False there.
    """
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def in_functorch() -> bool:
    """Returns whether a transform of `torch.func` (grad, vmap, jvp) is running. torch 2.13."""
    return torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Returns whether `torch.export` is running. `torch.compiler.is_exporting` reads the same flag, but Dynamo of torch
    2.11 treats it as true under `torch.compile` too. torch 2.11.
    """
    return torch.compiler._is_exporting_flag


def is_wrapped(tensor: Tensor) -> bool:
    """Returns whether `tensor` has no memory of its own: inside `torch.func`, as a batch of gradients, or as zeros that
    autograd has not materialised. torch 2.13.
    """
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor):
        return True
    return tensor._is_zerotensor()


compiles_around = torch._C._dynamo.eval_frame.get_eval_frame_callback
"""Returns the callback with which Dynamo compiles the functions called from here, if Dynamo skips the caller; None
outside `torch.compile`. An alias, since Dynamo would compile a function of ours too. torch 2.13."""


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` so that Dynamo skips it; `torch.compiler.disable` would import Dynamo at once. torch 2.13."""
    return _disable_dynamo(function)


def while_compiling() -> Any:
    """Returns a caller for functions of one argument: it runs them while Dynamo compiles the call, and otherwise does
    nothing. torch 2.13.
    """
    from torch._dynamo.comptime import comptime  # slow to import, so only here

    return comptime


def compiled_so_far(compilation: Any) -> tuple[nn.Module | None, fx.Graph]:
    """Returns `self` of the function in which `while_compiling` runs (None after a graph break), and the graph at that
    point. torch 2.13.
    """
    try:
        model = compilation.get_local("self")
    except KeyError:
        return None, compilation.graph()
    return model._i_will_not_complain_if_bc_breaks_VariableTracker().value, compilation.graph()


def inputs_of_compiled(graph: fx.Graph) -> Iterator[tuple[Any, fx.Node, list[fx.Node]]]:
    """Yields each input of a graph of Dynamo: its value, its node, and the nodes that use it, without operators that
    take graphs. torch 2.13.
    """
    for node in graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        if argument is not None:
            users = [user for user in node.users if not is_region(user.target)]
            yield argument.example, node, users


def is_compiled(module: nn.Module) -> bool:
    """Returns whether `module` itself was compiled in place, or is the wrapper of a compiled module. torch 2.13."""
    return getattr(module, "_compiled_call_impl", None) is not None or WRAPPED[0] in module._modules


def in_fx_trace() -> bool:
    """Returns whether `fx.Tracer` is tracing now. torch 2.13."""
    return is_fx_symbolic_tracing()


# `torch.utils._pytree` flattens nested inputs and outputs, as in `torch.export` itself.


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns `tree` with each leaf replaced by `function(leaf)`. torch 2.13."""
    return _pytree.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """Returns the leaves in order. torch 2.13."""
    return _pytree.tree_leaves(tree)


def tree_flatten(tree: Any) -> tuple[tuple[Any, ...], Any]:
    """Returns the leaves in order, and the structure of the tree. torch 2.13."""
    leaves, structure = _pytree.tree_flatten(tree)
    return tuple(leaves), structure


def tree_unflatten(leaves: Iterable[Any], structure: Any) -> Any:
    """Returns the tree with these leaves and this structure; the inverse of `tree_flatten`. torch 2.13."""
    return _pytree.tree_unflatten(leaves, structure)


def tree_code(tree: Any) -> list[tuple[str, Any]]:
    """Returns (code, leaf) for each leaf: after a tree's name, the code, such as `['a'][0]`, reads it. torch 2.13."""
    return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]


def tree_paths(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Returns (path, leaf) for each leaf; a step is the key, index or field name as a string. torch 2.13."""
    return [
        (tuple(str(next(getattr(key, k) for k in ("key", "idx", "name") if hasattr(key, k))) for key in path), leaf)
        for path, leaf in _pytree.tree_flatten_with_path(tree)[0]
    ]


GROUPED_MM = torch._grouped_mm
"""The function that models call if they were written before `torch.nn.functional.grouped_mm` existed. torch 2.13."""


def let_dynamo_ask(function: Any) -> None:
    """Makes Dynamo call the `__torch_function__` of the arguments of `function` from now on, as eager mode does. Dynamo
    does not do so for functions that are in no public list. torch 2.13.
    """
    from torch._dynamo.variables.torch import get_overridable_functions  # slow to import, so only here

    get_overridable_functions().add(function)


HAS_ADAPTERS = "_hf_peft_config_loaded"
"""Attribute of a model that has adapters to train: without it a Trainer refuses a quantised model, and with it
`save_pretrained` writes PEFT's format. transformers 5.23."""

KEYS_NOT_SAVED = "_keys_to_ignore_on_save"
"""Attribute that lists the keys which a Trainer does not expect in a checkpoint. transformers 5.23."""


def is_experts_layer(module: nn.Module) -> bool:
    """Returns whether `module` is a layer of experts of transformers, as seen by an attribute that their decorator adds
    to the class. transformers 5.17.
    """
    return hasattr(module, "_apply_gate")


def experts_implementation(config: Any) -> str | None:
    """Returns the form in which a configuration's experts are computed, as set with `set_experts_implementation`, which
    has no getter; None if the configuration has none. transformers 5.23.
    """
    return getattr(config, "_experts_implementation", None)
