"""What melora_fx borrows of torch and transformers that they do not document: one function or name for each.

An upgrade that takes one away breaks this file, and `tests/test_private.py`, which calls every one. Each says why the
documented way does not do, and the version that it was first seen to work with.
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
"""Where `torch.compile` and `checkpoint_wrapper` keep the module that they wrap; both show its attributes as their own.
They have no accessor for it. torch 2.13."""


def registered(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The dicts that hold the module's own parameters, buffers and children, to be read, compared and put back.

    `named_parameters` and its kin leave out entries of None and repeated ones, and give no way to undo. torch 2.13.
    """
    return module._parameters, module._buffers, module._modules


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is a convolution of any kind: the common base class has no public name. torch 2.13."""
    return isinstance(module, _ConvNd)


def follows_mode(module: nn.Module) -> bool:
    """Whether `module` is a dropout or a batch norm of any kind: their base classes have no public name. torch 2.13."""
    return isinstance(module, _DropoutNd | _BatchNorm)


DERIVED_SUFFIXES = ("_orig", "_v")
"""What pruning and `weight_norm` append to the parameter that they make a weight of. torch 2.13."""


def empty_graph_like(graph: fx.Graph) -> fx.Graph:
    """A graph without nodes that generates its code as `graph` does, pytrees of inputs and outputs included.

    `copy.deepcopy` keeps them too, but copies node metadata deeply, example tensors among it. torch 2.13.
    """
    empty = fx.Graph(tracer_cls=graph._tracer_cls)
    empty.set_codegen(graph._codegen)
    return empty


def is_operator(target: Any) -> TypeGuard["torch._ops.OpOverload"]:
    """Whether a node calls one overload of a registered operator; the class has no public name. torch 2.13."""
    return isinstance(target, torch._ops.OpOverload)


def is_packet(target: Any) -> TypeGuard["torch._ops.OpOverloadPacket"]:
    """Whether a node calls a registered operator without saying which overload; no public name either. torch 2.13."""
    return isinstance(target, torch._ops.OpOverloadPacket)


def is_region(target: Any) -> bool:
    """Whether it is an operator that is given graphs, of a region of autocast or of a branch. torch 2.13."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def operator_key(operator: Any) -> tuple[str, str]:
    """("namespace::packet", "overload") of a registered operator, which has no pickling of its own. torch 2.13."""
    return operator._schema.name, operator._overloadname


def is_constant_of_trace(name: str) -> bool:
    """Whether `fx.Tracer` has put this attribute on a module, for a tensor made in its forward. torch 2.13."""
    return name.startswith("_tensor_constant")


GRAPH_SPECS = ("_in_spec", "_out_spec")
"""Attributes that a GraphModule may set when it generates its code. torch 2.13."""

MADE_FROM_GRAPH = ("_graph", *GRAPH_SPECS, "_compiled_call_impl")
"""Attributes of a GraphModule that it makes anew from its graph, and that a copy must not take over. torch 2.13."""


def put_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """`module.graph` is `graph` from here on, and its code stays as it is: the setter would generate it. torch 2.13."""
    vars(module)["_graph"] = graph


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has no values, as under `torch.compile` and `torch.export`. torch 2.13."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def in_one_storage(first: Tensor, second: Tensor) -> bool:
    """Whether one is a view of the other: addresses do not tell on the meta device. torch 2.13."""
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def preserve_versions(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """After the block autograd takes the tensors for unchanged: whoever writes in it must put the bits back.

    `.data` hides a write too, but also from the backward of what was computed inside the block. torch 2.13.
    """
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors))


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open; `forward_ad` does not say. torch 2.13."""
    return torch.autograd.forward_ad._current_level >= 0


def in_autograd_function() -> bool:
    """Whether an `autograd.Function` runs its forward: it turns forward mode off, as `no_grad` does not. torch 2.13."""
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def in_functorch() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, jvp) is running. torch 2.13."""
    return torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Whether `torch.export` is running. `torch.compiler.is_exporting` reads the same flag, but Dynamo of torch 2.11
    takes it for true under `torch.compile` too. torch 2.11.
    """
    return torch.compiler._is_exporting_flag


def is_wrapped(tensor: Tensor) -> bool:
    """Whether `tensor` has no memory of its own: inside of `torch.func`, as a batch of gradients, or as zeros that
    autograd has not written down. torch 2.13.
    """
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor):
        return True
    return tensor._is_zerotensor()


compiles_around = torch._C._dynamo.eval_frame.get_eval_frame_callback
"""What compiles the functions that are called from here, where Dynamo has left this one alone: none outside of
`torch.compile`. Not a function of ours, which it would compile too. torch 2.13."""


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which Dynamo leaves alone; `torch.compiler.disable` would import Dynamo here already. torch 2.13."""
    return _disable_dynamo(function)


