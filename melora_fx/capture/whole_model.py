"""One graph of a whole model, through `torch.export`, that can be trained, copied and pickled."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from melora_fx.errors import MELoRAError
from melora_fx.torch_private import clear_export_hooks, follows_mode, tree_map

from .evaluation_check import check_evaluation
from .example_inputs import all_dynamic, as_arguments, check_input_sizes, frozen_sizes
from .expert_layers import REMEDY, loops_over_experts
from .model_settings import in_mode, own_attributes, without_cache
from .shared_weights import name_by_user, repeated_modules
from .training_mode import follow_training_mode


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
    _refuse_mixed_modes(model)
    program = _export(model, args, kwargs)
    graph_module = make_trainable(program.module(check_guards=False), repeated_modules(model))
    check_evaluation(model, graph_module, args, kwargs)
    graph_module.train(model.training)
    vars(graph_module)["model_class"] = type(model).__name__
    if hasattr(model, "config"):
        graph_module.config = copy.copy(model.config)
    return graph_module


def from_program(program: ExportedProgram) -> fx.GraphModule:
    """An exported program as a GraphModule that can be trained, copied and pickled: see `make_trainable`."""
    return make_trainable(program.module(check_guards=False))


def is_exported(model: nn.Module) -> bool:
    """Whether `model` is an exported program's module as `torch.export` makes it: `.train()` and `.eval()` raise."""
    return isinstance(model, fx.GraphModule) and "train" in vars(model)


def make_trainable(graph_module: fx.GraphModule, repeated: Mapping[str, str] | None = None) -> fx.GraphModule:
    """Changes an exported module in place: `.train()` and `.eval()` work and reach dropout.

    Weights go by the names that the model has them under; `repeated` maps the further names of a module that it uses
    in several places to the first. The export's own hooks cannot be pickled; in their place one hook names an input
    that has another size than the export froze.
    """
    name_by_user(graph_module, repeated or {})
    clear_export_hooks(graph_module)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    vars(graph_module)["input_sizes"] = {node.name: frozen_sizes(node.meta.get("val")) for node in placeholders}
    graph_module.register_forward_pre_hook(check_input_sizes, with_kwargs=True)
    return follow_training_mode(graph_module)


def _refuse_mixed_modes(model: nn.Module) -> None:
    """Raises MELoRAError where a dropout or batch norm is in another mode than the model."""
    others = [name for name, each in model.named_modules() if follows_mode(each) and each.training != model.training]
    if others:
        raise MELoRAError(
            f"some modules are not in the model's own mode (training={model.training}): {', '.join(others[:5])}; one "
            "graph has one mode: call `.train()` or `.eval()` on the whole model first"
        )


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The program of `model` in training mode, so that dropout is in it, or else in evaluation, with a warning."""
    with without_cache(model):
        program, error = _export_in_mode(model, True, args, kwargs)
        if program is not None:
            return program
        program, _ = _export_in_mode(model, False, args, kwargs)
    name = type(model).__name__
    if program is None:
        remedy = f"{REMEDY}: " if loops_over_experts(model) else ""
        raise MELoRAError(f"torch.export cannot capture `{name}`: {remedy}{error}") from error
    warnings.warn(f"`{name}` can be captured in eval mode only: the graph has no dropout", stacklevel=5)
    return program


def _export_in_mode(
    model: nn.Module, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ExportedProgram | None, Exception | None]:
    """The program, or why there is none."""
    shapes = tree_map(all_dynamic, kwargs or args)
    with own_attributes(model), in_mode(model, training=training):
        try:
            return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes), None
        except Exception as error:  # the model's own forward can raise anything
            return None, error
