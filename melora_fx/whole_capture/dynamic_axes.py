"""Decides and checks which axes of the inputs may vary after a capture."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.export import Dim

from melora_fx.errors import MELoRAError
from melora_fx.torch_private import tree_leaves, tree_map

DynamicAxes = Literal["auto"] | Mapping[str, Mapping[int, str]]
"""Axes that may vary, if the model allows it: "auto" for batch and sequence, or input name → {axis: name}.

"auto" frees axes 0 and 1 of each tensor, and further axes with the size of some tensor's axis 1, such as those of a
mask for pairs of tokens. It never frees an axis of size 1, which a model may repeat. The height and width of images,
and the frames of sound, are freed only by name.
"""


def refuse_malformed_axes(dynamic_axes: Any) -> None:
    """Raises a ValueError if `dynamic_axes` is neither "auto" nor a mapping of mappings."""
    is_mapping = isinstance(dynamic_axes, Mapping)
    if dynamic_axes != "auto" and not (is_mapping and all(isinstance(axes, Mapping) for axes in dynamic_axes.values())):
        raise ValueError(f'`dynamic_axes` (={dynamic_axes!r}) must be "auto" or input name → {{axis: name}}')


def refuse_wrong_axes(inputs: Mapping[str, Any], dynamic_axes: DynamicAxes) -> None:
    """Raises a ValueError for inputs and axes that do not exist, and for names that the axes cannot have."""
    if isinstance(dynamic_axes, str):
        return
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    sizes: dict[str, int] = {}
    for name, axes in dynamic_axes.items():
        if name not in tensors:
            raise ValueError(f"`dynamic_axes` names the input `{name}`; the inputs are {', '.join(tensors)}")
        shape = tuple(tensors[name].shape)
        if outside := [axis for axis in axes if axis not in range(len(shape))]:
            raise ValueError(f"`dynamic_axes` of `{name}`, of shape {shape}: it has no axis {outside[0]}")
        for axis, label in axes.items():
            if not isinstance(label, str) or not label.isidentifier():
                raise ValueError(f"`dynamic_axes` of `{name}`, axis {axis}: {label!r} must be a name such as 'batch'")
            if sizes.setdefault(label, shape[axis]) != shape[axis]:
                raise ValueError(
                    f"`dynamic_axes` of `{name}`, axis {axis}: `{label}` is {shape[axis]} here and {sizes[label]} "
                    "before: axes with the same name must have the same size"
                )


def refuse_fixed_axes(inputs: Mapping[str, Sequence[Any]], dynamic_axes: DynamicAxes) -> None:
    """Raises a MELoRAError for axes that were requested to be dynamic and that the export has fixed.

    Args:
        inputs: name → axes; a fixed axis is an int.
        dynamic_axes: the requested axes.
    """
    if isinstance(dynamic_axes, str):
        return
    lines = [
        f"`{name}` axis {axis} (`{label}`): the model fixes it to {inputs[name][axis]}"
        for name, axes in dynamic_axes.items()
        for axis, label in axes.items()
        if name in inputs and isinstance(inputs[name][axis], int)
    ]
    if lines:
        raise MELoRAError("these axes cannot be dynamic:\n" + "\n".join(lines))


def has_dynamic_batch(dynamic_axes: DynamicAxes) -> bool:
    """Returns whether the first axis of any input may vary."""
    return isinstance(dynamic_axes, str) or any(0 in axes for axes in dynamic_axes.values())


def dynamic_shapes(arguments: Mapping[str, Any], dynamic_axes: DynamicAxes) -> dict[str, Any]:
    """Returns `dynamic_shapes` in the form that `torch.export` accepts, for arguments by name."""
    if not isinstance(dynamic_axes, str):
        fixed = tree_map(lambda leaf: None, arguments)
        return fixed | {name: dict.fromkeys(axes, Dim.AUTO) for name, axes in dynamic_axes.items()}
    lengths = {leaf.size(1) for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1}
    return {name: tree_map(lambda leaf: _automatic(leaf, lengths), value) for name, value in arguments.items()}


def _automatic(leaf: Any, lengths: set[int]) -> dict[int, Any] | None:
    """Returns the entry of one leaf for "auto"; None if the leaf is not a tensor."""
    if not isinstance(leaf, torch.Tensor):
        return None
    return {axis: Dim.AUTO for axis, size in enumerate(leaf.shape) if size != 1 and (axis < 2 or size in lengths)}
