"""Whether a capture computes what its model does: in evaluation, and where an axis has one entry."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from melora_fx.capture.model_settings import in_mode, own_attributes, without_cache
from melora_fx.errors import MELoRAError
from melora_fx.torch_private import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .assumed_inputs import AssumedInputs
from .conditions import Condition
from .example_inputs import changed_names, copied


def has_values(model: nn.Module) -> bool:
    """Whether no tensor of `model` is on the meta device."""
    return not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def check_evaluation(
    model: nn.Module, graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuses a capture whose outputs in evaluation are not the model's, and notes which axes it takes to be larger
    than 1, as `torch.export` does without a word; without values there is nothing to compare. Warns where the forward
    changes its inputs.

    `graph_module` is in evaluation afterwards. Both run on copies of what a forward may write to.
    """
    if not has_values(model):
        return
    graph_module.eval()
    with torch.no_grad(), own_attributes(model), in_mode(model, training=False), without_cache(model):
        expected = _run(model, args, kwargs)
        if not _are_near(tree_leaves(_run(graph_module, args, kwargs)), tree_leaves(expected)):
            raise MELoRAError(
                f"`{type(model).__name__}` cannot be captured whole: its forward differs between train and eval mode "
                "by more than dropout, which one graph cannot follow: rewrite it without `example_inputs=`"
            )
        assumed: AssumedInputs = vars(graph_module)["assumed_inputs"]
        if changed := changed_names(assumed.by_name(*expected[1:]), assumed.by_name(args, kwargs)):
            names = ", ".join(f"`{name}`" for name in changed)
            warnings.warn(f"the forward of `{type(model).__name__}` changes its input {names} in place", stacklevel=6)
        assumed.conditions += tuple(_smallest_sizes(model, graph_module, args, kwargs, assumed))


def _smallest_sizes(
    model: nn.Module,
    graph_module: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    assumed: AssumedInputs,
) -> Iterator[Condition]:
    """That each of the free axes has an entry, or two, where the graph is not the model with one.

    Axes of several inputs that are as long in the example, such as the batches of tokens and of their mask, are tried
    together too: many models take one entry of both, and not of one.
    """

    def is_right(*sizes: str) -> bool | None:
        """With one entry along these axes; None where the model itself takes no such inputs."""
        inputs = _first_entries(args, kwargs, [place for size in sizes for place in assumed.free_axes[size]])
        try:
            expected = tree_leaves(_run(model, *inputs))
        except Exception:  # the model's own forward can raise anything
            return None
        try:
            return _are_near(tree_leaves(_run(graph_module, *inputs)), expected)
        except Exception:  # as can the graph
            return False

    leaves = tree_leaves((args, kwargs))
    right = []
    for size, places in assumed.free_axes.items():
        number, axis = places[0]
        together = [
            other
            for other, ((other_number, other_axis), *_) in assumed.free_axes.items()
            if other_axis == axis and leaves[other_number].size(axis) == leaves[number].size(axis)
        ]
        alone = is_right(size)
        if alone or (len(together) > 1 and is_right(*together)):
            right.append(size)
        if alone is False and size in right:
            others = " and ".join(f"{other} == 1" for other in together if other != size)
            yield Condition(f"{size} > 1 or ({others})")
        yield Condition(f"{size} > {0 if size in right else 1}")
    if len(right) > 1 and not is_right(*right):
        yield Condition(" or ".join(f"{size} > 1" for size in right))


def _first_entries(args: Any, kwargs: Any, places: Iterable[tuple[int, int]]) -> tuple[Any, Any]:
    """The arguments with the first entry alone along these axes: (number of the input, axis)."""
    leaves, structure = tree_flatten((args, kwargs))
    cut = list(leaves)
    for number, axis in places:
        cut[number] = cut[number].narrow(axis, 0, 1)
    made: tuple[Any, Any] = tree_unflatten(cut, structure)
    return made


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What comes out, with copies of the inputs and the buffers; and these inputs afterwards."""
    args, kwargs = tree_map(copied, (args, kwargs))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = torch.func.functional_call(model, buffers, args, kwargs)
    return dict(outputs) if isinstance(outputs, Mapping) else outputs, args, kwargs


def _are_near(actual: list[Any], expected: list[Any]) -> bool:
    """Whether as many values come out, and each tensor is near."""
    if len(actual) != len(expected):
        return False
    pairs = zip(actual, expected, strict=True)
    return all(_is_near(got, want) for got, want in pairs if isinstance(want, torch.Tensor))


def _is_near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the rounding of a whole model, relative to the largest value."""
    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    scale = expected.abs().nan_to_num(0, 0, 0).max() if expected.numel() else 0
    bound = float(scale) * max(1e-4, 8 * torch.finfo(expected.dtype).eps)
    return torch.allclose(actual, expected, rtol=0, atol=bound, equal_nan=True)