def while_compiling() -> Any:
    """What runs a function of one argument while Dynamo compiles the call, and does nothing elsewhere. torch 2.13."""
    from torch._dynamo.comptime import comptime  # heavy: only where it is used

    return comptime


def compiled_so_far(compilation: Any) -> tuple[nn.Module | None, fx.Graph]:
    """`self` of the function in which `while_compiling` runs, None behind a graph break, and the graph at that point.
    torch 2.13.
    """
    try:
        model = compilation.get_local("self")
    except KeyError:
        return None, compilation.graph()
    return model._i_will_not_complain_if_bc_breaks_VariableTracker().value, compilation.graph()


def inputs_of_compiled(graph: fx.Graph) -> Iterator[tuple[Any, fx.Node, list[fx.Node]]]:
    """Each value that a graph of Dynamo is given, with its node and those that use it, but for graphs that it calls.
    torch 2.13.
    """
    for node in graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        if argument is not None:
            users = [user for user in node.users if not is_region(user.target)]
            yield argument.example, node, users


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` has been compiled by itself, in place, or is the wrapper of one that has. torch 2.13."""
    return getattr(module, "_compiled_call_impl", None) is not None or WRAPPED[0] in module._modules


def in_fx_trace() -> bool:
    """Whether `fx.Tracer` is tracing now. torch 2.13."""
    return is_fx_symbolic_tracing()


# Nested inputs and outputs are flattened by `torch.utils._pytree`, as `torch.export` itself does it.


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `function` of each leaf in its place. torch 2.13."""
    return _pytree.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves in order. torch 2.13."""
    return _pytree.tree_leaves(tree)


def tree_flatten(tree: Any) -> tuple[tuple[Any, ...], Any]:
    """The leaves in order, and the structure that they are the leaves of. torch 2.13."""
    leaves, structure = _pytree.tree_flatten(tree)
    return tuple(leaves), structure


def tree_unflatten(leaves: Iterable[Any], structure: Any) -> Any:
    """The inverse of `tree_flatten`. torch 2.13."""
    return _pytree.tree_unflatten(leaves, structure)


def tree_code(tree: Any) -> list[tuple[str, Any]]:
    """(code, leaf) of each leaf: what is written behind a tree's name to read it, such as `['a'][0]`. torch 2.13."""
    return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]


def tree_paths(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of each leaf; a step is a mapping's key, a sequence's index or a field's name. torch 2.13."""
    return [
        (tuple(str(next(getattr(key, k) for k in ("key", "idx", "name") if hasattr(key, k))) for key in path), leaf)
        for path, leaf in _pytree.tree_flatten_with_path(tree)[0]
    ]


GROUPED_MM = torch._grouped_mm
"""What models call that were written before `torch.nn.functional.grouped_mm` was there. torch 2.13."""


def let_dynamo_ask(function: Any) -> None:
    """From here on Dynamo asks the `__torch_function__` of what `function` is given, as eager mode does: for functions
    that are in no public list it does not. torch 2.13.
    """
    from torch._dynamo.variables.torch import get_overridable_functions  # heavy: only where it is used

    get_overridable_functions().add(function)


HAS_ADAPTERS = "_hf_peft_config_loaded"
"""Attribute by which a model says that it has adapters to train: without it a Trainer refuses a quantised one, and with
it `save_pretrained` writes PEFT's format. transformers 5.23."""

KEYS_NOT_SAVED = "_keys_to_ignore_on_save"
"""Attribute that lists the keys which a Trainer does not miss in a checkpoint. transformers 5.23."""


def is_experts_layer(module: nn.Module) -> bool:
    """Whether `module` is one of transformers' layers of experts, by what their decorator gives the class. transformers
    5.17.
    """
    return hasattr(module, "_apply_gate")


def experts_implementation(config: Any) -> str | None:
    """The form in which a configuration's experts are computed, as `set_experts_implementation` has set it; there is no
    getter. transformers 5.23.
    """
    return getattr(config, "_experts_implementation", None)
