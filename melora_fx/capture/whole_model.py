"""One graph of a whole model, through `torch.export`, that can be trained, copied and pickled."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from melora_fx.errors import MELoRAError
from melora_fx.names import get_attribute
from melora_fx.torch_private import clear_export_hooks, follows_mode, tree_leaves, tree_map

from .example_inputs import all_dynamic, as_arguments, check_input_sizes, frozen_sizes
from .expert_layers import REMEDY, loops_over_experts
from .training_mode import follow_training_mode, in_mode


def capture_whole(model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any]) -> fx.GraphModule:
    """The whole model as one graph of ATen nodes that shares the model's parameters and buffers.

    Every dimension that the model leaves free stays dynamic. Dropout follows `.train()` and `.eval()`; the mode of the
    result is the model's. Changes nothing of the model.

    Args:
        model: the model to capture.
        example_inputs: a dict of keyword arguments or a tuple of positional ones; a batch of one is doubled.

    Raises:
        TypeError: where `example_inputs` is neither.
        MELoRAError: where `torch.export` fails, its own message is given; or where the model does in evaluation what
            the capture, made in training mode, does not.
    """
    args, kwargs = as_arguments(example_inputs)
    other = [name for name, each in model.named_modules() if follows_mode(each) and each.training != model.training]
    if other:
        raise MELoRAError(
            f"some modules are not in the model's own mode (training={model.training}): {', '.join(other[:5])}; one "
            "graph has one mode: call `.train()` or `.eval()` on the whole model first"
        )
    shapes = tree_map(all_dynamic, kwargs or args)
    with without_cache(model):
        program, error = _export_in_mode(model, True, args, kwargs, shapes)
        if program is None:
            program, _ = _export_in_mode(model, False, args, kwargs, shapes)
            if program is not None:
                name = type(model).__name__
                warnings.warn(f"`{name}` can be captured in eval mode only: the graph has no dropout", stacklevel=4)
    if program is None:
        remedy = f"{REMEDY}: " if loops_over_experts(model) else ""
        raise MELoRAError(f"torch.export cannot capture `{type(model).__name__}`: {remedy}{error}") from error
    graph_module = make_trainable(program.module(check_guards=False), _repeated_modules(model))
    _check_evaluation(model, graph_module, args, kwargs)
    graph_module.train(model.training)
    graph_module.__dict__["model_class"] = type(model).__name__
    if hasattr(model, "config"):
        graph_module.config = copy.copy(model.config)
    return graph_module


def _check_evaluation(
    model: nn.Module, graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuses a capture whose outputs in evaluation are not the model's."""
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), in_mode(model, training=False), without_cache(model):
        expected = _leaves(model(*args, **kwargs))
        graph_module.eval()
        actual = _leaves(graph_module(*args, **kwargs))
    for name, buffer in model.named_buffers():
        buffer.data.copy_(buffers[name])
    pairs = list(zip(expected, actual, strict=False))
    differs = any(isinstance(want, torch.Tensor) and not _near(got, want) for want, got in pairs)
    if differs or len(expected) != len(actual):
        raise MELoRAError(
            f"`{type(model).__name__}` cannot be captured whole: its forward differs between train and eval mode "
            "by more than dropout, which one graph cannot follow: rewrite it without `example_inputs=`"
        )


def _near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the rounding of a whole model, relative to the largest value."""
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    scale = expected.abs().nan_to_num(0, 0, 0).max() if expected.numel() else 0
    bound = float(scale) * max(1e-4, 8 * torch.finfo(expected.dtype).eps)
    return torch.allclose(actual, expected, rtol=0, atol=bound, equal_nan=True)


def _leaves(outputs: Any) -> list[Any]:
    return tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)


def from_program(program: ExportedProgram) -> fx.GraphModule:
    """An exported program as a GraphModule that can be trained, copied and pickled: see `make_trainable`."""
    return make_trainable(program.module(check_guards=False))


def is_exported(model: nn.Module) -> bool:
    """Whether `model` is an exported program's module as `torch.export` makes it: `.train()` and `.eval()` raise."""
    return isinstance(model, fx.GraphModule) and "train" in model.__dict__


def make_trainable(graph_module: fx.GraphModule, repeated: Mapping[str, str] | None = None) -> fx.GraphModule:
    """Changes an exported module in place: `.train()` and `.eval()` work and reach dropout.

    Weights go by the names that the model has them under; `repeated` maps the further names of a module that it uses
    in several places to the first. The export's own hooks cannot be pickled; in their place one hook names an input
    that has another size than the export froze.
    """
    _name_by_user(graph_module, repeated or {})
    clear_export_hooks(graph_module)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    graph_module.__dict__["input_sizes"] = {node.name: frozen_sizes(node.meta.get("val")) for node in placeholders}
    graph_module.register_forward_pre_hook(check_input_sizes, with_kwargs=True)
    return follow_training_mode(graph_module)


def _repeated_modules(model: nn.Module) -> dict[str, str]:
    """For a module that `model` holds in several places: each further path → the first."""
    first: dict[int, str] = {}
    return {
        path: first[id(module)]
        for path, module in model.named_modules(remove_duplicate=False)
        if first.setdefault(id(module), path) != path
    }


def _name_by_user(graph_module: fx.GraphModule, repeated: Mapping[str, str]) -> None:
    """Gives each user of a shared parameter its own name for it: an export keeps one name for both of a tied pair."""
    graph = graph_module.graph
    for path, first in repeated.items():
        if isinstance(get_attribute(graph_module, path), nn.Module):
            graph_module.set_submodule(path, graph_module.get_submodule(first))
    for node in graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        node.target = f"{repeated[owner]}.{name}" if owner in repeated else node.target
    aliases: dict[int, dict[str, str]] = {}
    for path, module in graph_module.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            aliases.setdefault(id(parameter), {})[path] = name
    for node in list(graph.nodes):
        names = aliases.get(id(get_attribute(graph_module, str(node.target)))) if node.op == "get_attr" else None
        if not names or len(names) < 2:
            continue
        for user in list(node.users):
            path = _owner_path(user)
            name = names.get(repeated.get(path, path), node.target)
            if name != node.target:
                with graph.inserting_before(node):
                    alias = graph.get_attr(name)
                alias.meta = copy.copy(node.meta)
                user.replace_input_with(node, alias)
        if not node.users:
            graph.erase_node(node)


def _owner_path(node: fx.Node) -> str:
    """Path of the module in whose forward an exported node stood."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _export_in_mode(
    model: nn.Module, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> tuple[ExportedProgram | None, Exception | None]:
    """The program, or why there is none."""
    with in_mode(model, training=training):
        try:
            return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes), None
        except Exception as error:  # the model's own forward can raise anything
            return None, error


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """`config.use_cache` off: the graph returns no key-value cache."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True
