"""Captures a whole model with `torch.export` as one graph that can be trained, copied and pickled."""

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from melora_fx.capture.expert_layers import REMEDY, loops_over_experts
from melora_fx.capture.model_settings import in_mode, own_attributes, same_random_state, without_cache
from melora_fx.errors import MELoRAError
from melora_fx.torch_private import follows_mode

from .assigned_buffers import keep_values_read, write_assigned_buffers
from .assumed_inputs import AssumedInputs, check_inputs
from .conditions import Condition, conditions_of, exporting, within
from .dynamic_axes import DynamicAxes, dynamic_shapes, has_dynamic_batch, refuse_fixed_axes, refuse_wrong_axes
from .evaluation_check import check_evaluation
from .example_inputs import as_arguments, name_keywords, with_named_keywords
from .private import clear_export_hooks, inference_mode_as_no_grad
from .shared_weights import name_by_user, repeated_modules
from .training_mode import follow_training_mode


def capture_whole(
    model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any], dynamic_axes: DynamicAxes = "auto"
) -> fx.GraphModule:
    """Returns the whole model as one graph of ATen nodes that shares the model's parameters and buffers.

    Dropout follows `.train()` and `.eval()`; the result has the mode of the model. A call raises if it is not as the
    export assumed. Changes neither the model nor the example.

    Args:
        model: the model to capture.
        example_inputs: a dict of keyword arguments or a tuple of positional ones; a batch of one is doubled.
        dynamic_axes: which axes may vary: see `dynamic_axes.py`.

    Raises:
        TypeError: if `example_inputs` is neither a dict nor a tuple.
        ValueError: if `dynamic_axes` names inputs or axes that do not exist, or names that axes cannot have.
        MELoRAError: if `torch.export` fails, with its message; if the capture, made in training mode, computes
            something else in evaluation than the model; if `example_inputs` do not fit the forward; if modules are in
            different modes; or if the model fixes an axis that `dynamic_axes` names.
    """
    signature = inspect.signature(model.forward)
    args, kwargs = as_arguments(example_inputs, double=has_dynamic_batch(dynamic_axes))
    arguments = _bound(signature, args, kwargs)
    refuse_wrong_axes(arguments, dynamic_axes)
    _refuse_mixed_modes(model)
    program = _export(model, args, kwargs, dynamic_shapes(arguments, dynamic_axes))
    graph_module = make_trainable(
        program.module(check_guards=False),
        repeated_modules(model),
        signature=signature,
        conditions=conditions_of(program),
    )
    assumed: AssumedInputs = vars(graph_module)["assumed_inputs"]
    refuse_fixed_axes({name: each.sizes for name, each in assumed.tensors()}, dynamic_axes)
    check_evaluation(model, graph_module, args, kwargs)
    graph_module.train(model.training)
    vars(graph_module)["model_class"] = type(model).__name__
    if hasattr(model, "config"):
        graph_module.config = copy.copy(model.config)
    return graph_module


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments by name, including those that go to `**kwargs`."""
    try:
        return with_named_keywords(signature, kwargs).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise MELoRAError(f"`example_inputs` do not fit the model's forward{signature}: {error}") from error


def from_program(program: ExportedProgram) -> fx.GraphModule:
    """Returns an exported program as a GraphModule that can be trained, copied and pickled: see `make_trainable`.

    A call raises if a size is outside the range of its axis, which begins at 2 if the export assumed so.
    """
    graph_module = make_trainable(program.module(check_guards=False), conditions=conditions_of(program))
    assumed: AssumedInputs = vars(graph_module)["assumed_inputs"]
    examples = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    for size, ((number, axis), *_) in assumed.free_axes.items():
        allowed = program.range_constraints.get(examples[number].shape[axis].node.expr)
        assumed.conditions += within(size, allowed) if allowed is not None else ()
    return graph_module


def is_exported(model: nn.Module) -> bool:
    """Returns whether `model` is the module of an exported program as built by `torch.export`, whose `.train()` and
    `.eval()` raise.
    """
    return isinstance(model, fx.GraphModule) and "train" in vars(model)


def make_trainable(
    graph_module: fx.GraphModule,
    repeated: Mapping[str, str] | None = None,
    *,
    signature: inspect.Signature | None = None,
    conditions: Iterable[Condition] = (),
) -> fx.GraphModule:
    """Changes an exported module in place and returns it: `.train()` and `.eval()` work and reach dropout, and a call
    raises if it is not as the export assumed. The export's own hooks for such checks cannot be pickled, so a hook of
    ours replaces them.

    Args:
        graph_module: the module.
        repeated: further name → first name of each module that the model uses in several places. Weights get the names
            that they have in the model.
        signature: the signature of the exported forward; None uses the module's.
        conditions: the conditions on sizes that the export assumed.
    """
    name_by_user(graph_module, repeated or {})
    keep_values_read(graph_module)
    clear_export_hooks(graph_module)
    signature = signature or inspect.signature(graph_module.forward)
    vars(graph_module)["assumed_inputs"] = AssumedInputs(graph_module, signature, conditions)
    graph_module.register_forward_pre_hook(check_inputs, with_kwargs=True)
    return follow_training_mode(graph_module)


def _refuse_mixed_modes(model: nn.Module) -> None:
    """Raises MELoRAError if a dropout or batch norm is in another mode than the model."""
    others = [name for name, each in model.named_modules() if follows_mode(each) and each.training != model.training]
    if others:
        raise MELoRAError(
            f"some modules are not in the model's own mode (training={model.training}): {', '.join(others[:5])}; one "
            "graph has one mode: call `.train()` or `.eval()` on the whole model first"
        )


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: dict[str, Any]) -> ExportedProgram:
    """Exports `model` in training mode, so that the program has dropout; else in evaluation, with a warning."""
    with without_cache(model):
        program, error = _export_in_mode(model, True, args, kwargs, shapes)
        if program is not None:
            return program
        program, _ = _export_in_mode(model, False, args, kwargs, shapes)
    name = type(model).__name__
    if program is None:
        remedy = f"{REMEDY}: " if loops_over_experts(model) else ""
        in_place = "in place, without `example_inputs=`, the forward runs unchanged"
        raise MELoRAError(f"torch.export cannot capture `{name}`: {remedy}{error}\n({in_place})") from error
    warnings.warn(
        f"`{name}` can be captured in eval mode only: the graph has no dropout, and does in training what the model "
        "does in evaluation",
        stacklevel=6,
    )
    return program


def _export_in_mode(
    model: nn.Module, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: dict[str, Any]
) -> tuple[ExportedProgram | None, Exception | None]:
    """Returns the program, or the error because of which there is none."""
    with (
        own_attributes(model),
        same_random_state(model),
        in_mode(model, training=training),
        inference_mode_as_no_grad(),
    ):
        write_assigned_buffers(model)
        name_keywords(model, kwargs)
        try:
            with exporting():
                return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes), None
        except MELoRAError:
            raise
        except Exception as error:  # the model's own forward can raise anything
            return None, error
